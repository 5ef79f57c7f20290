// The stored data, and their deletion.
import { $, acts, button, count, element, list, put, size, sure, thumb } from "./parts.js";
import { post, remove } from "./server.js";
import { use } from "./data.js";

export function showStored(files, { ids, latest }, jobs, versions, folder) {
  const total = size(files.reduce((sum, file) => sum + file.bytes, 0));
  const parts = [
    `${count(files.length, "file")}${files.length ? ` (${total})` : ""}`, count(ids.length, "rated conversation"),
    count(jobs.length, "job"), count(versions.length, "version"),
  ];
  const nothing = !files.length && !ids.length && !jobs.length && !versions.length;
  put("stored", nothing ? `Nothing. What you upload or rate is kept in ${folder} on the server, and nowhere else.` : `${parts.join(", ")}, all in ${folder} on the server, and nowhere else.${ids.length > latest.length ? ` Below are the last ${latest.length} conversations.` : ""}`);
  $("forget").hidden = nothing;
  $("to-file").hidden = !ids.length;
  list($("conversations"), latest, (one) => one.id, conversation);
}

function conversation(one) {
  const item = element("li"), whole = element("details"), summary = element("summary");
  const question = one.messages.findLast((message) => message.role === "user")?.content || "";
  const brief = question.length > 60 ? `${question.slice(0, 60)}…` : question;
  summary.append(thumb(one.up), ` ${brief} `, element("small", `${one.up ? "good" : "bad"} answer of ${one.model || "a model"}`));
  const names = { user: "You", assistant: one.model || "Answer", system: "System" };
  whole.append(summary, ...one.messages.map(({ role, content }) => {
    const said = element("p", content, { class: "said" });
    said.prepend(element("small", `${names[role] || role}\n`));
    return said;
  }));
  item.append(whole, button("Delete", () => remove(`/v1/conversations/${one.id}`), { class: "danger", "aria-label": `Delete the conversation: ${brief}` }));
  return item;
}

export function begin() {
  acts($("to-file"), async () => {
    await use(await post("/v1/conversations/file"));
    $("use-title").focus();
  });
  acts($("forget"), async () => {
    if (!await sure("Delete all files, conversations, jobs and versions from the server? The base model answers from then on.", "Delete everything")) return;
    await remove("/v1/data");
    $("stored-title").focus();
  });
}
