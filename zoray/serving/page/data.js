// Files: upload by choice or by dropping, how they will be used, and the start of a job.
import { $, acts, button, complain, element, guarded, list, put, size, sure, tell } from "./parts.js";
import { call, post, remove } from "./server.js";
import { follow } from "./learning.js";

let chosen = null;
let looked = 0; // a preview that has been asked for later is the one that counts

export function showFiles(files) {
  if (chosen && !files.some((file) => file.id === chosen.id)) {
    chosen = null;
    $("use").hidden = true;
  }
  list($("files"), files.map((file) => ({ ...file, chosen: file.id === chosen?.id })), (file) => file.id, (file) => {
    const item = element("li", null, file.chosen ? { class: "chosen" } : {});
    const row = element("span", null, { class: "acts" });
    row.append(
      button("Use", () => use(file), { class: "quiet", "aria-label": `Use ${file.filename}`, "aria-pressed": file.chosen }),
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

async function upload(files) {
  for (const file of files) {
    const form = new FormData();
    form.append("purpose", "fine-tune");
    form.append("file", file);
    let kept;
    try {
      kept = await call("/v1/files", { method: "POST", body: form });
    } catch (error) {
      if (error.shown) throw error;
      throw new Error(`${file.name} was not taken: ${error.message}`);
    }
    await use(kept);
  }
}

export async function use(file) {
  if (file.id !== chosen?.id) $("template").value = $("columns").value = "";
  chosen = file;
  $("use-title").textContent = `How ${file.filename} will be used`;
  $("use").hidden = false;
  await look();
}

// The settings that the two fields stand for.
function how() {
  const found = {}, template = $("template").value.trim();
  if (template) found.template = template;
  for (const part of $("columns").value.split(/[,\s]+/).filter(Boolean)) {
    const [, name, column] = part.match(/^(\w+?)(?:_column)?[=:](.+)$/) || [];
    if (!name) throw new Error(`Expected columns such as text=body, label=category; got ${part}`);
    found[`${name}_column`] = column;
  }
  return found;
}

function wrong(text) {
  put("wrong", text);
  $("wrong").hidden = !text;
}

async function look() {
  const own = (looked += 1);
  wrong("");
  $("preview").textContent = "Reading the file …";
  $("preview").hidden = false;
  $("learn").disabled = true;
  try {
    const { lines } = await post(`/v1/files/${chosen.id}/preview`, how());
    if (own !== looked) return;
    $("preview").replaceChildren(...lines.flatMap((line) => [...marked(line), "\n"]));
    $("learn").disabled = false;
  } catch (error) {
    if (own !== looked) return;
    $("preview").hidden = true;
    wrong(`It cannot be used like this: ${error.message}`);
  }
}

// What is trained, or chosen among, stands between » and «.
function marked(line) {
  const kind = /^\s*or, wrong:/.test(line) ? { class: "wrong" } : {};
  return line.split(/(».*?«)/).map((part) => (/^».*«$/.test(part) ? element("mark", part, kind) : part));
}

async function learn() {
  const stem = chosen.filename.replace(/\.\w+$/, "").toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "").slice(0, 22);
  const now = new Date(), two = (number) => String(number).padStart(2, "0");
  const stamp = `${two(now.getMonth() + 1)}${two(now.getDate())}-${two(now.getHours())}${two(now.getMinutes())}${two(now.getSeconds())}`;
  const json = { training_file: chosen.id, suffix: stem ? `${stem}-${stamp}` : `job-${stamp}`, use: how() };
  const { id } = await post("/v1/fine_tuning/jobs", json);
  follow(id);
  tell(`${id} is to learn from ${chosen.filename}. ${$("learning").checked ? "Its curves are below, under Learning." : "It waits until active learning is on."}`);
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
  for (const id of ["template", "columns"]) {
    $(id).addEventListener("keydown", (event) => { if (event.key === "Enter") guarded(look); });
  }
  acts($("look"), look);
  acts($("learn"), learn);
}
