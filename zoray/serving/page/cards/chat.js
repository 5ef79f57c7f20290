// Chat with streaming, and the rating of answers.
import { $, button, choose, complain, element, say, thumb } from "./parts.js";
import { call, post, remove } from "./server.js";

const MOST_PARTS = 512; // of an answer, about as many tokens: a model that never ends is stopped
// At temperature 1 small models write nonsense, at low ones they repeat themselves; "another answer" must differ.
const SAMPLING = { temperature: 0.3, top_p: 0.9, frequency_penalty: 0.5 }, OTHER = { ...SAMPLING, temperature: 0.8 };
let turns = [];
let asking = null;

export function showModels(base, versions, live) {
  const names = ["live", base, ...versions], select = $("model");
  const text = (name) => (name === "live" ? `live (now ${live || base})` : name === base ? `${name} (base model)` : name);
  choose(select, names.map((name) => [name, text(name)]), names.includes(select.value) ? select.value : "live");
}

// Take back the ratings of conversations that have since been deleted.
const rated = new Set();
export function showKept(kept) {
  const ids = new Set(kept);
  for (const turn of rated) {
    if (turn.kept && !ids.has(turn.kept)) {
      turn.kept = turn.up = undefined;
      turn.mark();
    }
  }
}

function shownTurn(turn, mine) {
  const item = element("li", null, { class: mine ? "mine" : "waiting" });
  item.append(element("small", mine ? "You" : "…"), element("span", turn.content));
  $("turns").append(item);
  return item;
}

// The buttons below an answer: to rate it, and to get another. `before`: the messages that it answers.
function rating(talk, turn, item, before) {
  const row = element("div", null, { class: "row", role: "group", "aria-label": "Rate this answer" });
  const rate = (up) => async () => {
    if (turn.up === up) { // pressed again: taken back
      await remove(`/v1/conversations/${turn.kept}`);
      turn.kept = turn.up = undefined;
    } else {
      const messages = [...before, { role: "assistant", content: turn.content }];
      const kept = await post("/v1/conversations", { messages, up, model: turn.model, id: turn.kept });
      [turn.kept, turn.up] = [kept.id, up];
    }
    turn.mark();
  };
  for (const up of [true, false]) {
    const made = button("", rate(up), { class: "rate", "data-up": up });
    made.append(thumb(up), up ? "Good answer" : "Bad answer");
    row.append(made);
  }
  const again = button("Another answer", async () => {
    if (asking || talk !== turns || talk.at(-1) !== turn) return;
    talk.pop(); // the chat goes on from the next answer; this one stays visible, to be compared and rated
    row.firstChild.focus({ preventScroll: true });
    again.remove();
    if (await answer(talk, OTHER) || talk !== turns) return;
    talk.push(turn);
    row.append(again);
  }, { class: "rate again" });
  row.append(again);
  turn.mark = () => {
    for (const one of row.querySelectorAll("[data-up]")) one.setAttribute("aria-pressed", String(one.dataset.up === String(turn.up)));
  };
  turn.mark();
  rated.add(turn);
  item.append(row);
}

async function ask() {
  const text = $("question").value.trim(), talk = turns;
  if (!text || asking) return;
  complain("");
  $("question").value = "";
  $("welcome").hidden = true;
  $("turns").hidden = false;
  for (const old of document.querySelectorAll("#turns .again")) old.remove(); // only the last answer can have another
  const question = { role: "user", content: text };
  talk.push(question);
  const asked = shownTurn(question, true);
  if (await answer(talk, SAMPLING) || talk !== turns) return;
  talk.pop(); // drop the unanswered question
  asked.remove();
  $("question").value ||= text;
  if (!talk.length) clear();
}

function busy(own) {
  asking = own;
  $("send").setAttribute("aria-disabled", String(own !== null)); // `disabled` would take the focus away
  if (!own && document.activeElement === $("stop")) $("question").focus();
  $("stop").hidden = !own;
}

// Stream the next answer of a talk; returns whether there is one.
async function answer(talk, sampling) {
  const own = new AbortController(), turn = { role: "assistant", content: "", model: "" };
  const item = shownTurn(turn, false), log = $("turns"), messages = talk.map(({ role, content }) => ({ role, content }));
  busy(own);
  log.scrollTop = log.scrollHeight;
  let cut = "", failed = false;
  const slow = setTimeout(() => { item.children[0].textContent = "waiting: the server is starting, or busy"; }, 5000);
  try {
    const json = { model: $("model").value, messages, stream: true, ...sampling };
    const response = await call("/v1/chat/completions", { method: "POST", raw: true, signal: own.signal, json });
    let parts = 0;
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      clearTimeout(slow);
      const follows = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
      turn.model = event.model || turn.model;
      turn.content += event.choices?.[0]?.delta?.content || "";
      item.children[0].textContent = turn.model;
      item.children[1].textContent = turn.content;
      if (follows) log.scrollTop = log.scrollHeight;
      if ((parts += 1) > MOST_PARTS) {
        cut = ", cut because of its length";
        own.abort();
        break;
      }
    }
  } catch (error) {
    failed = true;
    cut = error.name === "AbortError" ? ", stopped" : ", broken off";
    if (error.name !== "AbortError" && !error.shown) {
      complain(error.message + (talk.length > 1 ? "\nIf the chat has become too long, start a new one." : ""));
    }
  }
  clearTimeout(slow);
  if (asking === own) busy(null);
  item.classList.remove("waiting");
  if (talk !== turns) return false; // a new chat was started in the meantime
  if (!turn.content) {
    item.remove();
    if (!failed) complain(`${turn.model || "The model"} gave an empty answer. Ask in other words, or choose another version.`);
    return false;
  }
  talk.push(turn);
  item.children[0].textContent = turn.model + cut;
  rating(talk, turn, item, messages);
  log.scrollTop = log.scrollHeight;
  say(`${turn.model} has answered${cut}: ${turn.content}`);
  return true;
}

function clear() {
  asking?.abort();
  busy(null);
  turns = [];
  rated.clear();
  $("turns").replaceChildren();
  $("turns").hidden = true;
  $("welcome").hidden = false;
}

// The events of a stream: `data: {...}` lines up to [DONE].
async function* events(response) {
  const reader = response.body.getReader(), decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + decoder.decode(value, { stream: true })).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ") || line.trim() === "data: [DONE]") continue;
      yield JSON.parse(line.slice(6));
    }
  }
}

export function begin() {
  const coarse = matchMedia("(pointer: coarse)"); // keyboards on a screen have no Shift+Enter
  $("ask").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
  $("question").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || coarse.matches) return;
    event.preventDefault();
    ask();
  });
  $("stop").addEventListener("click", () => { asking?.abort(); $("question").focus(); });
  $("clear").addEventListener("click", () => { clear(); complain(""); $("question").focus(); });
}
