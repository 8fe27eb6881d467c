// The table of the rows, and the words of an answer that its reference has too.

const ON_A_PAGE = 10;
const COMPARED = 800; // words of a text; the time to compare two texts grows with the square
const LINE = 12; // characters of a line in a narrow field
const SCROLLED = 150; // characters that fill one
const view = { column: 6, falling: false, filter: "", page: 0 };
const segmenter = Intl.Segmenter ? new Intl.Segmenter("zh", { granularity: "word" }) : null;

// Chinese has no spaces: the browser's dictionary divides it; without one, each Chinese character is a word.
function wordsOf(text) {
  if (segmenter) return Array.from(segmenter.segment(text), ({ segment }) => segment);
  return text.match(/[\p{Script=Han}]|[\p{L}\p{N}]+|[^\p{L}\p{N}]+/gu) ?? [];
}

function isWord(text) {
  return /[\p{L}\p{N}]/u.test(text);
}

// The words of the longest sequence that both texts have in the same order, which is what ROUGE-L counts.
// Returns [[word, whether it is one of them], …] of the answer.
function matched(answer, reference) {
  const words = wordsOf(answer);
  const lower = (list) => list.map((word) => word.toLowerCase());
  const places = words
    .map((_, i) => i)
    .filter((i) => isWord(words[i]))
    .slice(0, COMPARED);
  const mine = lower(places.map((i) => words[i]));
  const other = lower(wordsOf(reference).filter(isWord).slice(0, COMPARED));
  const width = other.length + 1;
  const longest = new Uint16Array((mine.length + 1) * width); // of the parts from word i and word j on
  for (let i = mine.length - 1; i >= 0; i--)
    for (let j = other.length - 1; j >= 0; j--)
      longest[i * width + j] =
        mine[i] === other[j]
          ? longest[(i + 1) * width + j + 1] + 1
          : Math.max(longest[(i + 1) * width + j], longest[i * width + j + 1]);
  const common = new Set();
  for (let i = 0, j = 0; i < mine.length && j < other.length;) {
    if (mine[i] === other[j]) {
      common.add(places[i++]);
      j++;
    } else if (longest[(i + 1) * width + j] >= longest[i * width + j + 1]) i++;
    else j++;
  }
  return words.map((word, i) => [word, common.has(i)]);
}

// An answer with its matching words marked; neighbours share one mark.
function compared(answer, reference) {
  if (!known(answer)) return answer === "" ? [el("em", {}, say("empty", "空"))] : ["–"];
  if (!known(reference)) return [answer];
  const parts = [];
  for (const [word, same] of matched(answer, reference)) {
    if (parts.at(-1)?.same === same) parts.at(-1).text += word;
    else parts.push({ text: word, same });
  }
  return parts.map(({ text, same }) => (same ? el("mark", {}, text) : text));
}

// A field for one text; the keyboard reaches it if it may scroll.
function passage(text, content) {
  const size = (text ?? "").length + LINE * (text ?? "").split("\n").length;
  return el("div", { class: "passage", tabindex: size > SCROLLED ? 0 : null }, content);
}

function columnsOf(rows) {
  const has = (cell) => rows.some((row) => known(row[cell]));
  const all = [
    [0, say("row", "行")],
    [1, say("question", "问题")],
    [2, say("reference", "参考答案")],
    [3, say("base", "基座")],
    [4, say("tuned", "微调后")],
    [5, say("base ROUGE-L", "基座 ROUGE-L")],
    [6, say("tuned ROUGE-L", "微调后 ROUGE-L")],
  ];
  return all.filter(([cell]) => cell < 2 || cell === 4 || has(cell));
}

// Rows without a value come last in both directions.
function sorted(rows) {
  const { column, falling } = view;
  const sign = falling ? -1 : 1;
  return [...rows].sort((one, other) => {
    const [a, b] = [one[column], other[column]];
    if (!known(a) || !known(b)) return known(b) - known(a);
    return sign * (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "zh"));
  });
}

