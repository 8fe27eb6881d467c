// What went in: data, settings, the starts of the training.

function splitName(split) {
  return (
    { train: say("train", "训练"), validation: say("validation", "验证"), test: say("test", "测试") }[split] ??
    split ??
    "–"
  );
}

function lengthName(name) {
  const names = {
    question: say("question", "问题"),
    answer: say("answer", "回答"),
    both: say("question and answer", "问题与回答"),
    text: say("text", "文本"),
  };
  return names[name] ?? name;
}

// The first characters of a hash; the whole of it on hover and in the clipboard.
function hash(value) {
  if (!known(value)) return "–";
  const plain = String(value).replace(/^sha256[:-]?/, "");
  const button = copyButton(String(value), `${plain.slice(0, 8)}`);
  button.title = String(value);
  button.setAttribute("aria-label", say(`copy the hash ${plain.slice(0, 8)}`, `复制哈希 ${plain.slice(0, 8)}`));
  return button;
}

function dataSection(data) {
  if (!data?.length) return null;
  const heads = [
    say("split", "部分"),
    say("rows", "行数"),
    say("tokens", "token 数"),
    say("cut", "截断"),
    say("lost", "丢失"),
    say("dropped", "弃用"),
    say("files", "文件"),
    say("hash", "哈希"),
  ];
  const rows = data.map((part) => [
    splitName(part.split),
    ...[part.rows, part.tokens, part.cut, part.lost, part.dropped].map(count),
    el("div", { class: "files" }, (part.files ?? []).map(fileLine)),
    hash(part.hash),
  ]);
  const help = say(
    "cut: rows with a text over its limit. lost: rows whose answer did not fit at all. dropped: rows with nothing to learn.",
    "截断：文本超过上限的行。丢失：回答完全放不下的行。弃用：没有可学内容的行。",
  );
  const charts = data.flatMap((part) =>
    (part.lengths ?? []).map((length) =>
      histogram(length, `${splitName(part.split)} · ${lengthName(length.name)}${say(" (tokens)", "（token 数）")}`),
    ),
  );
  const title = say("Data", "数据");
  return section(
    "data",
    title,
    table(title, heads, rows, [1, 2, 3, 4, 5]),
    el("p", { class: "quiet" }, help),
    el("div", { class: "grid" }, charts),
  );
}

function fileLine({ file, format, rows, hash: sum }) {
  const name = el("span", { title: file ?? "" }, baseName(file));
  const details = [format, known(rows) ? say(`${count(rows)} rows`, `${count(rows)} 行`) : null]
    .filter(known)
    .join(say(", ", "，"));
  return el("div", {}, name, el("small", {}, ` ${details} `), known(sum) ? hash(sum) : null);
}

function originOf({ from, variable }) {
  const names = {
    default: say("default", "默认"),
    chosen: say("chosen", "自动选择"),
    script: say("script", "脚本"),
    file: say("file of settings", "配置文件"),
    variable: say("variable", "变量"),
    flag: say("flag", "参数"),
  };
  const name = el(
    "span",
    { class: `from ${["variable", "flag", "file"].includes(from) ? "yours" : ""}` },
    names[from] ?? from ?? "–",
  );
  return known(variable) ? [name, " ", el("code", {}, variable)] : name;
}

function settingsSection(settings) {
  if (!settings?.length) return null;
  const order = ["flag", "variable", "file", "script"];
  const rank = ({ from }) => (order.includes(from) ? order.indexOf(from) : order.length);
  const set = settings.filter(({ from }) => from !== "default").sort((a, b) => rank(a) - rank(b));
  const rest = settings.filter(({ from }) => from === "default");
  const title = say("Settings", "设置");
  const heads = [say("setting", "设置项"), say("value", "值"), say("from", "来源")];
  const rows = (list) =>
    list.map((entry) => [el("code", {}, entry.flag ?? "–"), el("code", {}, entry.value ?? "–"), originOf(entry)]);
  const shown = set.length ? table(title, heads, rows(set)) : null;
  const label = say(`${count(rest.length)} settings at their default`, `${count(rest.length)} 项为默认值`);
  const hidden = rest.length ? el("details", {}, el("summary", {}, label), table(label, heads, rows(rest))) : null;
  return section("settings", title, shown, hidden);
}

