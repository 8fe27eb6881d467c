// What came out: the first numbers, scores, curves, answers while training.

// The few numbers that a reader looks for first: [name, value or null, remark].
function firstNumbers() {
  const { curves, totals, scores } = record;
  const { base = {}, tuned = {} } = scores ?? {};
  const text = (value, digits) => (known(value) ? fixed(value, digits) : null);
  const before = (name, digits) => (known(base[name]) ? `${say("base", "基座")} ${fixed(base[name], digits)}` : "");
  const last = (name) => curves[name]?.[1].at(-1);
  const first = curves.loss?.[1][0];
  const rate = !running && totals.tokens && totals.seconds ? totals.tokens / totals.seconds : last("tokens_per_second");
  const tokens = totals.tokens ? say(`${count(totals.tokens)} tokens`, `共 ${count(totals.tokens)} 个 token`) : "";
  return [
    ["ROUGE-L", text(tuned["rouge-l"], 2), before("rouge-l", 2)],
    ["BLEU-4", text(tuned["bleu-4"], 2), before("bleu-4", 2)],
    [say("validation loss", "验证损失"), text(tuned.loss ?? last("eval_loss"), 4), before("loss", 4)],
    [
      say("training loss", "训练损失"),
      text(last("loss"), 4),
      known(first) ? say(`first ${fixed(first, 4)}`, `最初 ${fixed(first, 4)}`) : "",
    ],
    [say("tokens/s", "token/秒"), known(rate) ? count(Math.round(rate)) : null, tokens],
  ];
}

function figures() {
  const items = firstNumbers()
    .filter(([, value]) => value !== null)
    .map(([name, value, remark]) =>
      el("li", {}, el("span", {}, name), el("strong", {}, value), el("small", {}, remark)),
    );
  return items.length ? el("ul", { class: "figures" }, items) : null;
}

function scoreCell(name, side, digits) {
  const value = record.scores[side][name];
  if (!known(value) || !/^(rouge|bleu)/.test(name)) return fixed(value, digits);
  const fill = el("i", { class: side });
  fill.style.width = `${Math.min(100, value)}%`;
  const meter = el("span", { class: "meter", "aria-hidden": "true" }, fill);
  return el("div", { class: "score" }, fixed(value, digits), meter);
}

function scoresSection() {
  const { base, tuned } = record.scores ?? {};
  const both = base && tuned;
  const sides = [
    ["base", say("base", "基座")],
    ["tuned", say("tuned", "微调后")],
  ].filter(([side]) => record.scores?.[side]);
  if (!sides.length) return null;
  const names = [
    ["rouge-1", "ROUGE-1", 2],
    ["rouge-2", "ROUGE-2", 2],
    ["rouge-l", "ROUGE-L", 2],
    ["bleu-4", "BLEU-4", 2],
    ["loss", say("loss ↓", "损失 ↓"), 4],
    ["perplexity", say("perplexity ↓", "困惑度 ↓"), 3],
    ["probe_loss", say("loss on general questions ↓", "通用问题损失 ↓"), 4],
    ["empty", say("empty answers ↓", "空回答 ↓"), 0],
  ].filter(([name]) => known(tuned?.[name]) || known(base?.[name]));
  const ratio = (name) => (base[name] && known(tuned[name]) ? `${fixed(tuned[name] / base[name])}×` : "–");
  const lines = names.map(([name, label, digits]) => [
    label,
    ...sides.map(([side]) => scoreCell(name, side, digits)),
    ...(both ? [ratio(name)] : []),
  ]);
  const heads = [say("score", "指标"), ...sides.map(([, label]) => label)];
  if (both) heads.push(say("tuned / base", "微调后 / 基座"));
  const title = say("Result", "结果");
  const note = say(
    "ROUGE and BLEU go from 0 to 100, and more is better; where ↓ stands, less is better.",
    "ROUGE 与 BLEU 为 0 到 100，越高越好；带 ↓ 的越低越好。",
  );
  return section("scores", title, table(title, heads, lines, [1, 2, 3]), el("p", { class: "quiet" }, note));
}

function curvesSection() {
  const { steps, epochs } = record.progress ?? {};
  const series = (name, label, kind = "first") => ({
    name: label,
    kind,
    points: pointsOf(record.curves[name]),
    rare: name.startsWith("eval_"),
  });
  const common = { epochs: steps && epochs ? epochs / steps : null };
  const single = (name, title, format) => chart({ ...common, title, format, series: [series(name, title)] });
  const toggle = el(
    "button",
    {
      type: "button",
      id: "log",
      "aria-pressed": String(!!state.log),
      click: () => ((state.log = !state.log), render()),
    },
    say("log scale", "对数刻度"),
  );
  const loss = chart({
    ...common,
    tall: true,
    log: state.log,
    best: record.best_step,
    lowest: "second",
    extra: toggle,
    title: say("Loss", "损失"),
    series: [series("loss", say("training", "训练")), series("eval_loss", say("validation", "验证"), "second")],
  });
  const scores = [
    ["eval_rouge-l", "ROUGE-L", "first"],
    ["eval_bleu-4", "BLEU-4", "second"],
    ["eval_rouge-1", "ROUGE-1", "third"],
    ["eval_rouge-2", "ROUGE-2", "fourth"],
  ];
  const small = [
    chart({
      ...common,
      title: say("Validation scores", "验证得分"),
      best: record.best_step,
      series: scores.map((score) => series(...score)),
    }),
    single("learning_rate", say("Learning rate", "学习率")),
    single("grad_norm", say("Gradient norm", "梯度范数")),
    single("tokens_per_second", say("Tokens per second", "每秒 token 数")),
    single("memory", say("Memory in use", "内存占用"), bytes),
  ];
  if (!loss && small.every((part) => part === null)) return null;
  return section("curves", say("Curves", "曲线"), loss, el("div", { class: "grid" }, small));
}

// The answers to one question side by side, in full lines if their number allows it.
function answersList(answers, i, reference) {
  const items = answers.map(({ step, answers: texts }) => {
    const text = texts?.[i];
    const title = el("b", {}, say(`step ${count(step)}`, `第 ${count(step)} 步`));
    return el("li", {}, title, passage(text, compared(text, reference)));
  });
  const list = el("ol", { class: "answers", tabindex: 0, "aria-label": say("answers by step", "各步的回答") }, items);
  list.style.setProperty("--columns", [4, 3, 5].find((columns) => items.length % columns === 0) ?? 4);
  return list;
}

function samplesSection() {
  const { rows: questions, answers } = record.samples ?? {};
  if (!questions?.length || !answers?.length) return null;
  const [shown, all] = [answers.length, record.totals.evaluations];
  const some = say(`${shown} of ${count(all)} evaluations are shown.`, `显示 ${count(all)} 次评测中的 ${shown} 次。`);
  const parts = questions.map(({ question, reference }, i) =>
    el(
      "article",
      { class: "sample" },
      el("p", {}, el("b", {}, say("question", "问题")), question ?? "–"),
      known(reference) ? el("p", {}, el("b", {}, say("reference", "参考答案")), reference) : null,
      answersList(answers, i, reference),
    ),
  );
  const note = all > shown ? el("p", { class: "quiet" }, some) : null;
  return section("samples", say("Answers while training", "训练中的回答"), note, ...parts);
}