function rowsSection(rows, total) {
  if (!rows.length) return null;
  const columns = columnsOf(rows);
  if (!columns.some(([cell]) => cell === view.column)) view.column = 0;
  const body = el("tbody"),
    head = el("thead"),
    pages = el("div", { class: "pages" });
  const fill = () => {
    const wanted = view.filter.toLowerCase();
    const found = sorted(
      rows.filter((row) =>
        row.slice(1, 5).some((text) =>
          String(text ?? "")
            .toLowerCase()
            .includes(wanted),
        ),
      ),
    );
    const last = Math.max(0, Math.ceil(found.length / ON_A_PAGE) - 1);
    view.page = Math.min(view.page, last);
    const shown = found.slice(view.page * ON_A_PAGE, (view.page + 1) * ON_A_PAGE);
    body.replaceChildren(...shown.map((row) => rowElement(row, columns)));
    head.replaceChildren(
      el(
        "tr",
        {},
        columns.map((column) => sortHead(column, fill)),
      ),
    );
    pages.replaceChildren(...pager(found.length, last, fill));
  };
  const filter = el("input", {
    type: "search",
    placeholder: say("filter by text", "按文字筛选"),
    "aria-label": say("filter the rows by text", "按文字筛选各行"),
  });
  filter.value = view.filter;
  filter.addEventListener("input", () => {
    Object.assign(view, { filter: filter.value, page: 0 });
    fill();
  });
  fill();
  const label = say("rows", "逐行结果");
  const inside = el(
    "div",
    { class: "scroll rows", tabindex: 0, role: "region", "aria-label": label },
    el("table", {}, head, body),
  );
  return section(
    "rows-part",
    say("Answers row by row", "逐行回答"),
    el("div", { class: "tools" }, filter, pages),
    rowsNote(rows, total),
    inside,
  );
}

function rowsNote(rows, total) {
  const some = known(total) && total > rows.length;
  const shown = say(
    `${count(rows.length)} of ${count(total)} rows are shown: the worst and an even choice of the others; predictions.csv holds all. `,
    `显示 ${count(total)} 行中的 ${count(rows.length)} 行：得分最低的行，以及其余行的均匀抽样；全部行在 predictions.csv 中。`,
  );
  const marks = say(
    " are the words that ROUGE-L finds in the reference in the same order.",
    "是按相同顺序也出现在参考答案中的词（ROUGE-L 的依据）。",
  );
  const references = rows.some((row) => known(row[2]));
  if (!some && !references) return null;
  return el(
    "p",
    { class: "quiet" },
    some ? shown : null,
    references ? [el("mark", {}, say("Marked words", "标出的词")), marks] : null,
  );
}

function sortHead([cell, name], fill) {
  const mine = view.column === cell;
  const sort = () => {
    Object.assign(view, { falling: mine ? !view.falling : false, column: cell, page: 0 });
    fill();
    document.querySelector(`.rows [data-cell="${cell}"]`)?.focus();
  };
  const arrow = mine ? (view.falling ? " ↓" : " ↑") : "";
  const order = mine ? (view.falling ? "descending" : "ascending") : null;
  const button = el("button", { type: "button", "data-cell": cell, click: sort }, `${name}${arrow}`);
  return el("th", { scope: "col", "aria-sort": order, class: `cell-${cell}` }, button);
}

function rowElement(row, columns) {
  const content = (cell) => {
    if (cell >= 5) return fixed(row[cell], 1);
    if (cell === 0) return count(row[0]);
    return passage(row[cell], cell > 2 ? compared(row[cell], row[2]) : known(row[cell]) ? row[cell] : "–");
  };
  return el(
    "tr",
    {},
    columns.map(([cell, name]) => el("td", { class: `cell-${cell}`, "data-label": name }, content(cell))),
  );
}

function pager(found, last, fill) {
  const turn = (by) => () => {
    view.page += by;
    fill();
  };
  const button = (label, by, off) =>
    el(
      "button",
      { type: "button", click: turn(by), disabled: off ? "" : null, "aria-label": label },
      by < 0 ? "‹" : "›",
    );
  const from = found ? view.page * ON_A_PAGE + 1 : 0,
    to = Math.min(found, (view.page + 1) * ON_A_PAGE);
  return [
    button(say("previous page", "上一页"), -1, view.page === 0),
    el(
      "span",
      { "aria-live": "polite" },
      say(`${count(from)}–${count(to)} of ${count(found)}`, `${count(from)}–${count(to)}，共 ${count(found)} 行`),
    ),
    button(say("next page", "下一页"), 1, view.page >= last),
  ];
}
