// Chat with streaming, and the rating of answers.
import { $, button, choose, complain, element, say, thumb } from "./parts.js";
import { call, post, remove } from "./server.js";

const MOST_PARTS = 512; // of an answer, about as many tokens: a model that never ends is stopped
let turns = [];
let asking = null;

export function showModels(names, live) {
  const [base] = names, select = $("model");
  const text = (name) => (name === "live" ? `live (now ${live || base})` : name === base ? `${name} (base model)` : name);
  const order = ["live", ...names.filter((name) => name !== "live")];
  const chosen = names.includes(select.value) ? select.value : "live";
  choose(select, order.map((name) => [name, text(name)]), chosen);
}

// Ratings of conversations that have been deleted meanwhile are taken back.
export function showKept(conversations) {
  const ids = new Set(conversations.map((one) => one.id));
  for (const turn of turns) {
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

function rating(talk, turn, item) {
  const row = element("div", null, { class: "row", role: "group", "aria-label": "Rate this answer" });
  const rate = (up) => async () => {
    if (turn.up === up) { // pressed again: taken back
      await remove(`/v1/conversations/${turn.kept}`);
      turn.kept = turn.up = undefined;
    } else {
      const messages = talk.slice(0, talk.indexOf(turn) + 1).map(({ role, content }) => ({ role, content }));
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
  turn.mark = () => {
    for (const one of row.children) one.setAttribute("aria-pressed", String(one.dataset.up === String(turn.up)));
  };
  turn.mark();
  item.append(row);
}

async function ask() {
  const text = $("question").value.trim(), talk = turns;
  if (!text || asking) return;
  const own = new AbortController();
  asking = own;
  complain("");
  $("question").value = "";
  $("welcome").hidden = true;
  $("turns").hidden = false;
  const question = { role: "user", content: text }, turn = { role: "assistant", content: "", model: "" };
  talk.push(question);
  const asked = shownTurn(question, true), item = shownTurn(turn, false), log = $("turns");
  log.scrollTop = log.scrollHeight;
  $("send").disabled = true;
  $("stop").hidden = false;
  let cut = "";
  const slow = setTimeout(() => { item.children[0].textContent = "waiting: a server that has just been started needs a while"; }, 5000);
  try {
    const messages = talk.map(({ role, content }) => ({ role, content }));
    // At temperature 1 small models write nonsense, at low ones they repeat themselves.
    const json = { model: $("model").value, messages, stream: true, temperature: 0.3, top_p: 0.9, frequency_penalty: 0.5 };
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
    if (error.name === "AbortError") cut = ", stopped";
    else if (!error.shown) complain(error.message + (talk.length > 1 ? "\nIf the chat has become too long, begin a new one." : ""));
  }
  clearTimeout(slow);
  if (asking === own) {
    asking = null;
    $("send").disabled = false;
    $("stop").hidden = true;
  }
  item.classList.remove("waiting");
  if (talk !== turns) return; // a new chat has been begun meanwhile
  if (turn.content) {
    talk.push(turn);
    item.children[0].textContent = turn.model + cut;
    rating(talk, turn, item);
    log.scrollTop = log.scrollHeight;
    say(`${turn.model} has answered: ${turn.content}`);
  } else { // as if it had not been asked
    talk.pop();
    asked.remove();
    item.remove();
    $("question").value ||= text;
    if (!talk.length) clear();
  }
}

function clear() {
  asking?.abort();
  asking = null;
  turns = [];
  $("turns").replaceChildren();
  $("turns").hidden = true;
  $("welcome").hidden = false;
  $("send").disabled = false;
  $("stop").hidden = true;
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
  $("ask").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
  $("question").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); ask(); }
  });
  $("stop").addEventListener("click", () => { asking?.abort(); $("question").focus(); });
  $("clear").addEventListener("click", () => { clear(); complain(""); $("question").focus(); });
}
