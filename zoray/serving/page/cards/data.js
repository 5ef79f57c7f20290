// Files: upload by choosing or dropping, preview of their use, and the start of a job.
import { $, acts, button, complain, element, guarded, list, put, say, size, sure, tell } from "./parts.js";
import { call, post, remove } from "./server.js";
import { follow } from "./learning.js";

const FIELDS = ["template", "columns", "words"];
let chosen = null;
let had = null; // whether there were files
let looked = 0; // number of the latest preview, the only one that counts
let seen = ""; // the settings that the preview shows

export function showFiles(files) {
  if (chosen && !files.some((file) => file.id === chosen.id)) {
    chosen = null;
    $("use").hidden = true;
  }
  if (had !== Boolean(files.length)) { // open while there are no files
    had = Boolean(files.length);
    $("forms").open = !had;
  }
  list($("files"), files.map((file) => ({ ...file, chosen: file.id === chosen?.id })), (file) => file.id, (file) => {
    const item = element("li", null, file.chosen ? { class: "chosen" } : {});
    const row = element("span", null, { class: "acts" });
    row.append(
      button("Use", () => use(file), { class: "quiet", "aria-label": `Use ${file.filename}`, "aria-pressed": file.chosen }),
      button("Download", () => download(file), { class: "quiet", "aria-label": `Download ${file.filename}` }),
      button("Delete", async () => {
        if (await sure(`Delete ${file.filename}? Jobs that learn from it are ended.`)) await remove(`/v1/files/${file.id}`);
      }, { class: "danger", "aria-label": `Delete ${file.filename}` }),
    );
    const name = element("span", `${file.filename} `);
    name.append(element("small", size(file.bytes)));
    item.append(name, row);
    return item;
  });
}

// A link would not carry the key.
async function download(file) {
  const response = await call(`/v1/files/${file.id}/content`, { raw: true });
  const link = element("a", null, { href: URL.createObjectURL(await response.blob()), download: file.filename });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

async function upload(files) {
  const refused = [];
  let last = null;
  for (const file of files) {
    const form = new FormData();
    form.append("purpose", "fine-tune");
    form.append("file", file);
    try {
      await file.slice(0, 1).arrayBuffer().catch(() => { throw new Error("it is a folder, or can't be read"); });
      last = await call("/v1/files", { method: "POST", body: form });
    } catch (error) {
      if (error.shown) throw error;
      refused.push(`${file.name} was not taken: ${error.message}`);
    }
  }
  if (last) await use(last);
  if (refused.length) throw new Error(refused.join("\n"));
}

export async function use(file) {
  if (file.id !== chosen?.id) {
    for (const id of FIELDS) $(id).value = "";
    $("as-chat").checked = false;
  }
  chosen = file;
  $("use-title").textContent = `How ${file.filename} will be used`;
  $("use").hidden = false;
  await look();
}

// name=value pairs, whose values may have spaces: "text=Email body, label=kind".
function pairs(id, example) {
  return $(id).value.split(/,|\s+(?=\w+\s*[=:])/).map((part) => part.trim()).filter(Boolean).map((part) => {
    const [, name, value] = part.match(/^([^=:]+?)\s*[=:]\s*(.+)$/) || [];
    if (!name) throw new Error(`Expected ${example}; got ${part}`);
    return [name, value];
  });
}

// The settings in the fields.
function how() {
  const found = {}, template = $("template").value.trim().replaceAll("\\n", "\n");
  if (template) found.template = template;
  for (const [name, value] of pairs("columns", "columns such as text=body, label=category")) {
    found[name === "kind" ? "kind" : `${name.replace(/_column$/, "")}_column`] = value;
  }
  for (const [label, word] of pairs("words", "words such as 0=bad, 1=good")) (found.words ??= {})[label] = ` ${word}`;
  if ($("as-chat").checked) found.chat = true;
  return found;
}

function wrong(text) {
  put("wrong", text);
  $("wrong").hidden = !text;
}

async function look() {
  const own = (looked += 1);
  wrong("");
  seen = "";
  $("preview").textContent = "Reading the file …";
  $("preview").hidden = false;
  $("learn").disabled = true;
  try {
    const settings = how(), { lines } = await post(`/v1/files/${chosen.id}/preview`, settings);
    if (own !== looked) return;
    $("preview").replaceChildren(...lines.flatMap((line) => [...marked(line), "\n"]));
    $("learn").disabled = false;
    seen = JSON.stringify(settings);
    say(lines[0]);
  } catch (error) {
    if (own !== looked) return;
    $("preview").hidden = true;
    wrong(`It cannot be used like this: ${error.message}`);
  }
}

// The text that is trained, or the options, stand between » and «.
function marked(line) {
  const kind = /^\s*or, wrong:/.test(line) ? { class: "wrong" } : {};
  return line.split(/(».*?«)/).map((part) => (/^».*«$/.test(part) ? element("mark", part, kind) : part));
}

async function learn() {
  if (JSON.stringify(how()) !== seen) {
    await look();
    tell("The settings have changed since the preview. It shows how the file would be used now: press Learn from it again.");
    return;
  }
  const steps = $("steps").value.trim();
  if (steps && !/^[1-9]\d*$/.test(steps)) throw new Error(`Expected a whole number of steps; got ${steps}`);
  const stem = chosen.filename.replace(/\.\w+$/, "").toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "").slice(0, 22);
  const now = new Date(), two = (number) => String(number).padStart(2, "0");
  const stamp = `${two(now.getMonth() + 1)}${two(now.getDate())}-${two(now.getHours())}${two(now.getMinutes())}${two(now.getSeconds())}`;
  const json = { training_file: chosen.id, suffix: stem ? `${stem}-${stamp}` : `job-${stamp}`, use: how() };
  if (steps) json.hyperparameters = { steps: Number(steps) };
  const { id } = await post("/v1/fine_tuning/jobs", json);
  follow(id);
  tell(`${id} will learn from ${chosen.filename}. ${$("learning").checked ? "Its curves are below, under Learning." : "It waits until active learning is on."}`);
}

export function begin() {
  $("file").addEventListener("change", () => guarded(async () => {
    const files = [...$("file").files];
    $("file").value = "";
    await upload(files);
  }));
  // A file may be dropped anywhere: next to the field, a browser would leave the page and open it.
  for (const kind of ["dragover", "dragleave", "drop"]) {
    addEventListener(kind, (event) => { event.preventDefault(); $("drop").classList.toggle("over", kind === "dragover"); });
  }
  addEventListener("drop", (event) => {
    const files = [...event.dataTransfer.files];
    if (files.length) guarded(() => upload(files));
    else complain("Only files can be dropped here.");
  });
  for (const id of FIELDS) {
    $(id).addEventListener("keydown", (event) => { if (event.key === "Enter") guarded(look); });
  }
  $("as-chat").addEventListener("change", () => guarded(look));
  acts($("look"), look);
  acts($("learn"), learn);
}
