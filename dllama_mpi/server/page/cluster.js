// The live view of the cluster: speed over time, batch, queue, pages of the KV cache, and what each rank does.

import { get } from "./api.js";

const $ = (id) => document.getElementById(id);
const EVERY = 2000; // milliseconds
const MOST = 60; // readings that are drawn
const SVG = "http://www.w3.org/2000/svg";
let before = null;
let speeds = [];

function make(tag, name, ...children) {
  const node = document.createElement(tag);
  if (name) node.className = name;
  node.append(...children);
  return node;
}

const percent = (part) => `${Math.round(100 * part)} %`;

// A bar of parts of a whole, [class, part, words] each; read aloud as its words.
function bar(...parts) {
  const node = make("span", "bar");
  node.setAttribute("role", "img");
  node.setAttribute("aria-label", parts.map(([, , words]) => words).join(", "));
  node.title = node.getAttribute("aria-label");
  for (const [name, part] of parts) {
    const piece = make("span", name);
    piece.style.width = `${100 * Math.min(1, Math.max(0, part))}%`;
    node.append(piece);
  }
  return node;
}

// A curve of the last readings.
function curve(values) {
  const top = Math.max(1, ...values);
  const node = document.createElementNS(SVG, "svg");
  const line = document.createElementNS(SVG, "polyline");
  const at = (value, i) => `${(100 * (MOST - values.length + i)) / (MOST - 1)},${29 - (27 * value) / top}`;
  node.setAttribute("viewBox", "0 0 100 30");
  node.setAttribute("preserveAspectRatio", "none");
  node.setAttribute("role", "img");
  node.setAttribute("aria-label", `tokens a second in the last ${Math.round((values.length * EVERY) / 1000)} seconds, ${top.toFixed(0)} at most`);
  line.setAttribute("points", values.map(at).join(" "));
  node.append(line);
  return node;
}

function tile(name, value, ...more) {
  return make("div", "tile", make("dt", "", name), make("dd", "", value, ...more));
}

function speed(engine) {
  const now = performance.now();
  const last = before;
  before = { now, output: engine.output_tokens };
  if (!last || engine.output_tokens === undefined) return speeds.at(-1) ?? 0;
  const found = Math.max(0, (1000 * (engine.output_tokens - last.output)) / (now - last.now));
  speeds = [...speeds, found].slice(-MOST);
  return found;
}

function tiles(found) {
  const engine = found.engine;
  const nodes = [
    tile("tokens/s", speed(engine).toFixed(1), curve(speeds)),
    tile("running", found.max_batch ? `${engine.running} of ${found.max_batch}` : String(engine.running)),
    tile("waiting", String(engine.waiting)),
  ];
  if (engine.pages_total) {
    const used = engine.pages_used / engine.pages_total;
    const kept = engine.pages_cached / engine.pages_total;
    const words = [`${engine.pages_used} of ${engine.pages_total} in use`, `${engine.pages_cached} remembered`];
    nodes.push(tile("KV pages", `${engine.pages_used} of ${engine.pages_total}`, bar(["used", used, words[0]], ["kept", kept, words[1]])));
    nodes.push(tile("remembered", String(engine.pages_cached)));
  }
  if (engine.prompt_tokens) nodes.push(tile("cache hits", percent(engine.cached_tokens / engine.prompt_tokens)));
  if (engine.preemptions) nodes.push(tile("preemptions", String(engine.preemptions)));
  return nodes;
}

function row(rank) {
  const compute = rank.compute_ms ?? 0;
  const wait = rank.wait_ms ?? 0;
  const whole = compute + wait;
  const cells = [String(rank.rank), rank.host, percent(rank.share)].map((text) => make("td", "", text));
  const words = [`computes ${percent(compute / whole)}`, `waits ${percent(wait / whole)}`];
  const shown = whole > 0 ? [bar(["used", compute / whole, words[0]], ["wait", wait / whole, words[1]]), make("small", "", words.join(", "))] : [make("small", "", "idle")];
  return make("tr", "", ...cells, make("td", "", ...shown), make("td", "", make("small", "", rank.remark ?? "")));
}

function draw(found) {
  $("engine").replaceChildren(...tiles(found));
  $("ranks").replaceChildren(...found.ranks.map(row));
}

// Ask while the view is open.
export function watch(key) {
  let timer = null;
  const ask = async () => {
    try {
      draw(await get("cluster", key()));
    } catch (error) {
      $("engine").textContent = error.message;
    }
    if (!$("cluster").hidden) timer = setTimeout(ask, EVERY);
  };
  $("show-cluster").addEventListener("click", () => {
    const open = $("cluster").hidden;
    $("cluster").hidden = !open;
    $("show-cluster").setAttribute("aria-expanded", String(open));
    clearTimeout(timer);
    before = null;
    if (open) ask();
  });
}
