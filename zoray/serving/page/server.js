// Requests to the server that this page comes from, with its key if it has one.
import { $, page } from "./parts.js";

const kept = { key: sessionStorage.getItem("key") || "" };

export const locked = () => !$("key").hidden;

export async function call(path, options = {}) {
  const headers = { ...options.headers };
  if (kept.key) headers.Authorization = `Bearer ${kept.key}`;
  if (options.json !== undefined) {
    options.body = JSON.stringify(options.json);
    headers["Content-Type"] = "application/json";
  }
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer. Is it still running?");
  }
  // A state requested before this change may lack it: if shown, a new upload would be taken out of use again.
  if (options.method) page.round += 1;
  if (response.ok) return options.raw ? response : response.json();
  let text = `${response.status} ${response.statusText}`;
  try { text = (await response.json()).error.message; } catch { /* not one of zoray's errors */ }
  const error = Object.assign(new Error(text), { status: response.status });
  if (response.status === 401) {
    lock();
    error.shown = true;
  }
  throw error;
}

export const post = (path, json) => call(path, { method: "POST", json });
export const put = (path, json) => call(path, { method: "PUT", json });
export const remove = (path) => call(path, { method: "DELETE" });

// Hide the page behind the form for the key.
function lock() {
  if (locked()) return;
  tellWrong(kept.key && "The server does not take this key.");
  $("key").hidden = false;
  $("main").hidden = true;
  $("key-value").focus();
}

function tellWrong(text) {
  $("key-wrong").textContent = text;
  $("key-wrong").hidden = !text;
}

export function unlock(key) {
  if (!/^[\x21-\x7e]+$/.test(key)) { // no header can hold it
    tellWrong("A key has only letters, digits and plain signs.");
    return;
  }
  kept.key = key;
  sessionStorage.setItem("key", key);
  $("key-value").value = "";
  $("key").hidden = true;
  $("main").hidden = false;
}
