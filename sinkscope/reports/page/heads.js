// The first picture, the map of heads, and the picture by layer: one metric, every head of it.

import {at, costColours, extent, html, mean, number, said} from "./tools.js";
import {chart} from "./chart.js";
import {grid} from "./grid.js";

const cellsOf = (data, metric, text) => data.cells[metric][text] || {value: null, null: null, std_error: null};
const table = (data, value) => data.layers.map((_, r) => data.heads.map((_, c) => at(value, r, c)));

export const drawGlance = ({data, $}) => {
  const {metric, text} = data.glance;
  if (!metric) return;
  const cells = cellsOf(data, metric, text), value = table(data, cells.value), nulls = table(data, cells.null);
  const series = value.map(mean), chance = nulls.map(mean);
  const spread = data.heads.length > 1 ? 0.7 / data.heads.length : 0;
  const dots = value.flatMap((row, r) => row.map((y, c) => [data.layers[r] + (c - (data.heads.length - 1) / 2) * spread, y]));
  $("glance-caption").textContent = `${data.names[metric]}: every head, by layer`;
  chart($("glance-picture"), {
    x: data.layers, dots: data.layers.length > 1 ? dots : value.flat().map(y => [data.layers[0], y]), dotsName: "one head each", direct: true, wide: 720, high: 260, xName: "layer",
    label: `${data.names[metric]} by layer`,
    lines: [{kind: "main", name: "mean", y: series}, {kind: "null", name: "chance", y: chance}],
    tell: i => `Layer ${data.layers[i]}: ${number(series[i])}; heads ${extent(value[i]).map(number).join(" to ")}; chance ${number(chance[i])}`,
    say: words => { $("glance-readout").textContent = words; },
  });
};

// What is the same in every head says nothing by head; of one head alone it is all there is.
export const telling = data => {
  const all = Object.keys(data.names), one = data.layers.length * data.heads.length === 1;
  const varied = all.filter(metric => Object.values(data.cells[metric]).some(grids => Array.isArray(grids.value)));
  return one || !varied.length ? all : varied;
};

export const drawHeads = page => {
  const {data, $, state} = page;
  if (!state.metric) return;
  const cells = cellsOf(data, state.metric, state.text), name = data.names[state.metric], value = table(data, cells.value);
  $("heat-caption").textContent = `${name}, by layer and head`;
  $("heat-definition").textContent = data.definitions[state.metric] || "";
  const spread = data.scales[state.metric], chance = spread ? "placebo" : "null";  // of a sweep's costs, which may be below zero
  const {mark} = grid($("heat"), {
    range: spread && [-spread.most, spread.most],
    rows: data.layers, columns: data.heads, value, rowName: "layer", columnName: "head", label: `${name} by layer and head`,
    mark: Array.isArray(cells.null) ? null : cells.null,
    cellName: (r, c) => `layer ${data.layers[r]}, head ${data.heads[c]}`,
    say: (r, c) => {
      const error = at(cells.std_error, r, c);
      $("heat-readout").textContent = `Layer ${data.layers[r]}, head ${data.heads[c]}: ${number(value[r][c])}`
        + (error === null ? "" : said(data, ` ± ${number(error)} (standard error across texts)`))
        + `; ${chance} ${number(at(cells.null, r, c))}`;
    },
    pick: (r, c) => page.pickHead(r, c),
  }, spread ? costColours(spread) : page.colours);
  mark(state.layer, state.head);
  page.listen("head", "heat", () => mark(state.layer, state.head));
  const by = cell => table(data, cell).map(mean), series = by(cells.value), nulls = by(cells.null);
  $("progress-caption").textContent = `${name}, by layer`;
  chart($("progress"), {
    x: data.layers, band: state.text === "all" ? data.bands[state.metric] : null, xName: "layer", label: `${name} by layer`,
    lines: [{kind: "main", name: "mean of heads", y: series}, {kind: "null", name: spread ? "the placebo" : "uniform attention (null)", y: nulls}],
    tell: i => `Layer ${data.layers[i]}: ${number(series[i])}; ${chance} ${number(nulls[i])}`,
    say: text => { $("progress-readout").textContent = text; },
  });
  strongest(page, value);
};

// The heads with most of it, as a list to pick from.
const strongest = (page, value) => {
  const {data, $} = page, all = value.flatMap((row, r) => row.map((y, c) => ({y, r, c}))).filter(head => head.y !== null);
  const list = all.sort((a, b) => b.y - a.y).slice(0, 5).map(({y, r, c}) => {
    const button = html("button", {type: "button"}, `layer ${data.layers[r]}, head ${data.heads[c]}: ${number(y)}`);
    button.onclick = () => page.pickHead(r, c);
    const item = html("li");
    item.append(button);
    return item;
  });
  $("strongest").replaceChildren(...list);
};

export const drawPairs = ({data, $, colours}) => {
  const {tokens, queries, value} = data.attention, label = i => queries[i].length > 10 ? `${queries[i].slice(0, 9)}…` : queries[i];
  grid($("pairs"), {
    rows: queries.map((_, i) => i), columns: tokens.map((_, i) => i), value, rowLabel: label, left: 88, bottom: 88, mark: null,
    label: "attention from each query to each key",
    cellName: (r, c) => `query ${r}, key ${c}`,
    say: (r, c) => { $("pairs-readout").textContent = `Query ${r} “${queries[r]}” → key ${c} “${tokens[c]}”: ${number(value[r][c])}`; },
  }, colours);
};
