// Markdown to DOM nodes. No text ever becomes HTML by being parsed as such, so nothing a model writes can run.

const INLINE = /(`+)([\s\S]*?[^`])\1(?!`)|\*\*([^*]+?)\*\*|__([^_]+?)__|\*([^*\s][^*]*?)\*|(?<!\w)_([^_\s][^_]*?)_(?!\w)|~~([^~]+?)~~|\[([^\]\n]+)\]\((https?:\/\/[^\s)]+)\)|(https?:\/\/[^\s<>()]+[^\s<>().,;:!?])/g;

function make(tag, ...children) {
  const node = document.createElement(tag);
  node.append(...children);
  return node;
}

function link(text, address) {
  const node = make("a", text);
  node.href = address;
  node.target = "_blank";
  node.rel = "noopener noreferrer";
  return node;
}

export function inline(text) {
  const nodes = [];
  let end = 0;
  for (const found of text.matchAll(INLINE)) {
    if (found.index > end) nodes.push(text.slice(end, found.index));
    end = found.index + found[0].length;
    const [, ticks, code, bold, bold2, italic, italic2, struck, label, address, bare] = found;
    if (ticks) nodes.push(make("code", code.trim()));
    else if (bold ?? bold2) nodes.push(make("strong", ...inline(bold ?? bold2)));
    else if (italic ?? italic2) nodes.push(make("em", ...inline(italic ?? italic2)));
    else if (struck) nodes.push(make("s", ...inline(struck)));
    else if (label) nodes.push(link(label, address));
    else nodes.push(link(bare, bare));
  }
  if (end < text.length) nodes.push(text.slice(end));
  return nodes;
}

function codeBlock(language, lines) {
  const text = lines.join("\n");
  const copy = make("button", "Copy");
  copy.type = "button";
  copy.addEventListener("click", async () => {
    await navigator.clipboard?.writeText(text);
    copy.textContent = "Copied";
  });
  const block = make("div", make("div", make("span", language || "text"), copy), make("pre", make("code", text)));
  block.className = "code";
  return block;
}

const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;

function list(lines) {
  const first = lines[0].match(ITEM);
  const depth = first[1].length;
  const node = make(/\d/.test(first[2]) ? "ol" : "ul");
  if (node.tagName === "OL" && parseInt(first[2], 10) !== 1) node.start = parseInt(first[2], 10);
  let item = null;
  let inner = [];
  const close = () => {
    if (!item) return;
    if (inner.length) item.append(ITEM.test(inner[0]) ? list(inner) : inner.join(" "));
    node.append(item);
  };
  for (const line of lines) {
    const found = line.match(ITEM);
    if (found && found[1].length <= depth) {
      close();
      item = make("li", ...inline(found[3]));
      inner = [];
    } else if (found || inner.length) inner.push(line);
    else item.append(" ", ...inline(line.trim()));
  }
  close();
  return node;
}

function cells(line) {
  return line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
}

function table(lines) {
  const row = (line, tag) => make("tr", ...cells(line).map((cell) => make(tag, ...inline(cell))));
  const found = make("table", make("thead", row(lines[0], "th")), make("tbody", ...lines.slice(2).map((line) => row(line, "td"))));
  const wide = make("div", found);
  wide.className = "wide";
  return wide;
}

function paragraph(lines) {
  const node = make("p");
  lines.forEach((line, i) => node.append(...(i ? [make("br")] : []), ...inline(line)));
  return node;
}

// Return the nodes of a text; a block of code that is not closed yet goes to the end.
export function markdown(text) {
  const nodes = [];
  const lines = text.split("\n");
  let i = 0;
  const take = (test) => {
    const start = i;
    while (i < lines.length && test(lines[i], i - start)) i++;
    return lines.slice(start, i);
  };
  while (i < lines.length) {
    const line = lines[i];
    const fence = line.match(/^\s*(```+|~~~+)\s*([\w+#.-]*)/);
    const heading = line.match(/^(#{1,6})\s+(.*)$/);
    if (!line.trim()) i++;
    else if (fence) {
      i++;
      const inside = take((each) => !each.trim().startsWith(fence[1]));
      i++;
      nodes.push(codeBlock(fence[2], inside));
    } else if (heading) {
      i++;
      nodes.push(make(`h${Math.min(5, heading[1].length + 2)}`, ...inline(heading[2])));
    } else if (/^\s*([-*_])(\s*\1){2,}\s*$/.test(line)) {
      i++;
      nodes.push(make("hr"));
    } else if (line.startsWith(">")) {
      nodes.push(make("blockquote", ...markdown(take((each) => each.startsWith(">")).map((each) => each.replace(/^> ?/, "")).join("\n"))));
    } else if (ITEM.test(line)) {
      nodes.push(list(take((each, n) => n === 0 || ITEM.test(each) || /^\s+\S/.test(each))));
    } else if (line.includes("|") && /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/.test(lines[i + 1] ?? "")) {
      nodes.push(table(take((each) => each.includes("|"))));
    } else {
      nodes.push(paragraph(take((each, n) => n === 0 || (each.trim() && !/^\s*(```|~~~|#{1,6}\s|>)/.test(each) && !ITEM.test(each)))));
    }
  }
  return nodes;
}
