// The chat page: what is shown, and what buttons do.

import { ApiError, chat, get } from "./api.js";
import { begin, current, remove, save, store } from "./store.js";
import { markdown } from "./markdown.js";
import { watch } from "./cluster.js";

const $ = (id) => document.getElementById(id);
const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "repeat_penalty", "max_tokens", "seed"];
let running = null; // the AbortController of the answer that is being written

function button(text, action) {
  const node = document.createElement("button");
  node.type = "button";
  node.textContent = text;
  node.addEventListener("click", action);
  return node;
}

function fail(text) {
  $("error").textContent = text;
  $("error").hidden = !text;
}

// ---- the conversation

function drawBody(node, message) {
  if (message.role === "user") {
    node.textContent = message.content;
    return;
  }
  const parts = [];
  if (message.reasoning) {
    const details = document.createElement("details");
    const summary = document.createElement("summary");
    const inside = document.createElement("div");
    summary.textContent = "Reasoning";
    inside.textContent = message.reasoning;
    details.append(summary, inside);
    details.open = node.querySelector("details")?.open ?? !message.content;
    parts.push(details);
  }
  node.replaceChildren(...parts, ...markdown(message.content));
}

function drawMessage(message, index) {
  const node = document.createElement("article");
  const head = document.createElement("h2");
  const body = document.createElement("div");
  const tools = document.createElement("div");
  node.className = `message ${message.role}`;
  head.textContent = message.role === "user" ? "You" : $("model").textContent;
  body.className = "body";
  tools.className = "tools";
  drawBody(body, message);
  if (message.role === "user") tools.append(button("Edit", () => edit(index, node)));
  else {
    tools.append(button("Copy", () => navigator.clipboard?.writeText(message.content)));
    if (index === current().messages.length - 1) tools.append(button("Regenerate", regenerate));
    if (message.note) {
      const note = document.createElement("span");
      note.className = "note";
      note.textContent = message.note;
      tools.append(note);
    }
  }
  node.append(head, body, tools);
  return node;
}

function draw() {
  const log = $("log");
  log.replaceChildren(...current().messages.map(drawMessage));
  $("welcome").hidden = current().messages.length > 0;
  log.scrollTop = log.scrollHeight;
  drawList();
}

function drawList() {
  const items = store.conversations.map((each) => {
    const item = document.createElement("li");
    const open = button(each.title || "New conversation", () => {
      stop();
      store.current = each.id;
      save();
      closeMenu();
      draw();
    });
    if (each.id === store.current) open.setAttribute("aria-current", "true");
    const gone = button("×", () => {
      if (each.id === store.current) stop();
      remove(each.id);
      draw();
    });
    gone.setAttribute("aria-label", `Delete ${each.title || "conversation"}`);
    item.append(open, gone);
    return item;
  });
  $("conversations").replaceChildren(...items);
}

function edit(index, node) {
  stop();
  const conversation = current();
  const area = document.createElement("textarea");
  area.value = conversation.messages[index].content;
  area.rows = Math.min(12, area.value.split("\n").length + 1);
  area.setAttribute("aria-label", "Edit the message");
  const send = button("Send", () => {
    const text = area.value.trim();
    if (!text) return;
    conversation.messages.length = index;
    ask(text);
  });
  node.replaceChildren(area, send, button("Cancel", draw));
  area.focus();
}

// ---- asking

function body(conversation) {
  const settings = store.settings;
  const messages = conversation.messages.map(({ role, content }) => ({ role, content }));
  if (settings.system) messages.unshift({ role: "system", content: settings.system });
  const numbers = NUMBERS.filter((name) => settings[name] !== undefined && settings[name] !== "");
  return { messages, ...Object.fromEntries(numbers.map((name) => [name, Number(settings[name])])) };
}

function ask(text) {
  const conversation = current();
  conversation.messages.push({ role: "user", content: text });
  conversation.title ||= text.slice(0, 60);
  save();
  answer();
}

function regenerate() {
  if (running) return;
  const messages = current().messages;
  if (messages.at(-1)?.role === "assistant") messages.pop();
  answer();
}

