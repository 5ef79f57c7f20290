// The page of a zoray server: it asks the server for its state every two seconds, and shows what has changed.
import { $, acts, complain, guarded, page, put } from "./parts.js";
import { call, locked, put as send, unlock } from "./server.js";
import * as chat from "./chat.js";
import * as data from "./data.js";
import * as learning from "./learning.js";
import * as stored from "./stored.js";
import * as versions from "./versions.js";

const SECONDS = 2;
const parts = {}, marks = {}; // the server's state by parts, and the mark of each part
let unlocking = false;

// Ask for the parts that have changed; `job` is the one whose numbers are shown.
async function look(job) {
  const have = Object.entries(marks).map((pair) => pair.join(":")).join(",");
  const found = await call(`/v1/overview?${new URLSearchParams({ have, ...(job ? { job } : {}) })}`);
  for (const [name, part] of Object.entries(found.parts)) [parts[name], marks[name]] = [part, found.marks[name]];
}

async function refresh() {
  const round = (page.round += 1);
  const stale = () => round !== page.round; // the user did something in the meantime
  await look(learning.shownJob(parts.jobs || [])?.id);
  if (stale()) return;
  const job = learning.shownJob(parts.jobs);
  if (job && parts.numbers.id !== job.id) {
    await look(job.id);
    if (stale()) return;
  }
  const { server, files, jobs, learning: on, conversations, numbers, versions: found } = parts;
  put("name", server.name);
  $("steps").placeholder = String(server.steps);
  chat.showModels(server.name, found.data.map((version) => version.id), found.live);
  chat.showKept(conversations.ids);
  data.showFiles(files);
  learning.showJob(jobs, job, numbers, on);
  versions.showVersions(found, server.name, jobs, job);
  stored.showStored(files, conversations, jobs, found.data, found.folder);
  $("learning").checked = on;
}

async function asked() {
  if (locked()) return;
  try {
    await refresh();
    if (unlocking) $("question").focus();
    unlocking = false;
  } catch (error) {
    put("state", locked() ? "Key needed" : error.status === 429 ? "Too many requests, waiting" : `No connection: ${error.message}`);
    $("state").className = "lost";
  }
}

async function loop() {
  if (!document.hidden && !page.busy) await asked();
  setTimeout(loop, SECONDS * 1000);
}

page.refresh = asked;
for (const part of [chat, data, learning, stored, versions]) part.begin(asked);
let before = null; // the element that had the focus before a message was dismissed
addEventListener("focusin", (event) => { if (!$("messages").contains(event.target)) before = event.target; });
acts($("dismiss"), async () => {
  complain("");
  (before?.checkVisibility() ? before : $("chat-title")).focus({ preventScroll: true });
});
$("learning").addEventListener("change", () => {
  const on = $("learning").checked;
  guarded(() => send("/v1/learning", { on }));
});
$("key").addEventListener("submit", (event) => {
  event.preventDefault();
  unlock($("key-value").value);
  unlocking = !locked();
  if (unlocking) guarded(async () => {});
});
loop();
