// Several reports on one page: each number on one axis, maps in one scale, their difference, the heads that differ most.

import {at, diverging, extent, html, mean, number, signed} from "./tools.js";
import {axisOf, interval} from "./numbers.js";
import {chart} from "./chart.js";
import {grid} from "./grid.js";
import {telling} from "./heads.js";

const KINDS = ["main", "second", "third", "fourth", "fifth"];

export const drawCompared = page => {
  const {data, $, state} = page;
  drawRows(page);
  if (data.of === "evaluate" || data.reports.some(report => report.over && report.over !== "heads")) return () => {};
  const all = data.reports.map(telling), shared = all[0].filter(metric => all.every(metrics => metrics.includes(metric)));
  $("maps-section").hidden = !shared.length;
  if (!shared.length) return () => {};
  const first = data.reports[0].glance.metric;
  Object.assign(state, {metric: shared.includes(first) ? first : shared[0], one: 0, other: 1});
  const draw = () => { drawMaps(page); drawDifference(page); drawLines(page); };
  page.picker($("metric-picker"), shared.map(metric => [metric, data.reports[0].names[metric]]), state.metric, metric => { state.metric = metric; draw(); });
  const names = data.names.map((name, i) => [i, name]);
  for (const [side, at] of [["one", 0], ["other", 1]])
    page.picker($(`${side}-picker`), names, at, i => { state[side] = +i; drawDifference(page); });
  draw();
  return draw;
};

const drawRows = ({root, data}) => {
  const of = data.of === "measure" ? "value" : "delta", points = row => row && {value: row[of], low: row.low, high: row.high, null: row.null};
  for (const cell of root.querySelectorAll("td.drawn")) {
    const {in: found} = data.rows[+cell.dataset.row], name = found.find(Boolean)?.name || "";
    const rows = found.map(points).map((row, i) => row && {...row, kind: KINDS[i % KINDS.length]}), known = rows.filter(row => (row?.value ?? null) !== null);
    if (known.length) cell.replaceChildren(interval(rows, axisOf(known, name), `${name}: ${known.map(row => number(row.value)).join(", ")}`));
  }
  for (const swatch of root.querySelectorAll("[data-report]")) swatch.classList.add(KINDS[+swatch.dataset.report % KINDS.length]);
};

const tableOf = (report, metric) => report.layers.map((_, r) => report.heads.map((_, c) => at(report.cells[metric].all.value, r, c)));

const drawMaps = ({data, $, state, colours}) => {
  const tables = data.reports.map(report => tableOf(report, state.metric)), [least, most] = extent(tables.flat(2));
  const swept = data.of === "sweep", reach = Math.max(1e-9, Math.abs(least), Math.abs(most));  // what edits cost has two signs
  const chance = swept ? "placebo" : "null";
  const range = swept ? [-reach, reach] : [Math.min(0, Number.isFinite(least) ? least : 0), Number.isFinite(most) ? most : 1];
  $("maps").replaceChildren(...data.reports.map((report, i) => {
    const figure = html("figure"), host = html("div", {class: "scroll"}), say = html("output", {"aria-live": "polite"});
    figure.append(html("figcaption", {}, `${data.names[i]} (${report.model})`), host, say);
    requestAnimationFrame(() => {
      const value = tables[i], nulls = report.cells[state.metric].all.null;
      grid(host, {
        rows: report.layers, columns: report.heads, value, rowName: "layer", columnName: "head", range, mark: Array.isArray(nulls) ? null : nulls, wide: 420,
        label: `${report.names[state.metric]} of ${data.names[i]}`, cellName: (r, c) => `layer ${report.layers[r]}, head ${report.heads[c]}`,
        say: (r, c) => { say.textContent = `Layer ${report.layers[r]}, head ${report.heads[c]}: ${number(value[r][c])}; ${chance} ${number(at(nulls, r, c))}`; },
      }, swept ? diverging() : colours);
    });
    return figure;
  }));
};

const drawDifference = ({data, $, state}) => {
  const [a, b] = [data.reports[state.one], data.reports[state.other]], same = String([a.layers, a.heads]) === String([b.layers, b.heads]);
  $("difference-figure").hidden = !same;
  $("unlike").hidden = same;
  if (!same) return;
  const [one, other] = [a, b].map(report => tableOf(report, state.metric));
  const value = one.map((row, r) => row.map((y, c) => y === null || other[r][c] === null ? null : other[r][c] - y));
  const reach = Math.max(1e-9, ...value.flat().map(y => Math.abs(y ?? 0)));
  $("difference-caption").textContent = `${data.names[state.other]} minus ${data.names[state.one]}: ${a.names[state.metric]}`;
  const say = (r, c) => {
    $("difference-readout").textContent = `Layer ${a.layers[r]}, head ${a.heads[c]}: ${signed(value[r][c])} (${number(one[r][c])} and ${number(other[r][c])})`;
  };
  const {mark} = grid($("difference"), {
    rows: a.layers, columns: a.heads, value, rowName: "layer", columnName: "head", range: [-reach, reach], mark: 0, wide: 420,
    label: "difference by layer and head", cellName: (r, c) => `layer ${a.layers[r]}, head ${a.heads[c]}`, say,
  }, diverging());
  const most = value.flatMap((row, r) => row.map((y, c) => ({y, r, c}))).filter(head => head.y).sort((p, q) => Math.abs(q.y) - Math.abs(p.y));
  $("differ").replaceChildren(...most.slice(0, 8).map(({y, r, c}) => {
    const item = html("li"), button = html("button", {type: "button"}, `layer ${a.layers[r]}, head ${a.heads[c]}: ${signed(+y.toPrecision(3))}`);
    button.onclick = () => { mark(r, c); say(r, c); };
    item.append(button);
    return item;
  }));
};

// By depth, each report's mean of heads on one axis; where the numbers of layers differ, by share of the depth.
const drawLines = ({data, $, state}) => {
  const same = data.reports.every(report => String(report.layers) === String(data.reports[0].layers)), points = same ? data.reports[0].layers : Array.from({length: 41}, (_, i) => i / 40);
  const series = report => tableOf(report, state.metric).map(mean), at01 = (values, share) => values[Math.round(share * (values.length - 1))];
  const lines = data.reports.map((report, i) => ({kind: KINDS[i % KINDS.length], name: data.names[i].slice(0, 14), y: same ? series(report) : points.map(share => at01(series(report), share))}));
  const nulls = data.reports.map(report => report.cells[state.metric].all.null).filter(y => typeof y === "number");
  if (nulls.length) lines.push({kind: "null", name: nulls.length > 1 ? "chance (mean)" : "chance", y: points.map(() => mean(nulls))});
  $("lines-caption").textContent = `${data.reports[0].names[state.metric]}, mean of heads`;
  chart($("lines"), {
    x: points, lines, direct: true, wide: 720, parts: !same, xName: same ? "layer" : "share of the depth", label: `${state.metric} by depth`,
    tell: i => `${same ? "Layer" : "Depth"} ${number(points[i])}: ${lines.map(line => `${line.name} ${number(line.y[i])}`).join("; ")}`,
    say: words => { $("lines-readout").textContent = words; },
  });
};

