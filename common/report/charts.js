// Curves and histograms as inline SVG.

// At most about `most` round numbers from `low` to `high`.
function ticks(low, high, most) {
  const rough = (high - low) / most || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.999);
  const first = Math.ceil(low / step - 1e-9);
  const length = Math.floor(high / step + 1e-9) - first + 1;
  return Array.from({ length }, (_, i) => Number(((first + i) * step).toPrecision(12)));
}

function logTicks(low, high) {
  const from = Math.floor(Math.log10(low));
  const powers = Array.from({ length: Math.ceil(Math.log10(high)) - from + 1 }, (_, i) => 10 ** (from + i));
  const factors = high / low > 1000 ? [1] : high / low > 30 ? [1, 3] : [1, 2, 3, 4, 5, 6, 7, 8, 9];
  const found = powers.flatMap((power) => factors.map((factor) => Number((factor * power).toPrecision(3))));
  const inside = found.filter((value) => value >= low && value <= high);
  return inside.length > 7 ? inside.filter((_, i) => i % 2 === 0) : inside.length > 1 ? inside : ticks(low, high, 4);
}

// The range of values with some air; a flat curve lies in its middle.
function range(values, log) {
  const low = Math.min(...values),
    high = Math.max(...values);
  if (log) return low === high ? [low / 1.5, high * 1.5] : [low / (high / low) ** 0.04, high * (high / low) ** 0.04];
  const air = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
  return [low >= 0 ? Math.max(0, low - air) : low - air, high + air];
}

function scale([low, high], start, end, log) {
  const place = log ? Math.log : Number;
  return (value) => start + ((place(value) - place(low)) / (place(high) - place(low) || 1)) * (end - start);
}

// A gap in the curve is where a value was not finite.
function pathOf(points, x, y) {
  let gap = true;
  return points
    .map(([step, value]) => {
      if (value === null) gap = true;
      else {
        const part = `${gap ? "M" : "L"}${x(step).toFixed(1)} ${y(value).toFixed(1)}`;
        gap = false;
        return part;
      }
      return "";
    })
    .join("");
}

function pointsOf(curve) {
  return curve ? curve[0].map((step, i) => [step, curve[1][i]]) : [];
}

function extremeOf(points, lowest) {
  const finite = points.filter(([, value]) => value !== null);
  return finite.reduce(
    (best, point) => (best === null || (lowest ? point[1] < best[1] : point[1] > best[1]) ? point : best),
    null,
  );
}

function describe({ series, format }) {
  const at = ([step, value]) => say(`${format(value)} at step ${count(step)}`, `第 ${count(step)} 步 ${format(value)}`);
  return series
    .map(({ name, points }) => {
      const finite = points.filter(([, value]) => value !== null);
      if (!finite.length) return say(`${name}: no finite value`, `${name}：没有有限的数值`);
      const [first, last, low, high] = [
        finite[0],
        finite.at(-1),
        extremeOf(finite, true),
        extremeOf(finite, false),
      ].map(at);
      return say(
        `${name}: ${first} to ${last}; lowest ${low}, highest ${high}.`,
        `${name}：从${first}到${last}；最低${low}，最高${high}。`,
      );
    })
    .join(" ");
}

// series: [{name, kind, points: [[step, value]], rare}]; kind is a class of the style, as in "first"; rare points get dots.
function chart({
  title,
  series,
  format = short,
  log = false,
  best = null,
  lowest = null,
  tall = false,
  extra = null,
  epochs = null,
}) {
  series = series.filter(({ points }) => points.length);
  if (!series.length) return null;
  const plot = { series, format, log, best, lowest, epochs, tall };
  const legend = series.map(({ name, kind, points }) => {
    const value = el("b", {}, format(points.at(-1)[1]));
    return el("span", { class: `key ${kind}` }, series.length > 1 ? [el("i", {}), name] : null, value);
  });
  const canvas = el("div", { class: "canvas", role: "img", tabindex: 0, "aria-label": `${title}. ${describe(plot)}` });
  new ResizeObserver(() => drawChart(canvas, plot)).observe(canvas);
  const head = el("figcaption", {}, el("strong", {}, title), el("span", { class: "legend" }, legend), extra);
  return el("figure", { class: tall ? "tall" : null }, head, canvas);
}

