// The chat page: what is shown, what is asked, what is kept.
import * as api from "./api.js";
import * as store from "./store.js";
import { chatItems, fill, make, messageItem } from "./view.js";

const $ = (id) => document.getElementById(id);
const SAMPLING = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"];
let chat = store.create();
let running = null; // the AbortController of the answer that is coming

function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

function keep(kept = chat) {
  if (kept.removed) return;
  kept.changed = Date.now();
  try { store.save(kept); } catch (error) { notice(error.message); }
  drawChats();
}

function drawChats() {
  $("chats").replaceChildren(...chatItems(store.all(), chat.id, open, remove));
}

function draw() {
  const items = chat.messages.map((each, i) => messageItem(each, i, i === chat.messages.length - 1, actions));
  const hint = make("li", { className: "empty" }, "What would you like to know?");
  $("log").replaceChildren(...(items.length ? items : [hint]));
  document.title = chat.messages.length ? `${chat.title} - qrun` : "qrun";
  drawChats();
}

const actions = {
  again() {
    if (running) return;
    if (chat.messages.at(-1).role === "assistant") chat.messages.pop();
    answer();
  },
  edit(index, text) {
    if (running) return;
    chat.messages.splice(index, Infinity, { role: "user", content: text });
    answer();
  },
  redraw(index) {
    draw();
    $("log").children[index]?.querySelector("[aria-label='Edit message']")?.focus();
  },
};

function open(other) {
  running?.abort();
  chat = other;
  notice("");
  showMenu(false);
  draw();
  $("log").lastElementChild.scrollIntoView({ block: "end" });
  $("input").focus();
}

function remove(other) {
  if (!confirm(`Delete "${other.title}"?`)) return;
  store.remove(other.id);
  if (other.id === chat.id) {
    chat.removed = true; // an answer that is still coming would keep it again
    open(store.create());
  }
  else drawChats();
}

function send() {
  const text = $("input").value.trim();
  if (!text || running) return;
  if (!chat.messages.length) chat.title = text.length > 48 ? `${text.slice(0, 47)}…` : text;
  chat.messages.push({ role: "user", content: text });
  $("input").value = "";
  grow();
  answer();
}

function asked() {
  const messages = chat.messages.filter((each) => each.content).map(({ role, content }) => ({ role, content }));
  if (chat.system) messages.unshift({ role: "system", content: chat.system });
  return { model: $("model").value, messages, ...store.sampling() };
}

async function answer() {
  const own = chat; // another conversation may be opened before this answer ends
  const body = asked();
  const message = { role: "assistant", content: "" };
  own.messages.push(message);
  running = new AbortController();
  const { signal } = running;
  notice("");
  keep();
  draw();
  busy(true);
  const item = $("log").lastElementChild;
  item.classList.add("coming");
  item.scrollIntoView({ block: "end" });
  let timer = 0;
  let first = 0;
  let kept = Date.now();
  const show = () => {
    timer = 0;
    if (Date.now() - kept > 1000) { // what has come is there after a reload
      kept = Date.now();
      keep(own);
    }
    if (own !== chat) return;
    const log = $("log");
    const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
    fill(item, message);
    if (atEnd) log.scrollTop = log.scrollHeight;
  };
  try {
    for await (const chunk of api.chat(body, signal)) {
      const choice = chunk.choices[0];
      if (choice?.delta.content) {
        first ||= performance.now();
        message.seconds = (performance.now() - first) / 1000;
        message.content += choice.delta.content;
        timer ||= setTimeout(show, 60); // rendering Markdown again for each token would be slow
      }
      if (choice?.finish_reason) message.finish = choice.finish_reason;
      if (chunk.usage) message.tokens = chunk.usage.completion_tokens;
    }
  } catch (error) {
    if (error.name === "AbortError") message.finish = "stopped";
    else message.error = error.message;
    if (error.status === 401) openSettings("key");
  }
  clearTimeout(timer);
  message.finish ??= "stopped";
  keep(own);
  if (running?.signal === signal) running = null;
  if (own === chat) {
    draw();
    $("log").scrollTop = $("log").scrollHeight;
  }
  if (!running) busy(false);
  $("status").textContent = message.error ?? (message.finish === "stopped" ? "Stopped." : "The answer is complete.");
}

function busy(on) {
  const focused = document.activeElement === $("stop") || document.activeElement === document.body;
  $("stop").hidden = !on;
  $("send").hidden = on;
  $("log").setAttribute("aria-busy", String(on));
  if (on) $("status").textContent = "The answer is coming.";
  if (focused && !$("settings").open) $("input").focus();
}

/** As high as its text is, wrapped lines included; the style sheet says how high at most. */
function grow() {
  const input = $("input");
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight + input.offsetHeight - input.clientHeight}px`;
}

function showMenu(on) {
  document.body.classList.toggle("menu", on);
  $("menu").setAttribute("aria-expanded", String(on));
}

function openSettings(focus = "system") {
  $("system").value = chat.system;
  $("key").value = api.key();
  const values = store.sampling();
  for (const name of SAMPLING) $("settings-form").elements[name].value = values[name] ?? "";
  if (!$("settings").open) $("settings").showModal();
  $(focus).focus();
}

function saveSettings(event) {
  event.preventDefault();
  chat.system = $("system").value.trim();
  const values = {};
  for (const name of SAMPLING) {
    const text = $("settings-form").elements[name].value;
    if (text !== "") values[name] = Number(text);
  }
  try { store.saveSampling(values); } catch { notice("The browser keeps no settings."); }
  api.setKey($("key").value.trim());
  if (chat.messages.length) keep();
  $("settings").close();
  loadModels();
}

async function loadModels() {
  try {
    const before = $("model").value || localStorage.getItem("qrun.model");
    const found = await api.models();
    $("model").replaceChildren(...found.map(({ id }) => make("option", { value: id }, id)));
    if (found.some(({ id }) => id === before)) $("model").value = before;
    notice("");
  } catch (error) {
    notice(error.message);
    if (error.status === 401) openSettings("key");
  }
}

$("composer").onsubmit = (event) => { event.preventDefault(); send(); };
$("input").oninput = grow;
$("input").onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
};
$("stop").onclick = () => running?.abort();
$("new").onclick = () => open(store.create());
$("menu").onclick = () => showMenu(!document.body.classList.contains("menu"));
$("model").onchange = () => localStorage.setItem("qrun.model", $("model").value);
$("open-settings").onclick = () => openSettings();
$("cancel-settings").onclick = () => $("settings").close();
$("settings-form").onsubmit = saveSettings;
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || $("settings").open) return;
  running?.abort();
  if (document.body.classList.contains("menu")) { showMenu(false); $("menu").focus(); }
});
addEventListener("storage", () => { // another tab has changed something
  const theirs = store.all().find((each) => each.id === chat.id);
  if (theirs && !running && theirs.changed > chat.changed) {
    chat = theirs;
    draw();
  } else drawChats();
});
addEventListener("resize", grow);

const newest = store.all()[0];
if (newest) chat = newest;
draw();
$("log").scrollTop = $("log").scrollHeight;
$("input").focus();
loadModels();
