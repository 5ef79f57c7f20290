// Versions with their scores before and after, promotion and rollback.
import { $, acts, button, count, element, list, put, say, sure, tell, when } from "./parts.js";
import { post, remove } from "./server.js";

let live; // the live version as last shown
let all = false; // whether versions that did not pass are shown as well
let last = null; // the state shown

function score(measured) {
  return (measured.score ?? measured.loss)?.toFixed(3) ?? "–";
}

function cell(label, ...parts) {
  const made = element("td", null, { role: "cell", "data-label": label });
  made.append(...parts);
  return made;
}

// How much better a version is, for people: accuracy in points.
function change({ measured: now, compared_with: then }) {
  const key = now.score === null || then.score === null ? "loss" : "score", by = now[key] - then[key];
  const points = key === "score" && ["accuracy", "f1"].includes(now.metric);
  return `${by < 0 ? "−" : "+"}${Math.abs(points ? 100 * by : by).toFixed(points ? 1 : 3)}${points ? " points" : ` ${key}`}`;
}

// The version that was live before; one of the same job by its step.
function before({ job, compared_with: then }, base) {
  return then.version === null ? base : then.version.startsWith(`${job}@`) ? `step ${then.version.slice(job.length + 1)}` : then.version;
}

// Promote a version; returns whether it was promoted.
async function promote(version, learns) {
  const judged = !version.base && version.compared_with; // else the gate has never judged it
  if (judged && !version.passed && !await sure(`${version.id} did not pass the gate: ${version.reason}\n\nPromote it all the same?`, "Promote it")) return false;
  await post(`/v1/versions/${encodeURIComponent(version.id)}/promote`);
  const goes = learns ? " The job at work promotes nothing by itself any more, until you pause and resume it." : "";
  tell(`${version.id} answers as live from now on.${goes}`);
  return true;
}

// Promote any step of a job: the server makes a missing version from the job's journal.
async function promoteStep() {
  const name = $("step-name").value.trim();
  if (!/^[^@\s]+@\d+$/.test(name)) throw new Error(`Expected a job and a step, such as mail@60; got ${name || "nothing"}`);
  if (await promote(last.found.data.find((one) => one.id === name) || { id: name }, last.learns)) $("step-name").value = "";
}

function row({ version, isLive, back, learns, waits, base }) {
  const made = element("tr", null, { role: "row" }), name = element("th", `${version.id} `, { scope: "row", role: "rowheader" });
  if (isLive) name.append(element("span", "live", { class: "badge" }));
  if (version.base) name.append(element("small", "base model"));
  made.append(name);
  if (version.base) made.append(cell(""), cell(""), cell(""));
  else {
    const judged = version.compared_with !== null; // else it was made from the journal
    const then = judged ? cell("Before", element("strong", score(version.compared_with)), element("small", before(version, base))) : cell("");
    const after = cell("After", element("strong", score(version.measured)), element("small", judged ? change(version) : ""));
    const verdict = !judged ? "not judged" : version.passed ? "passed" : "not passed";
    const gate = cell("Gate", element("span", verdict, { class: version.passed ? "badge" : "badge no" }), element("small", waits ? `${version.reason}. It waits for you: promote it if you like it` : version.reason));
    gate.classList.add("wide");
    made.append(then, after, gate);
  }
  const buttons = element("div", null, { class: "acts" });
  if (!isLive) {
    const text = version.base || back ? "Roll back" : "Promote";
    const label = text === "Promote" ? `Promote ${version.id}` : `Roll back to ${version.id}`;
    buttons.append(button(text, () => promote(version, learns), { class: "quiet", "aria-label": label }));
    if (!version.base) {
      buttons.append(button("Delete", async () => {
        if (await sure(`Delete version ${version.id}?`)) await remove(`/v1/versions/${encodeURIComponent(version.id)}`);
      }, { class: "danger", "aria-label": `Delete version ${version.id}` }));
    }
  }
  const act = element("td", null, { role: "cell", class: "wide" });
  if (buttons.children.length) act.append(buttons);
  made.append(act);
  return made;
}

export function showVersions(found, base, jobs, job) {
  const learns = jobs.some((one) => one.status === "running" || (one.step > 0 && ["queued", "paused"].includes(one.status)));
  last = { found, base, jobs, job, learns };
  $("any-step").hidden = !job?.step;
  $("step-name").placeholder = job?.step ? `${job.id}@${job.step}` : "";
  const been = new Set(found.history.map((entry) => entry.version));
  const newest = [...found.data].reverse();
  const told = newest.filter((version, place) => all || place === 0 || version.passed || been.has(version.id));
  const more = newest.filter((version, place) => place > 0 && !version.passed && !been.has(version.id)).length;
  $("more").hidden = !more;
  $("more").setAttribute("aria-expanded", String(all));
  put("more", all ? "Hide earlier versions that did not pass" : `Show ${count(more, "earlier version")} that did not pass`);
  const rows = [...told, { id: base, base: true }].map((version) => ({
    version, base, learns, back: been.has(version.id), isLive: found.live === (version.base ? null : version.id),
    waits: version === newest[0] && version.passed && !been.has(version.id),
  }));
  list($("versions"), rows, ({ version }) => version.id, row);
  const changes = found.history.map((entry, at) => ({ ...entry, at })).reverse();
  list($("history"), changes.length ? changes : [{ at: -1 }], (entry) => entry.at, (entry) => {
    const item = element("li", entry.at < 0 ? `Only the base model, ${base}.` : null);
    if (entry.at >= 0) item.append(element("span", `${entry.version || base}: ${entry.reason}`), element("small", when(entry.time)));
    return item;
  });
  if (live !== undefined && live !== found.live) say(`${found.live || base} is live`);
  live = found.live;
}

export function begin() {
  $("more").addEventListener("click", () => {
    all = !all;
    showVersions(last.found, last.base, last.jobs, last.job);
  });
  acts($("step-promote"), promoteStep);
  $("step-name").addEventListener("keydown", (event) => { if (event.key === "Enter") $("step-promote").click(); });
}