function drawChart(canvas, plot) {
  const width = canvas.clientWidth,
    height = plot.tall ? 280 : 150;
  if (!width || canvas.drawn === width) return;
  canvas.drawn = width;
  const all = plot.series.flatMap(({ points }) => points);
  const values = all.map(([, value]) => value).filter((value) => value !== null && (!plot.log || value > 0));
  if (!values.length)
    return canvas.replaceChildren(el("p", { class: "quiet" }, say("no finite value", "没有有限的数值")));
  const steps = all.map(([step]) => step),
    yRange = range(values, plot.log);
  const xRange = [Math.min(0, ...steps), Math.max(...steps)];
  const yTicks = plot.log ? logTicks(...yRange) : ticks(...yRange, plot.tall ? 6 : 4);
  const left = Math.max(...yTicks.map((value) => plot.format(value).length)) * 6.6 + 12;
  const x = scale(xRange, left, width - 12),
    y = scale(yRange, height - 24, 8, plot.log);
  const svg = el(
    "svg",
    { viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" },
    axes(plot, x, y, xRange, yTicks, width, height, left),
  );
  for (const { kind, points, rare } of plot.series) {
    const usable = plot.log ? points.map(([step, value]) => [step, value > 0 ? value : null]) : points;
    svg.append(
      el("path", { d: pathOf(usable, x, y), class: `curve ${kind} ${points.length > width / 2 ? "dense" : ""}` }),
    );
    const finite = usable.filter(([, value]) => value !== null);
    const dots = finite.length === 1 || (rare && finite.length <= 40) ? finite : [];
    svg.append(...dots.map(([step, value]) => el("circle", { cx: x(step), cy: y(value), r: 3, class: `dot ${kind}` })));
  }
  svg.append(...bestMarks(plot, x, y, width, height));
  const cursor = el("line", { class: "cursor", y1: 8, y2: height - 24, visibility: "hidden" });
  const tip = el("div", { class: "tip", hidden: "" });
  svg.append(cursor);
  canvas.replaceChildren(svg, tip);
  follow(
    canvas,
    plot,
    x,
    [...new Set(steps)].sort((a, b) => a - b),
    cursor,
    tip,
  );
}

function axes(plot, x, y, xRange, yTicks, width, height, left) {
  const rows = yTicks.map((value) => [
    el("line", { class: "grid", x1: left, x2: width - 12, y1: y(value), y2: y(value) }),
    el("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, plot.format(value)),
  ]);
  const columns = ticks(...xRange, Math.max(2, width / 110))
    .filter(Number.isInteger)
    .map((step) =>
      el("text", { x: x(step), y: height - 6, "text-anchor": x(step) > width - 30 ? "end" : "middle" }, count(step)),
    );
  return [...rows.flat(), ...columns];
}

// The kept checkpoint as a line with its step; without one, a ring at the lowest value of one curve.
function bestMarks({ series, best, lowest, log, format, tall }, x, y, width, height) {
  if (known(best)) {
    const line = el("line", { class: "best", x1: x(best), x2: x(best), y1: 8, y2: height - 24 });
    const end = x(best) > width - 130;
    const place = { class: "best", x: x(best) + (end ? -6 : 6), y: 18, "text-anchor": end ? "end" : "start" };
    return tall ? [line, el("text", place, say(`best: step ${count(best)}`, `最佳：第 ${count(best)} 步`))] : [line];
  }
  const point = extremeOf(series.find(({ kind }) => kind === lowest)?.points ?? [], true);
  if (!point || (log && point[1] <= 0)) return [];
  const place = { x: Math.min(x(point[0]), width - 14), y: y(point[1]) - 12, "text-anchor": "end", class: "best" };
  return [
    el("circle", { class: "best", cx: x(point[0]), cy: y(point[1]), r: 6 }),
    el("text", place, say(`lowest: ${format(point[1])}`, `最低：${format(point[1])}`)),
  ];
}

// The values at the step under the pointer, or at the step that the arrow keys reach.
function follow(canvas, plot, x, steps, cursor, tip) {
  let at = steps.length - 1;
  const show = (index) => {
    at = Math.max(0, Math.min(steps.length - 1, index));
    const step = steps[at];
    const epoch = plot.epochs ? ` · ${say("epoch", "轮次")} ${fixed(step * plot.epochs)}` : "";
    const values = plot.series.map(({ name, kind, points }) => {
      const point = points.find(([other]) => other === step);
      return point ? el("div", { class: `key ${kind}` }, el("i", {}), name, el("b", {}, plot.format(point[1]))) : null;
    });
    tip.replaceChildren(
      el("div", { class: "step" }, `${say("step", "步")} ${count(step)}${epoch}`),
      ...values.filter(Boolean),
    );
    tip.hidden = false;
    tip.style.left = `${Math.max(0, Math.min(canvas.clientWidth - tip.offsetWidth, x(step) + 10))}px`;
    for (const side of ["x1", "x2"]) cursor.setAttribute(side, x(step));
    cursor.setAttribute("visibility", "visible");
  };
  const hide = () => {
    tip.hidden = true;
    cursor.setAttribute("visibility", "hidden");
  };
  canvas.onpointermove = ({ clientX }) => {
    const place = clientX - canvas.getBoundingClientRect().left;
    show(steps.reduce((best, step, i) => (Math.abs(x(step) - place) < Math.abs(x(steps[best]) - place) ? i : best), 0));
  };
  canvas.onpointerleave = canvas.onblur = hide;
  canvas.onkeydown = (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    if (event.key === "Escape") hide();
    if (move === undefined) return;
    event.preventDefault();
    show(tip.hidden ? at : at + move);
  };
}

// A histogram of lengths in tokens: {name, limit, percentiles, edges, counts}.
function histogram({ limit, percentiles, edges = [], counts = [] }, title) {
  if (!counts.length || edges.length !== counts.length + 1) return null;
  const longest = percentiles?.["100"] ?? edges.at(-1);
  const within = known(limit) && limit <= edges.at(-1) * 3;
  const points = Object.entries(percentiles ?? {}).map(
    ([share, tokens]) => `${share === "100" ? say("longest", "最长") : `${share}%`} ${count(tokens)}`,
  );
  const limitText = known(limit) ? say(`limit ${count(limit)}`, `上限 ${count(limit)}`) : say("no limit", "无上限");
  const label = `${title}. ${points.join(", ")}; ${limitText}`;
  const canvas = el("div", { class: "canvas", role: "img", "aria-label": label });
  const draw = () => drawHistogram(canvas, edges, counts, within ? limit : null, longest);
  new ResizeObserver(draw).observe(canvas);
  const over = known(limit) && longest > limit;
  const note = el("span", { class: over ? "key over" : "key" }, limitText);
  return el(
    "figure",
    { class: "lengths" },
    el("figcaption", {}, el("strong", {}, title), note),
    canvas,
    el("p", { class: "quiet" }, points.join(" · ")),
  );
}

function drawHistogram(canvas, edges, counts, limit, longest) {
  const width = canvas.clientWidth,
    height = 104;
  if (!width || canvas.drawn === width) return;
  canvas.drawn = width;
  const end = Math.max(edges.at(-1), longest, (limit ?? 0) * 1.04);
  const x = scale([edges[0], end], 8, width - 8),
    y = scale([0, Math.max(...counts, 1)], height - 22, 6);
  const bars = counts.map((number, i) => {
    const from = x(edges[i]),
      to = x(edges[i + 1]);
    const over = limit !== null && edges[i] >= limit;
    const size = {
      x: from,
      y: y(number),
      width: Math.max(0.5, to - from - (to - from > 3 ? 1 : 0)),
      height: height - 22 - y(number),
    };
    return el("rect", { ...size, class: over ? "bar over" : "bar" });
  });
  const numbers = ticks(edges[0], end, Math.max(2, width / 70)).map((tokens) =>
    el(
      "text",
      {
        x: x(tokens),
        y: height - 6,
        "text-anchor": x(tokens) > width - 24 ? "end" : x(tokens) < 20 ? "start" : "middle",
      },
      count(tokens),
    ),
  );
  const line =
    limit === null ? [] : [el("line", { class: "limit", x1: x(limit), x2: x(limit), y1: 4, y2: height - 22 })];
  const floor = el("line", { class: "grid", x1: 8, x2: width - 8, y1: height - 22, y2: height - 22 });
  canvas.replaceChildren(
    el("svg", { viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" }, floor, bars, line, numbers),
  );
}
