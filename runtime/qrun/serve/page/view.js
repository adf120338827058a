// From conversations to nodes. What a model or a user wrote becomes markup only through DOMPurify.
const TAGS = ("a b blockquote br code del em h1 h2 h3 h4 h5 h6 hr i li ol p pre s span strong sub sup " +
  "table tbody td th thead tr ul").split(" ");

// HTML in an answer is shown as text, as the model wrote it. If this failed, the sanitiser would still remove it.
const ESCAPED = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" };
globalThis.marked?.use({ renderer: { html: ({ text }) => text.replace(/[&<>"]/g, (each) => ESCAPED[each]) } });

/** An element with properties and children; strings become text nodes. */
export function make(tag, properties = {}, ...children) {
  const found = Object.assign(document.createElement(tag), properties);
  found.append(...children);
  return found;
}

function button(text, label, click) {
  const found = make("button", { type: "button", className: "quiet small", onclick: click }, text);
  found.setAttribute("aria-label", label);
  return found;
}

async function copy(text, pressed) {
  try {
    await navigator.clipboard.writeText(text);
    pressed.textContent = "Copied";
  } catch {
    pressed.textContent = "Not allowed";
  }
  setTimeout(() => { pressed.textContent = "Copy"; }, 1500);
}

function copier(label, text) {
  const found = button("Copy", label, () => copy(text(), found));
  return found;
}

/** Markdown as nodes that load nothing and run nothing. */
export function markdown(text) {
  const nodes = DOMPurify.sanitize(marked.parse(text, { gfm: true, breaks: true }), {
    ALLOWED_TAGS: TAGS,
    ALLOWED_ATTR: ["href", "title", "start", "align"],
    ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
    ADD_URI_SAFE_ATTR: ["start", "align"], // every other value must be such an address
    ALLOW_DATA_ATTR: false,
    ALLOW_ARIA_ATTR: false,
    RETURN_DOM_FRAGMENT: true,
  });
  for (const link of nodes.querySelectorAll("a")) Object.assign(link, { target: "_blank", rel: "noopener noreferrer" });
  for (const pre of nodes.querySelectorAll("pre")) {
    const box = make("div", { className: "code" });
    pre.tabIndex = 0; // a long line can be scrolled by keyboard
    pre.replaceWith(box);
    box.append(copier("Copy code", () => pre.textContent), pre);
  }
  return nodes;
}

/** The figures below an answer. */
export function figures(message) {
  if (message.error) return message.error;
  const found = [];
  if (message.tokens) found.push(`${message.tokens} tokens`);
  if (message.tokens > 1 && message.seconds > 0) {
    found.push(`${((message.tokens - 1) / message.seconds).toFixed(1)} tokens/s`);
  }
  if (message.finish === "stopped") found.push("stopped");
  // Kept while it came, in another tab or before the page was loaded again.
  if (message.role === "assistant" && !message.finish) found.push("not complete");
  if (message.finish === "length") found.push("cut off at the most tokens");
  return found.join(" · ");
}

/** What a model has thought before its answer, and the answer: `over` where it thinks no more. */
export function parts(content) {
  const end = content.indexOf("</think>");
  const begins = content.trimStart().startsWith("<think>");
  if (!begins && end < 0) return { thought: "", text: content, over: true };
  const start = begins ? content.indexOf("<think>") + "<think>".length : 0; // some templates begin it themselves
  if (end < 0) return { thought: content.slice(start).trim(), text: "", over: false };
  return { thought: content.slice(start, end).trim(), text: content.slice(end + "</think>".length).trimStart(), over: true };
}

function thinking(thought, over, open) {
  const found = make("details", { className: "thought" },
    make("summary", {}, over ? "Thoughts" : "Thinking…"), make("div", {}, thought));
  found.open = open ?? false;
  return found;
}

/** Fill in an answer's text and figures, also while it comes. */
export function fill(item, message) {
  const body = item.querySelector(".body");
  if (message.role === "assistant") {
    const open = body.querySelector(".thought")?.open;
    const { thought, text, over } = parts(message.content);
    body.replaceChildren(...(thought ? [thinking(thought, over, open)] : []), markdown(text));
  } else body.textContent = message.content;
  const foot = item.querySelector(".figures");
  foot.textContent = figures(message);
  foot.classList.toggle("wrong", Boolean(message.error));
}

/** One message with its buttons; `act` has `edit(index, text)` and `again()`. */
export function messageItem(message, index, last, act) {
  const user = message.role === "user";
  const body = make("div", { className: "body" });
  const tools = make("div", { className: "tools" }, make("span", { className: "figures faint" }));
  const name = make("h2", { className: "hidden" }, user ? "You" : "Answer");
  const item = make("li", { className: message.role }, name, body, tools);
  tools.append(copier(user ? "Copy message" : "Copy answer", () => message.content));
  if (user) tools.append(button("Edit", "Edit message", () => editing(item, message, index, act)));
  else if (last) tools.append(button("Regenerate", "Regenerate answer", () => act.again()));
  fill(item, message);
  return item;
}

function editing(item, message, index, act) {
  const area = make("textarea", { value: message.content, rows: Math.min(8, message.content.split("\n").length + 1) });
  area.setAttribute("aria-label", "Edited message");
  const send = () => area.value.trim() && act.edit(index, area.value.trim());
  const close = () => act.redraw(index);
  area.onkeydown = (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
    if (event.key === "Escape") { event.stopPropagation(); close(); }
  };
  const row = make("div", { className: "row" },
    make("button", { type: "button", className: "primary", onclick: send }, "Resend"),
    make("button", { type: "button", onclick: close }, "Cancel"));
  item.classList.add("editing");
  item.replaceChildren(area, row);
  area.focus();
}

/** The list of conversations. */
export function chatItems(chats, current, open, remove) {
  return chats.map((chat) => {
    const name = make("button", { type: "button", className: "quiet name", onclick: () => open(chat) }, chat.title);
    if (chat.id === current) name.setAttribute("aria-current", "true");
    return make("li", {}, name, button("×", `Delete ${chat.title}`, () => remove(chat)));
  });
}