function many(number, one, several, chinese) {
  return known(number) ? say(`${count(number)} ${number === 1 ? one : several}`, `${count(number)} ${chinese}`) : null;
}

function modelFacts({ model = {}, method, output_dir: output }) {
  const precision = known(model.bits) && model.bits ? say(`${model.bits} bit`, `${model.bits} 位`) : null;
  const share =
    model.parameters && known(model.trainable) ? ` (${fixed((model.trainable / model.parameters) * 100)}%)` : "";
  return [
    [say("method", "方法"), method],
    [say("model", "模型"), [model.name, model.family].filter(known).join(" · ")],
    [say("model's folder", "模型目录"), model.path],
    [say("parameters", "参数量"), known(model.parameters) ? count(model.parameters) : null],
    [say("trained", "可训练参数"), known(model.trainable) ? `${count(model.trainable)}${share}` : null],
    [say("precision", "精度"), [model.dtype, precision].filter(known).join(" · ")],
    [say("output folder", "输出目录"), output],
  ];
}

function pieceFacts(piece) {
  const memory = piece.memory ?? {};
  return [
    [
      say("device", "设备"),
      [
        piece.device,
        many(piece.processes, "process", "processes", "个进程"),
        many(piece.threads, "thread", "threads", "个线程"),
      ]
        .filter(known)
        .join(" · "),
    ],
    [say("memory predicted", "预计内存"), known(memory.predicted) ? bytes(memory.predicted) : null],
    [
      say("memory measured", "实测内存峰值"),
      [
        memory.device ? say(`device ${bytes(memory.device)}`, `设备 ${bytes(memory.device)}`) : null,
        known(memory.host) ? say(`host ${bytes(memory.host)}`, `主机 ${bytes(memory.host)}`) : null,
      ]
        .filter(known)
        .join(" · "),
    ],
    [
      say("versions", "版本"),
      Object.entries(piece.versions ?? {})
        .map(([name, version]) => `${name} ${version}`)
        .join(" · "),
    ],
    [say("commit", "提交"), piece.commit],
  ];
}

function piecesTable(pieces, totals) {
  const heads = [
    say("start", "第几次"),
    say("started", "开始时间"),
    say("steps", "步"),
    say("time", "用时"),
    say("tokens", "token 数"),
    say("device", "设备"),
    say("predicted", "预计内存"),
    say("device memory", "设备内存"),
    say("host memory", "主机内存"),
    say("commit", "提交"),
  ];
  const rows = pieces.map((piece, i) => [
    String(i + 1),
    day(moment(piece.started)),
    `${count(piece.first_step)}–${count(piece.last_step)}`,
    duration(piece.seconds),
    count(piece.tokens),
    [piece.device, known(piece.processes) ? `×${piece.processes}` : null].filter(known).join(" ") || "–",
    ...[piece.memory?.predicted, piece.memory?.device, piece.memory?.host].map(bytes),
    piece.commit ?? "–",
  ]);
  rows.push([say("all", "合计"), "", "", duration(totals.seconds), count(totals.tokens), "", "", "", "", ""]);
  const title = say("starts of the training", "各次启动");
  return table(title, heads, rows, [3, 4, 6, 7, 8]);
}

function runSection(record) {
  const pieces = record.pieces ?? [];
  const last = pieces.at(-1) ?? {};
  const facts = [...modelFacts(record), ...pieceFacts(last)].filter(([, value]) => known(value));
  if (!facts.length && !known(last.command)) return null;
  const list = el(
    "dl",
    {},
    facts.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, String(value)))),
  );
  const commands = [...new Set(pieces.map(({ command }) => command).filter(known))];
  const blocks = commands.map((command) =>
    el(
      "div",
      { class: "command" },
      el("pre", { tabindex: 0, role: "region", "aria-label": say("command", "命令") }, command),
      copyButton(command, say("copy", "复制")),
    ),
  );
  const starts = pieces.length > 1 ? [el("h3", {}, say("Starts", "各次启动")), piecesTable(pieces, record.totals)] : [];
  return section("run", say("Run", "运行"), ...blocks, list, ...starts);
}
