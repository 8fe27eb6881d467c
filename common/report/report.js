// The page from top to bottom, and when it is loaded again.

const RELOAD = 20_000; // milliseconds
const SILENT = 30 * 60_000; // milliseconds without news after which a training is not taken for a running one
const record = JSON.parse(document.getElementById("record").textContent);
const rows = JSON.parse(document.getElementById("rows").textContent);
const running = ["training", "evaluating"].includes(record.status);
const updated = moment(record.updated);

function topBar() {
  const other = say("中文", "English");
  const dark = state.theme === "dark";
  const language = () => choose("language", say("zh", "en"));
  const theme = () => choose("theme", dark ? "light" : "dark");
  const links = [...document.querySelectorAll("main > section")].map((part) =>
    el("a", { href: `#${part.id}` }, part.querySelector("h2").textContent),
  );
  return [
    el("nav", { "aria-label": say("parts of the page", "页面各部分") }, links),
    el(
      "div",
      { class: "switches" },
      el("button", { type: "button", id: "language", lang: say("zh-CN", "en"), click: language }, other),
      el("button", { type: "button", id: "theme", click: theme }, dark ? say("light", "浅色") : say("dark", "深色")),
      el("button", { type: "button", id: "reload", click: () => location.reload() }, say("reload", "刷新")),
    ),
  ];
}

function statusName() {
  const names = {
    training: ["●", say("training", "训练中")],
    evaluating: ["●", say("evaluating", "评测中")],
    finished: ["✓", say("finished", "已完成")],
    stopped: ["❚❚", say("stopped", "已停止")],
    failed: ["✕", say("failed", "失败")],
  };
  return names[record.status] ?? ["○", say("no status", "无状态")];
}

function statusSentence() {
  const { seconds_left: left } = record.progress ?? {};
  const seconds = record.totals.seconds || record.progress?.seconds;
  const sentences = {
    training: known(left)
      ? say(`About ${duration(left)} left.`, `大约还需 ${duration(left)}。`)
      : say("The training has begun.", "训练已开始。"),
    evaluating: say("The answers are scored now.", "正在为回答评分。"),
    finished: known(seconds) ? say(`The training took ${duration(seconds)}.`, `训练用时 ${duration(seconds)}。`) : "",
    stopped: say(
      "A signal stopped the training. The same command continues it.",
      "训练被信号停止。再次运行同一命令即可继续。",
    ),
    failed: record.problem || say("The training failed.", "训练失败。"),
  };
  return sentences[record.status] ?? say("The record holds nothing yet.", "记录中还没有内容。");
}

function progressBar() {
  const { step, steps, epoch, epochs } = record.progress ?? {};
  if (!known(step)) return null;
  const share = steps ? Math.min(1, step / steps) : 0;
  const fill = el("i", {});
  fill.style.width = `${share * 100}%`;
  const of = (a, b) => (known(b) ? `${a} / ${b}` : a);
  const texts = [
    `${say("step", "步")} ${of(count(step), known(steps) ? count(steps) : null)}`,
    known(epoch) ? `${say("epoch", "轮次")} ${of(short(epoch), known(epochs) ? short(epochs) : null)}` : null,
    steps ? `${Math.floor(share * 100)}%` : null,
  ];
  const label = say("progress", "进度");
  const bar = el(
    "div",
    {
      class: "progress",
      role: "progressbar",
      "aria-label": label,
      "aria-valuemin": 0,
      "aria-valuemax": 100,
      "aria-valuenow": Math.floor(share * 100),
    },
    fill,
  );
  return el(
    "div",
    {},
    bar,
    el(
      "p",
      { class: "under" },
      texts.filter(known).map((text) => el("span", {}, text)),
    ),
  );
}

function heading() {
  const name = record.model?.name;
  const title = [record.method, name].filter(known).join(" · ") || say("Training report", "训练报告");
  document.title = `${statusName()[1]} · ${title}`;
  const silent = running && updated && Date.now() - updated > SILENT;
  const news = silent
    ? el(
        "p",
        {},
        say(
          `No news since ${day(updated)}: the training may have ended without a last record.`,
          `自 ${day(updated)} 起没有更新：训练可能已中断，未留下最后的记录。`,
        ),
      )
    : null;
  return el(
    "header",
    { class: `status ${record.status ?? ""}` },
    el(
      "div",
      { class: "line" },
      el(
        "h1",
        {},
        title,
        known(record.output_dir) ? el("small", { title: record.output_dir }, baseName(record.output_dir)) : null,
      ),
      el("span", { class: "badge" }, el("i", { "aria-hidden": "true" }, statusName()[0]), statusName()[1]),
    ),
    progressBar(),
    el("p", { class: "sentence" }, statusSentence()),
    news,
    el(
      "p",
      { class: "quiet", id: "updated" },
      updated ? `${say("updated", "更新于")} ${day(updated)}` : null,
      el("span", { id: "waiting" }),
    ),
  );
}

function warningsPart() {
  const warnings = (record.warnings ?? []).map((text) => say(text.en ?? text.zh, text.zh ?? text.en)).filter(known);
  return warnings.length
    ? el(
        "ul",
        { class: "warnings", "aria-label": say("warnings", "提醒") },
        warnings.map((text) => el("li", {}, text)),
      )
    : null;
}

// A reader who filters, selects or has opened a part is not disturbed; the browser keeps the place of the others.
function disturbs() {
  const opened = document.querySelector("details[open], .tip:not([hidden])");
  return view.filter || view.page || String(getSelection()) || opened || document.hidden;
}

function reloadLater() {
  if (!running) return;
  setInterval(() => {
    document.getElementById("waiting").textContent = disturbs()
      ? say(" · waits while you read", " · 阅读时暂停刷新")
      : "";
    if (!disturbs()) location.reload();
  }, RELOAD);
}

function render() {
  document.documentElement.lang = say("en", "zh-CN");
  document.documentElement.dataset.theme = state.theme;
  const focused = document.activeElement?.id;
  const parts = [
    scoresSection(),
    curvesSection(),
    samplesSection(),
    rowsSection(rows, record.totals.rows),
    dataSection(record.data),
    settingsSection(record.settings),
    runSection(record),
  ];
  const main = el("main", {}, heading(), warningsPart(), figures(), ...parts);
  document.querySelector("main")?.remove();
  document.querySelector(".top")?.remove();
  document.body.append(main);
  document.body.prepend(el("div", { class: "top" }, topBar()));
  document.getElementById("waiting").textContent = running ? say(" · reloads by itself", " · 自动刷新") : "";
  if (focused) document.getElementById(focused)?.focus();
}

// A print holds the parts that are closed on the screen too.
function printParts() {
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details:not([open])")];
    for (const part of closed) part.open = true;
  });
  addEventListener("afterprint", () => closed.forEach((part) => (part.open = false)));
}

render();
printParts();
reloadLater();
