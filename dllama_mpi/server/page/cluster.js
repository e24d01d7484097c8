// The live view of the cluster: ranks, and what the engine is doing.

import { get } from "./api.js";

const $ = (id) => document.getElementById(id);
const EVERY = 2000; // milliseconds
let before = null;

function cell(...children) {
  const node = document.createElement("td");
  node.append(...children);
  return node;
}

function bar(part, whole) {
  const node = document.createElement("meter");
  node.max = 1;
  node.value = whole > 0 ? part / whole : 0;
  node.textContent = `${Math.round(100 * node.value)} %`;
  return node;
}

function figures(found) {
  const engine = found.engine;
  const now = performance.now();
  const last = before;
  before = { now, output: engine.output_tokens };
  const shown = { running: engine.running, waiting: engine.waiting };
  if (last && engine.output_tokens !== undefined) {
    shown["tokens/s"] = ((1000 * (engine.output_tokens - last.output)) / (now - last.now)).toFixed(1);
  }
  if (engine.pages_total) {
    shown["KV pages"] = `${engine.pages_used} of ${engine.pages_total}`;
    shown["pages remembered"] = engine.pages_cached;
  }
  if (engine.prompt_tokens) shown["cache hits"] = `${Math.round((100 * engine.cached_tokens) / engine.prompt_tokens)} %`;
  if (engine.preemptions) shown.preemptions = engine.preemptions;
  return shown;
}

function draw(found) {
  const entries = Object.entries(figures(found)).map(([name, value]) => {
    const pair = document.createElement("div");
    const term = document.createElement("dt");
    const what = document.createElement("dd");
    term.textContent = name;
    what.textContent = value;
    pair.append(term, what);
    return pair;
  });
  $("engine").replaceChildren(...entries);
  const rows = found.ranks.map((rank) => {
    const row = document.createElement("tr");
    const whole = (rank.compute_ms ?? 0) + (rank.wait_ms ?? 0);
    row.append(cell(String(rank.rank)), cell(rank.host), cell(`${Math.round(100 * rank.share)} %`));
    row.append(cell(bar(rank.compute_ms ?? 0, whole)), cell(bar(rank.wait_ms ?? 0, whole)));
    return row;
  });
  $("ranks").replaceChildren(...rows);
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