async function answer() {
  stop();
  fail("");
  const conversation = current();
  const asked = body(conversation);
  const message = { role: "assistant", content: "", reasoning: "", note: "" };
  const own = new AbortController();
  running = own;
  busy(true);
  conversation.messages.push(message);
  draw();
  const node = $("log").lastElementChild.querySelector(".body");
  const show = throttled(() => {
    if (current() !== conversation) return;
    const log = $("log");
    const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
    drawBody(node, message);
    if (atEnd) log.scrollTop = log.scrollHeight;
  });
  const meter = new Meter();
  try {
    for await (const chunk of chat(asked, store.settings.key, own.signal)) {
      take(chunk, message, meter);
      show();
    }
  } catch (error) {
    if (own.signal.aborted) message.note = "stopped";
    else {
      message.note = "broken off";
      fail(error instanceof ApiError ? error.message : `the server cannot be reached (${error.message})`);
    }
  } finally {
    if (!message.content && !message.reasoning) conversation.messages.splice(conversation.messages.indexOf(message), 1);
    save();
    if (running === own) {
      running = null;
      busy(false);
    }
    if (current() === conversation) draw();
  }
}

function take(chunk, message, meter) {
  const choice = chunk.choices[0];
  if (choice?.delta.content) meter.count();
  message.content += choice?.delta.content ?? "";
  message.reasoning += choice?.delta.reasoning_content ?? "";
  if (choice?.finish_reason) message.note = summary(choice.finish_reason, chunk.timings);
  const speed = chunk.timings?.predicted_per_second || meter.speed();
  if (speed) $("speed").textContent = `${speed.toFixed(1)} tokens/s`;
}

function summary(reason, timings) {
  const parts = reason === "length" ? ["cut at the limit of tokens"] : [];
  if (timings?.predicted_n) parts.push(`${timings.predicted_n} tokens`);
  if (timings?.predicted_per_second) parts.push(`${timings.predicted_per_second.toFixed(1)} tokens/s`);
  if (timings?.prompt_ms) parts.push(`first after ${(timings.prompt_ms / 1000).toFixed(1)} s`);
  if (timings?.cache_n) parts.push(`${timings.cache_n} of the prompt remembered`);
  return parts.join(" · ");
}

class Meter {
  chunks = 0;
  count() {
    this.start ??= performance.now();
    this.chunks++;
  }
  speed() {
    return this.chunks > 4 ? (1000 * (this.chunks - 1)) / (performance.now() - this.start) : 0;
  }
}

function throttled(action) {
  let waiting = false;
  return () => {
    if (waiting) return;
    waiting = true;
    setTimeout(() => {
      waiting = false;
      action();
    }, 50);
  };
}

function stop() {
  running?.abort();
  running = null;
  busy(false);
}

function busy(is) {
  $("send").hidden = is;
  $("stop").hidden = !is;
  $("log").setAttribute("aria-busy", String(is));
}

// ---- everything around it

function grow() {
  const input = $("input");
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight + 2}px`;
}

function closeMenu() {
  $("side").classList.remove("open");
  $("menu").setAttribute("aria-expanded", "false");
}

function setTheme() {
  document.documentElement.dataset.theme = store.theme;
}

function listen() {
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = $("input").value.trim();
    if (!text || running) return;
    $("input").value = "";
    grow();
    ask(text);
  });
  $("input").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      $("form").requestSubmit();
    }
  });
  $("input").addEventListener("input", grow);
  $("stop").addEventListener("click", stop);
  document.addEventListener("keydown", (event) => event.key === "Escape" && !$("settings").open && stop());
  $("new").addEventListener("click", () => {
    stop();
    begin();
    closeMenu();
    draw();
    $("input").focus();
  });
  $("menu").addEventListener("click", () => {
    const open = $("side").classList.toggle("open");
    $("menu").setAttribute("aria-expanded", String(open));
  });
  $("theme").addEventListener("click", () => {
    const dark = store.theme ? store.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    store.theme = dark ? "light" : "dark";
    save();
    setTheme();
  });
  listenToSettings();
}

function listenToSettings() {
  const form = $("settings").querySelector("form");
  $("show-settings").addEventListener("click", () => {
    for (const field of form.elements) if (field.name) field.value = store.settings[field.name] ?? "";
    $("settings").showModal();
  });
  form.addEventListener("input", (event) => {
    if (event.target.validity.valid) store.settings[event.target.name] = event.target.value;
    save();
  });
  $("settings").addEventListener("close", name);
}

async function name() {
  try {
    const found = await get("v1/models", store.settings.key);
    $("model").textContent = document.title = found.data[0].id;
    fail("");
  } catch (error) {
    fail(error.message);
  }
}

setTheme();
listen();
draw();
name();
watch(() => store.settings.key);
