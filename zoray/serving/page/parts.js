// Parts of the page. Text from models, files and people reaches it as text only, never as markup.

export const $ = (id) => document.getElementById(id);
export const page = { busy: 0, round: 0, refresh: async () => {} };

export function element(tag, text, attributes = {}) {
  const made = document.createElement(tag);
  if (text !== undefined && text !== null) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

export function drawn(tag, attributes = {}, text = undefined) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

// A thumb, up or down: not every machine has a font with one.
export function thumb(up) {
  const svg = drawn("svg", { viewBox: "0 0 24 24", class: up ? "thumb" : "thumb down", "aria-hidden": "true" });
  svg.append(drawn("path", { d: "M2 10h4v11H2zM8 21V10l5-8c1.7 0 2.6 1.3 2.2 2.9L14.2 9H20c1.3 0 2.2 1.1 2 2.4l-1.3 7.8A2 2 0 0 1 18.7 21z" }));
  return svg;
}

export function button(text, does, attributes = {}) {
  const made = element("button", text, { type: "button", ...attributes });
  acts(made, does);
  return made;
}

// Bind a button's action. While it runs, further presses do nothing; `disabled` would take the focus away.
export function acts(on, does) {
  let going = false;
  on.addEventListener("click", async () => {
    if (going) return;
    going = true;
    const slow = setTimeout(() => { on.setAttribute("aria-busy", "true"); say("Still at work"); }, 1000);
    try {
      await guarded(does);
    } finally {
      clearTimeout(slow);
      on.removeAttribute("aria-busy");
      going = false;
    }
  });
}

export function complain(text) {
  tell(text, false);
}

// Show a message, news or an error, until it is dismissed or the next action begins.
export function tell(text, news = true) {
  $("alert").classList.toggle("news", news);
  $("alert").hidden = !text;
  $("alert-text").textContent = text;
}

// Announce to screen readers what others see elsewhere on the page. Simultaneous texts are joined.
let saying = [];
export function say(text) {
  if (!saying.length) setTimeout(() => { [$("said").textContent, saying] = [saying.join(". "), []]; }, 50);
  saying.push(text);
}

// Run an action that changes the server's state, then show the new state; earlier answers are no longer shown.
export async function guarded(does) {
  page.busy += 1;
  page.round += 1;
  tell("");
  try {
    await does();
  } catch (error) {
    if (error.name !== "AbortError" && !error.shown) complain(error.message);
  } finally {
    page.busy -= 1;
  }
  page.refresh(); // not awaited: the next action need not wait for it
}

// Ask for confirmation before something irreversible.
export function sure(text, yes = "Delete") {
  return new Promise((resolve) => {
    const dialog = $("sure");
    $("sure-text").textContent = text;
    $("sure-yes").textContent = yes;
    dialog.returnValue = "no";
    dialog.onclose = () => resolve(dialog.returnValue === "yes");
    dialog.showModal();
  });
}

const shown = new WeakMap(); // element -> the item it was made from, as JSON

// Show items as an element's children. Only changed items are made again, and the focus stays where it was.
export function list(parent, items, key, make) {
  const old = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  const focused = parent.contains(document.activeElement) ? document.activeElement : null;
  const at = focused ? [...parent.children].findIndex((child) => child.contains(focused)) : -1;
  const label = focused?.getAttribute("aria-label");
  const wanted = items.map((item) => {
    const json = JSON.stringify(item), had = old.get(String(key(item)));
    if (had && shown.get(had) === json) return had;
    const made = make(item);
    made.dataset.key = key(item);
    shown.set(made, json);
    const was = had?.querySelector("details[open]"), now = made.querySelector("details");
    if (was && now) now.open = true;
    return made;
  });
  for (const child of [...parent.children]) if (!wanted.includes(child)) child.remove();
  wanted.forEach((child, place) => {
    if (parent.children[place] !== child) parent.insertBefore(child, parent.children[place] || null);
  });
  if (!focused || parent.contains(document.activeElement)) return;
  const buttons = [...parent.querySelectorAll("button, summary")];
  const next = buttons.find((one) => label && one.getAttribute("aria-label") === label) ||
    parent.children[Math.min(at, parent.children.length - 1)]?.querySelector("button, summary") ||
    parent.closest("section")?.querySelector("h2");
  next?.focus({ preventScroll: true });
}

// Set a text only if it differs, so that a selection in it stays.
export function put(id, text) {
  if ($(id).textContent !== text) $(id).textContent = text;
}

// Set the options of a choice; the chosen one stays chosen as long as it exists.
export function choose(select, options, chosen) {
  list(select, options, ([value]) => value, ([value, text]) => element("option", text, { value }));
  if (select.value !== chosen) select.value = chosen;
}

export function size(bytes) {
  if (bytes < 1000) return `${bytes} bytes`;
  return bytes < 1e6 ? `${(bytes / 1e3).toFixed(1)} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
}

export function count(number, one, many = `${one}s`) {
  return `${number} ${number === 1 ? one : many}`;
}

export function when(seconds) {
  const date = new Date(seconds * 1000), today = new Date().toDateString() === date.toDateString();
  return today ? date.toLocaleTimeString() : date.toLocaleString();
}
