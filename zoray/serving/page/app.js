// The page of a zoray server. Text from models, files and people reaches the page as text only, never as markup.
"use strict";

const $ = (id) => document.getElementById(id);
const state = { file: null, job: null, turns: [], asking: null, models: [], key: sessionStorage.getItem("key") || "" };

function element(tag, text, attributes = {}) {
  const made = document.createElement(tag);
  if (text !== undefined && text !== null) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function button(text, does, attributes = {}) {
  const made = element("button", text, { type: "button", ...attributes });
  made.addEventListener("click", () => guarded(does));
  return made;
}

function complain(text) {
  $("alert").textContent = text;
  $("alert").hidden = !text;
}

async function guarded(does) {
  try {
    complain("");
    await does();
  } catch (error) {
    if (error.name !== "AbortError") complain(error.message);
  }
}

async function call(path, options = {}) {
  const headers = { ...(options.headers || {}) };
  if (state.key) headers.Authorization = `Bearer ${state.key}`;
  if (options.json !== undefined) {
    options.body = JSON.stringify(options.json);
    headers["Content-Type"] = "application/json";
  }
  const response = await fetch(path, { ...options, headers });
  if (response.status === 401) $("key").hidden = false;
  if (!response.ok) {
    let text = `${response.status} ${response.statusText}`;
    try { text = (await response.json()).error.message; } catch { /* not of our own making */ }
    throw new Error(text);
  }
  return options.raw ? response : response.json();
}

// Asks before something is deleted.
function sure(text) {
  return new Promise((resolve) => {
    const dialog = $("sure");
    $("sure-text").textContent = text;
    dialog.returnValue = "no";
    dialog.onclose = () => resolve(dialog.returnValue === "yes");
    dialog.showModal();
  });
}

// Chat.

function shownTurn(turn) {
  const item = element("li", null, turn.role === "user" ? { class: "mine" } : {});
  item.append(element("small", turn.role === "user" ? "You" : turn.model || "…"), element("span", turn.content));
  return item;
}

function rating(turn, item) {
  const row = element("div", null, { class: "row" });
  const rate = (up) => async () => {
    const at = state.turns.indexOf(turn);
    const messages = state.turns.slice(0, at + 1).map(({ role, content }) => ({ role, content }));
    const kept = await call("/v1/conversations", { method: "POST", json: { messages, up, model: turn.model, id: turn.kept } });
    turn.kept = kept.id;
    for (const one of row.children) one.setAttribute("aria-pressed", String(one.dataset.up === String(up)));
    await refresh();
  };
  const up = button("👍", rate(true), { class: "rate", "aria-label": "Good answer: keep it to learn from", "aria-pressed": "false", "data-up": "true" });
  const down = button("👎", rate(false), { class: "rate", "aria-label": "Bad answer: keep it as an example of one", "aria-pressed": "false", "data-up": "false" });
  row.append(up, down);
  item.append(row);
}

async function ask() {
  const text = $("question").value.trim();
  if (!text || state.asking) return;
  $("question").value = "";
  state.turns.push({ role: "user", content: text });
  $("turns").append(shownTurn(state.turns.at(-1)));
  const turn = { role: "assistant", content: "", model: "" };
  const item = shownTurn(turn);
  $("turns").append(item);
  state.asking = new AbortController();
  $("send").disabled = true;
  $("stop").hidden = false;
  try {
    const messages = state.turns.map(({ role, content }) => ({ role, content }));
    const response = await call("/v1/chat/completions", {
      method: "POST", raw: true, signal: state.asking.signal,
      json: { model: $("model").value, messages, stream: true, max_tokens: 512 },
    });
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      turn.model = event.model || turn.model;
      turn.content += event.choices?.[0]?.delta?.content || "";
      item.children[0].textContent = turn.model;
      item.children[1].textContent = turn.content;
      $("turns").scrollTop = $("turns").scrollHeight;
    }
  } finally {
    state.asking = null;
    $("send").disabled = false;
    $("stop").hidden = true;
    if (turn.content) {
      state.turns.push(turn);
      rating(turn, item);
    } else {
      item.remove();
    }
  }
}

