// Jobs: what is being learnt, its curves, and what has happened.
import { $, acts, choose, element, list, put, sure, when } from "./parts.js";
import { call, post, remove } from "./server.js";
import { curve, smooth } from "./curve.js";

const GOING = ["running", "queued", "paused"];
let followed = null; // the job that is shown

export function follow(job) {
  followed = job;
}

// The job that is shown: the one that was chosen, else the one at work, else the latest.
export function shownJob(jobs) {
  const found = jobs.find((one) => one.id === followed) || jobs.find((one) => one.status === "running") ||
    jobs.find((one) => GOING.includes(one.status)) || jobs[0];
  followed = found?.id ?? null;
  return found;
}

export async function numbersOf(job) {
  if (!job) return null;
  const [metrics, events] = await Promise.all([
    call(`/v1/fine_tuning/jobs/${job.id}/metrics`), call(`/v1/fine_tuning/jobs/${job.id}/events`),
  ]);
  return { metrics, events: events.data };
}

// How a job stands, in words.
function standing(job, on) {
  const steps = `step ${job.step} of ${job.steps}`;
  if (GOING.includes(job.status) && job.status !== "paused" && !on) return `waits until active learning is on, ${steps}`;
  const words = { running: "learning", queued: "waits for its turn", paused: "paused", succeeded: "finished", cancelled: "ended early", failed: "failed" };
  return `${words[job.status] || job.status}, ${steps}`;
}

export function showJob(jobs, job, numbers, on) {
  const running = on && jobs.some((one) => one.status === "running");
  put("state", running ? "Learning" : on ? "Ready" : "Ready, active learning is off");
  $("state").className = running ? "learning" : "";
  $("which").hidden = jobs.length < 2;
  choose($("jobs"), jobs.map((one) => [one.id, one.id]), job?.id ?? "");
  $("going").hidden = !job;
  $("job").classList.toggle("empty", !job);
  $("job").classList.toggle("wrong", job?.status === "failed");
  if (!job) {
    put("job", "Nothing has been learnt yet. Choose a file above to learn from.");
    return;
  }
  put("job", `${job.id}, from ${job.filename}: ${standing(job, on)}${job.error ? `\n${job.error.message}` : ""}`);
  $("job").dataset.status = job.status;
  [$("progress").max, $("progress").value] = [job.steps, job.step];
  $("pause").hidden = !["running", "queued"].includes(job.status);
  $("resume").hidden = !["paused", "failed"].includes(job.status);
  $("cancel").hidden = !GOING.includes(job.status);
  $("remove").hidden = GOING.includes(job.status);
  const losses = numbers.metrics.steps.map(({ step, loss }) => [step, loss]);
  curve("loss", smooth(losses), "Loss on training rows", { raw: losses });
  const dev = numbers.metrics.evaluations.filter((one) => one.split === "dev");
  const metric = dev.find((one) => one.metric)?.metric, scores = dev.map((one) => [one.step, metric ? one.score : one.loss]);
  const name = metric ? metric[0].toUpperCase() + metric.slice(1) : dev.length ? "Loss" : "Score";
  put("score-name", `${name} on held-out rows`);
  const share = metric && scores.every(([, y]) => y >= 0 && y <= 1);
  curve("score", scores, `${name} on held-out rows`, { range: share ? [0, 1] : null });
  list($("events"), numbers.events, (event) => event.id, (event) => {
    const item = element("li");
    item.append(element("span", event.message), element("small", when(event.created_at)));
    return item;
  });
}

export function begin(refresh) {
  for (const verb of ["pause", "resume", "cancel"]) {
    acts($(verb), async () => {
      if (verb === "cancel" && !await sure(`End ${followed}? Its versions stay, but it cannot be resumed.`, "End it")) return;
      await post(`/v1/fine_tuning/jobs/${followed}/${verb}`);
      $("learning-title").focus(); // the button may be gone
    });
  }
  acts($("remove"), async () => {
    if (!await sure(`Delete ${followed} with its curves? Its versions stay.`)) return;
    await remove(`/v1/fine_tuning/jobs/${followed}`);
    $("learning-title").focus();
  });
  $("jobs").addEventListener("change", () => { follow($("jobs").value); refresh(); });
}
