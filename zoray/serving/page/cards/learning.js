// Jobs: their status, curves and events.
import { $, acts, choose, complain, element, list, put, say, sure, when } from "./parts.js";
import { post, remove } from "./server.js";
import { curve, smooth } from "./curve.js";

const GOING = ["running", "queued", "paused"];
const WORDS = { running: "learning", queued: "waits for its turn", paused: "paused", succeeded: "finished", cancelled: "ended early", failed: "failed" };
let followed = null; // the job chosen to be shown
let picked = false; // whether it was chosen by hand, from the list
let shown = null; // the job shown
const known = new Map(); // job -> its status as last seen

export function follow(job, byHand = false) {
  [followed, picked] = [job, byHand];
}

// The job to show: the picked one; or the one begun here, until it has ended and another is at work; else the one at
// work, or the latest.
export function shownJob(jobs) {
  const chosen = jobs.find((one) => one.id === followed), running = jobs.find((one) => one.status === "running");
  const found = (chosen && (picked || GOING.includes(chosen.status) || !running) && chosen) || running ||
    jobs.find((one) => GOING.includes(one.status)) || jobs[0];
  shown = found?.id ?? null;
  return found;
}

// How a job stands, in words.
function standing(job, numbers, on) {
  const steps = `step ${job.step} of ${job.steps}`;
  if (GOING.includes(job.status) && job.status !== "paused" && !on) return `waits until active learning is on, ${steps}`;
  const left = job.status === "running" && numbers.seconds_per_step ? (job.steps - job.step) * numbers.seconds_per_step : 0;
  return `${WORDS[job.status] || job.status}, ${steps}${left ? `, ${lasting(left)} left` : ""}`;
}

function lasting(seconds) {
  if (seconds < 90) return "about a minute";
  const minutes = Math.round(seconds / 60);
  return minutes < 90 ? `about ${minutes} minutes` : `about ${(minutes / 60).toFixed(1)} hours`;
}

// Announce changes of jobs since the last look, for users who see or listen to another part of the page.
function tellNews(jobs) {
  for (const { id, status, error } of jobs) {
    const was = known.get(id);
    known.set(id, status);
    if (!was || was === status) continue;
    if (status === "failed") complain(`${id} has failed: ${error?.message || "see what has happened"}`);
    else if (status === "succeeded") say(`${id} has finished`);
  }
}

export function showJob(jobs, job, numbers, on) {
  tellNews(jobs);
  const running = on && jobs.some((one) => one.status === "running");
  put("state", running ? "Learning" : on ? "Ready" : "Ready, active learning is off");
  $("state").className = running ? "learning" : "";
  $("which").hidden = jobs.length < 2;
  choose($("jobs"), jobs.map((one) => [one.id, `${one.id}, ${WORDS[one.status] || one.status}`]), job?.id ?? "");
  $("going").hidden = !job;
  $("job").classList.toggle("empty", !job);
  $("job").classList.toggle("wrong", job?.status === "failed");
  if (!job) {
    put("job", "Nothing has been learnt yet. Choose a file above to learn from.");
    return;
  }
  put("job", `${job.id}, from ${job.filename}: ${standing(job, numbers, on)}${job.error ? `\n${job.error.message}` : ""}`);
  $("job").dataset.status = job.status;
  [$("progress").max, $("progress").value] = [job.steps, job.step];
  $("pause").hidden = !["running", "queued"].includes(job.status);
  $("resume").hidden = !["paused", "failed"].includes(job.status);
  $("cancel").hidden = !GOING.includes(job.status);
  $("remove").hidden = GOING.includes(job.status);
  const losses = numbers.losses;
  curve("loss", smooth(losses), "Loss on training rows", { raw: losses });
  const dev = numbers.evaluations.filter((one) => one.split === "dev");
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
      const job = shown;
      if (verb === "cancel" && !await sure(`End ${job}? Its versions stay, but it cannot be resumed.`, "End it")) return;
      await post(`/v1/fine_tuning/jobs/${job}/${verb}`);
      $("learning-title").focus(); // the button may be gone
    });
  }
  acts($("remove"), async () => {
    const job = shown;
    if (!await sure(`Delete ${job} with its curves? Its versions stay, but you cannot go back to any other step.`)) return;
    await remove(`/v1/fine_tuning/jobs/${job}`);
    $("learning-title").focus();
  });
  $("jobs").addEventListener("change", () => { follow($("jobs").value, true); refresh(); });
}