// The events of a stream: `data: {...}` lines up to [DONE].
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      if (line === "data: [DONE]") return;
      yield JSON.parse(line.slice(6));
    }
  }
}

// Files.

async function upload(file) {
  const form = new FormData();
  form.append("purpose", "fine-tune");
  form.append("file", file);
  const kept = await call("/v1/files", { method: "POST", body: form });
  await refresh();
  await use(kept);
}

async function use(file) {
  state.file = file;
  $("use-title").textContent = `How ${file.filename} will be used`;
  $("use").hidden = false;
  await look();
}

function how() {
  const template = $("template").value.trim();
  return template ? { template } : {};
}

async function look() {
  $("preview").textContent = "reading …";
  $("learn").disabled = true;
  try {
    const found = await call(`/v1/files/${state.file.id}/preview`, { method: "POST", json: how() });
    $("preview").textContent = found.lines.join("\n");
    $("learn").disabled = false;
  } catch (error) {
    $("preview").textContent = error.message;
  }
}

async function learn() {
  const json = { training_file: state.file.id, use: how() };
  state.job = (await call("/v1/fine_tuning/jobs", { method: "POST", json })).id;
  await call("/v1/learning", { method: "PUT", json: { on: true } });
  await refresh();
}

// Curves.

function curve(id, points, digits) {
  const svg = $(id), space = "http://www.w3.org/2000/svg";
  const add = (tag, attributes, text) => {
    const made = document.createElementNS(space, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (text !== undefined) made.textContent = text;
    svg.append(made);
  };
  svg.replaceChildren();
  points = points.filter(([, y]) => y !== null && Number.isFinite(y));
  svg.dataset.points = points.length;
  if (!points.length) return;
  const xs = points.map(([x]) => x), ys = points.map(([, y]) => y);
  const [x0, x1, low, high] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const place = ([x, y]) => [45 + 340 * (x1 > x0 ? (x - x0) / (x1 - x0) : 0.5), 120 - 100 * (high > low ? (y - low) / (high - low) : 0.5)];
  add("polyline", { points: points.map((point) => place(point).map((v) => v.toFixed(1)).join(",")).join(" ") });
  const [x, y] = place(points.at(-1));
  add("circle", { cx: x, cy: y, r: 3.5 });
  add("text", { x: 4, y: 24 }, high.toFixed(digits));
  add("text", { x: 4, y: 124 }, low.toFixed(digits));
  add("text", { x: 45, y: 137 }, `step ${x0}`);
  add("text", { x: 385, y: 137, "text-anchor": "end" }, `step ${x1}`);
  svg.setAttribute("aria-label", `${svg.previousElementSibling.textContent}: ${ys[0].toFixed(digits)} at step ${x0}, ${ys.at(-1).toFixed(digits)} at step ${x1}`);
}

function smooth(rows) {
  let mean = null;
  return rows.map(({ step, loss }) => {
    if (loss !== null) mean = mean === null ? loss : 0.9 * mean + 0.1 * loss;
    return [step, mean];
  });
}

// What the server says.

function size(bytes) {
  return bytes < 1e6 ? `${Math.ceil(bytes / 1e3)} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
}

async function refresh() {
  const [models, files, jobs, versions, learning, conversations] = await Promise.all([
    call("/v1/models"), call("/v1/files"), call("/v1/fine_tuning/jobs?limit=100"), call("/v1/versions"),
    call("/v1/learning"), call("/v1/conversations"),
  ]);
  showModels(models.data.map((model) => model.id));
  showFiles(files.data);
  await showJobs(jobs.data);
  showVersions(versions, models.data[0].id);
  showConversations(conversations.data);
  $("learning").checked = learning.on;
  const total = files.data.reduce((sum, file) => sum + file.bytes, 0);
  $("stored").textContent = `${files.data.length} files (${size(total)}), ${conversations.data.length} rated conversations, ` +
    `${jobs.data.length} jobs, ${versions.data.length} versions, all in ${versions.folder} on this server.`;
}

function showModels(names) {
  const select = $("model"), chosen = select.value || "live";
  if (JSON.stringify(names) === JSON.stringify(state.models)) return;
  state.models = names;
  const shown = (name) => (name === "live" ? "live: the version that has been promoted" : name);
  select.replaceChildren(...names.map((name) => element("option", shown(name), { value: name })));
  select.value = names.includes(chosen) ? chosen : "live";
}

function showFiles(files) {
  $("files").replaceChildren(...files.map((file) => {
    const item = element("li");
    const row = element("span");
    row.append(
      button("Use", () => use(file), { class: "quiet", "aria-label": `Use ${file.filename}` }), " ",
      button("Delete", async () => {
        if (!await sure(`Delete ${file.filename}? Jobs that learn from it end.`)) return;
        await call(`/v1/files/${file.id}`, { method: "DELETE" });
        if (state.file?.id === file.id) $("use").hidden = true;
        await refresh();
      }, { class: "danger", "aria-label": `Delete ${file.filename}` }),
    );
    item.append(element("span", `${file.filename}, ${size(file.bytes)}`), row);
    return item;
  }));
}

async function showJobs(jobs) {
  const going = ["running", "queued", "paused"];
  const job = jobs.find((one) => one.id === state.job) || jobs.find((one) => going.includes(one.status)) || jobs[0];
  for (const id of ["pause", "resume", "cancel"]) $(id).hidden = true;
  $("state").textContent = jobs.some((one) => one.status === "running") ? "learning" : "ready";
  if (!job) {
    $("job").textContent = "Nothing is being learnt.";
    curve("loss", [], 3);
    curve("score", [], 3);
    $("events").replaceChildren();
    return;
  }
  state.job = job.id;
  $("pause").hidden = !["running", "queued"].includes(job.status);
  $("resume").hidden = !["paused", "failed"].includes(job.status);
  $("cancel").hidden = !going.includes(job.status);
  const failure = job.error ? `: ${job.error.message}` : "";
  $("job").textContent = `${job.id}, from ${job.filename}: ${job.status}, step ${job.step} of ${job.steps}${failure}`;
  const [numbers, events] = await Promise.all([
    call(`/v1/fine_tuning/jobs/${job.id}/metrics`), call(`/v1/fine_tuning/jobs/${job.id}/events`),
  ]);
  curve("loss", smooth(numbers.steps), 3);
  const dev = numbers.evaluations.filter((one) => one.split === "dev");
  const metric = dev[0]?.metric;
  $("score-name").textContent = `${metric || "loss"} on held-out rows`;
  curve("score", dev.map((one) => [one.step, metric ? one.score : one.loss]), 3);
  $("events").replaceChildren(...events.data.map((event) => {
    const item = element("li");
    item.append(element("span", event.message), element("small", new Date(event.created_at * 1000).toLocaleTimeString()));
    return item;
  }));
}

function scored(measured) {
  if (!measured) return "";
  return measured.score !== null ? `${measured.metric || "score"} ${measured.score.toFixed(3)}` : `loss ${measured.loss.toFixed(3)}`;
}

function showVersions(found, base) {
  const rows = [{ id: base, base: true }, ...found.data];
  $("versions").replaceChildren(...rows.map((version) => {
    const live = found.live === version.id || (version.base && found.live === null);
    const row = element("tr", null, live ? { class: "live" } : {});
    const name = element("th", version.id + (live ? " (live)" : ""), { scope: "row" });
    const act = element("td");
    if (!live) {
      act.append(button(version.base ? "Roll back to it" : "Promote", async () => {
        await call(`/v1/versions/${encodeURIComponent(version.id)}/promote`, { method: "POST" });
        await refresh();
      }, { "aria-label": version.base ? "Roll back to the base model" : `Promote ${version.id}` }));
      if (!version.base) {
        act.append(" ", button("Delete", async () => {
          if (!await sure(`Delete ${version.id}?`)) return;
          await call(`/v1/versions/${encodeURIComponent(version.id)}`, { method: "DELETE" });
          await refresh();
        }, { class: "danger", "aria-label": `Delete ${version.id}` }));
      }
    }
    const gate = version.base ? "" : `${version.passed ? "passed" : "not passed"}: ${version.reason}`;
    row.append(name, element("td", scored(version.compared_with)), element("td", scored(version.measured)), element("td", gate), act);
    return row;
  }));
}

function showConversations(kept) {
  const items = kept.map((one) => {
    const item = element("li");
    const question = one.messages.findLast((message) => message.role === "user")?.content || "";
    item.append(element("span", `${one.up ? "👍" : "👎"} ${question.slice(0, 80)}`), button("Delete", async () => {
      await call(`/v1/conversations/${one.id}`, { method: "DELETE" });
      await refresh();
    }, { class: "danger", "aria-label": `Delete the conversation: ${question.slice(0, 40)}` }));
    return item;
  });
  if (kept.length) {
    const item = element("li");
    item.append(element("span", "Make a file of them, to learn from"), button("Make a file", async () => {
      const file = await call("/v1/conversations/file", { method: "POST" });
      await refresh();
      await use(file);
    }, { class: "quiet" }));
    items.push(item);
  }
  $("conversations").replaceChildren(...items);
}

function turn(verb) {
  return () => guarded(async () => {
    await call(`/v1/fine_tuning/jobs/${state.job}/${verb}`, { method: "POST" });
    await refresh();
  });
}

function begin() {
  $("ask").addEventListener("submit", (event) => { event.preventDefault(); guarded(ask); });
  $("question").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); guarded(ask); }
  });
  $("stop").addEventListener("click", () => state.asking?.abort());
  $("clear").addEventListener("click", () => { state.asking?.abort(); state.turns = []; $("turns").replaceChildren(); });
  $("file").addEventListener("change", () => guarded(async () => {
    const [file] = $("file").files;
    if (file) await upload(file);
    $("file").value = "";
  }));
  const drop = $("drop");
  for (const kind of ["dragover", "dragleave", "drop"]) {
    drop.addEventListener(kind, (event) => { event.preventDefault(); drop.classList.toggle("over", kind === "dragover"); });
  }
  drop.addEventListener("drop", (event) => guarded(async () => {
    for (const file of event.dataTransfer.files) await upload(file);
  }));
  $("look").addEventListener("click", () => guarded(look));
  $("learn").addEventListener("click", () => guarded(learn));
  $("learning").addEventListener("change", () => guarded(async () => {
    await call("/v1/learning", { method: "PUT", json: { on: $("learning").checked } });
    await refresh();
  }));
  for (const verb of ["pause", "resume", "cancel"]) $(verb).addEventListener("click", turn(verb));
  $("forget").addEventListener("click", () => guarded(async () => {
    if (!await sure("Delete all files, conversations, jobs and versions from this server?")) return;
    await call("/v1/data", { method: "DELETE" });
    $("use").hidden = true;
    await refresh();
  }));
  $("key").addEventListener("submit", (event) => {
    event.preventDefault();
    state.key = $("key-value").value;
    sessionStorage.setItem("key", state.key);
    $("key").hidden = true;
    guarded(refresh);
  });
  const loop = async () => {
    if (!document.hidden) {
      try {
        await refresh();
      } catch (error) {
        $("state").textContent = `no connection: ${error.message}`;
      }
    }
    setTimeout(loop, 2000);
  };
  loop();
}

begin();
