// Pieces of the page. Text from models, files and people reaches it as text only, never as markup.

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

// A thumb, up or down: fonts with one are not on every machine.
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

// What a button does. Pressed again meanwhile, it does nothing; it keeps the focus, which `disabled` would take away.
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

// A message until it is dismissed or the next thing is done: news, or what went wrong.
export function tell(text, news = true) {
  $("alert").classList.toggle("news", news);
  $("alert").hidden = !text;
  $("alert-text").textContent = text;
}

// For those who listen to the page: what can be seen elsewhere on it. What is said at the same time is said together.
let saying = [];
export function say(text) {
  if (!saying.length) setTimeout(() => { [$("said").textContent, saying] = [saying.join(". "), []]; }, 50);
  saying.push(text);
}

// Do something that changes what the server has, then show that; what the server said before is not shown any more.
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
  page.refresh(); // not waited for: the next thing can be done meanwhile
}

// Ask before something is done for good.
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

const shown = new WeakMap(); // element -> what it was made of, as JSON

// Show items as an element's children. Only what has changed is made anew, and the focus stays where it was.
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

// Set a text only where it is another: a selection in it stays.
export function put(id, text) {
  if ($(id).textContent !== text) $(id).textContent = text;
}

// The options of a choice; the one chosen stays chosen while there is such a one.
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
