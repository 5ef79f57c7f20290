// The page of a zoray server: what the server says is asked for every two seconds, and shown where it has changed.
import { $, acts, complain, guarded, page, put } from "./parts.js";
import { call, locked, put as send, unlock } from "./server.js";
import * as chat from "./chat.js";
import * as data from "./data.js";
import * as learning from "./learning.js";
import * as stored from "./stored.js";
import * as versions from "./versions.js";

const SECONDS = 2;

async function refresh() {
  const round = (page.round += 1);
  const stale = () => round !== page.round; // something was done meanwhile
  const [models, files, jobs, found, on, conversations] = await Promise.all([
    call("/v1/models"), call("/v1/files"), call("/v1/fine_tuning/jobs?limit=100"), call("/v1/versions"),
    call("/v1/learning"), call("/v1/conversations"),
  ]);
  if (stale()) return;
  const job = learning.shownJob(jobs.data), numbers = await learning.numbersOf(job);
  if (stale()) return;
  const base = models.data[0].id;
  put("name", base);
  chat.showModels(models.data.map((model) => model.id), found.live);
  chat.showKept(conversations.data);
  data.showFiles(files.data);
  learning.showJob(jobs.data, job, numbers, on.on);
  versions.showVersions(found, base, on.on && jobs.data.some((one) => ["running", "queued"].includes(one.status)), job);
  stored.showStored(files.data, conversations.data, jobs.data, found.data, found.folder);
  $("learning").checked = on.on;
}

async function asked() {
  if (locked()) return;
  try {
    await refresh();
  } catch (error) {
    put("state", locked() ? "Key needed" : `No connection: ${error.message}`);
    $("state").className = "lost";
  }
}

async function loop() {
  if (!document.hidden && !page.busy) await asked();
  setTimeout(loop, SECONDS * 1000);
}

page.refresh = asked;
for (const part of [chat, data, learning, stored, versions]) part.begin(asked);
acts($("dismiss"), async () => { complain(""); $("question").focus(); });
$("learning").addEventListener("change", () => {
  const on = $("learning").checked;
  guarded(() => send("/v1/learning", { on }));
});
$("key").addEventListener("submit", (event) => {
  event.preventDefault();
  unlock($("key-value").value);
  guarded(async () => {});
});
loop();
