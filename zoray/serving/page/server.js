// Requests to the server that this page comes from, with its key where it has one.
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
  // What is being asked for may not know of this change yet: shown, it would take a new upload back out of use.
  if (options.method) page.round += 1;
  if (response.ok) return options.raw ? response : response.json();
  let text = `${response.status} ${response.statusText}`;
  try { text = (await response.json()).error.message; } catch { /* not of our own making */ }
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
  if (!/^[\x21-\x7e]+$/.test(key)) { // of no header
    tellWrong("Keys have letters, digits and plain signs only.");
    return;
  }
  kept.key = key;
  sessionStorage.setItem("key", key);
  $("key-value").value = "";
  $("key").hidden = true;
  $("main").hidden = false;
}
