// Languages, numbers and elements. Texts of the record become text nodes or attributes, never markup.

const state = {
  language: recall("language") ?? (navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en"),
  theme: recall("theme") ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"),
};

// Some browsers forbid a page from a file to remember anything.
function recall(key) {
  try {
    return localStorage.getItem(`report.${key}`);
  } catch {
    return null;
  }
}

function choose(key, value) {
  state[key] = value;
  render();
  try {
    localStorage.setItem(`report.${key}`, value);
  } catch {
    // the choice holds until the page is closed
  }
}

function say(english, chinese) {
  return state.language === "zh" ? chinese : english;
}

// Children are nodes and texts; null and undefined are left out. A function among the attributes listens to its event.
function el(name, attributes = {}, ...children) {
  const svg = ["svg", "g", "path", "line", "rect", "circle", "text"].includes(name);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(key, value);
    else if (value !== null && value !== undefined) element.setAttribute(key, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

function known(value) {
  return value !== null && value !== undefined && value !== "";
}

function count(value) {
  return known(value) ? new Intl.NumberFormat(state.language).format(value) : "–";
}

function fixed(value, digits = 2) {
  if (!known(value)) return "–";
  return new Intl.NumberFormat(state.language, { minimumFractionDigits: digits, maximumFractionDigits: digits }).format(
    value,
  );
}

// Four significant digits, as in 0.8215 and 5e-6.
function short(value) {
  if (!known(value)) return "–";
  const size = Math.abs(value);
  if (value !== 0 && (size < 1e-3 || size >= 1e9)) return Number(value.toPrecision(4)).toExponential();
  return new Intl.NumberFormat(state.language, { maximumSignificantDigits: size < 1e4 ? 4 : 6 }).format(value);
}

function bytes(value) {
  if (!known(value)) return "–";
  if (value === 0) return "0";
  return value < 1e8 ? `${short(Number((value / 1e6).toPrecision(3)))} MB` : `${fixed(value / 1e9)} GB`;
}

function duration(seconds) {
  if (!known(seconds)) return "–";
  const digits = seconds < 10 ? 1 : 0;
  if (Number(seconds.toFixed(digits)) < 60) return `${fixed(seconds, digits)} ${say("s", "秒")}`;
  const parts = [
    [Math.floor(seconds / 86400), say("d", "天")],
    [Math.floor(seconds / 3600) % 24, say("h", "小时")],
    [Math.floor(seconds / 60) % 60, say("min", "分")],
    [Math.floor(seconds) % 60, say("s", "秒")],
  ];
  const first = parts.findIndex(([value]) => value > 0);
  return parts
    .slice(first, first + 2)
    .filter(([value]) => value > 0)
    .map(([value, unit]) => `${value} ${unit}`)
    .join(" ");
}

function moment(text) {
  const time = new Date(text);
  return known(text) && !isNaN(time) ? time : null;
}

function clock(time) {
  return time ? time.toLocaleTimeString("en-GB") : "–";
}

function day(time) {
  const two = (number) => String(number).padStart(2, "0");
  return time ? `${time.getFullYear()}-${two(time.getMonth() + 1)}-${two(time.getDate())} ${clock(time)}` : "–";
}

function baseName(path) {
  return (
    String(path ?? "")
      .split(/[\\/]/)
      .filter(Boolean)
      .at(-1) ?? "–"
  );
}

function section(id, title, ...children) {
  return el("section", { id }, el("h2", {}, title), ...children);
}

// A table that scrolls inside itself. A cell is a text or an element, and `numbers` are the columns aligned to the right.
function table(label, heads, rows, numbers = []) {
  const kind = (i) => (numbers.includes(i) ? "number" : null);
  const head = el(
    "tr",
    {},
    heads.map((text, i) => el("th", { scope: "col", class: kind(i) }, text)),
  );
  const body = rows.map((cells) =>
    el(
      "tr",
      {},
      cells.map((cell, i) => el(i ? "td" : "th", { scope: i ? null : "row", class: kind(i) }, cell)),
    ),
  );
  const inside = el("table", {}, el("thead", {}, head), el("tbody", {}, body));
  return el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": label }, inside);
}

function copyButton(text, label) {
  const button = el("button", { type: "button", class: "copy", click: () => copy(text, button) }, label);
  return button;
}

// Without the clipboard's interface, which needs a trusted address, the browser copies a selected field.
async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const field = el("textarea", { class: "hidden" });
    field.value = text;
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
  }
  const label = button.textContent;
  button.textContent = say("copied", "已复制");
  setTimeout(() => (button.textContent = label), 1500);
}
