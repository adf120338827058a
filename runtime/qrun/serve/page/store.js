// Conversations, each under a key of its own, so that two tabs do not overwrite each other's.
const PREFIX = "qrun.chat.";
const MOST_CHATS = 100;
const MOST_CHARACTERS = 4_000_000;

function keys() {
  return Object.keys(localStorage).filter((key) => key.startsWith(PREFIX));
}

/** All conversations, the newest first. */
export function all() {
  const found = [];
  for (const key of keys()) {
    try {
      const chat = JSON.parse(localStorage.getItem(key));
      if (typeof chat.id === "string" && Array.isArray(chat.messages)) found.push(chat);
    } catch { /* an entry of another program */ }
  }
  return found.sort((a, b) => b.changed - a.changed);
}

/** Keep a conversation; where there is no room, throws an Error whose message can be shown. */
export function save(chat) {
  const key = PREFIX + chat.id;
  const text = JSON.stringify(chat);
  const others = keys().filter((each) => each !== key);
  const size = others.reduce((sum, each) => sum + localStorage.getItem(each).length, text.length);
  const full = "The browser keeps no more conversations: delete some, or this one is gone when the page is closed.";
  if (others.length >= MOST_CHATS || size > MOST_CHARACTERS) throw new Error(full);
  try { localStorage.setItem(key, text); } catch { throw new Error(full); }
}

export function remove(id) {
  localStorage.removeItem(PREFIX + id);
}

/** A new conversation; it is kept once it has a message. */
export function create() {
  const id = Array.from(crypto.getRandomValues(new Uint8Array(8)), (b) => b.toString(16).padStart(2, "0")).join("");
  return { id, title: "New chat", system: "", changed: Date.now(), messages: [] };
}

export function sampling() {
  try { return JSON.parse(localStorage.getItem("qrun.sampling")) ?? {}; } catch { return {}; }
}

export function saveSampling(values) {
  localStorage.setItem("qrun.sampling", JSON.stringify(values));
}
