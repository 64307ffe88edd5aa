// The page of a sweep: what an edit costs at each place, its placebo beside it, in colours that are centred on zero.

import {costColours, html, signed} from "./tools.js";
import {chart} from "./chart.js";
import {grid} from "./grid.js";

export const drawSweep = page => {
  const {data, $, state} = page;
  Object.assign(state, {measure: "delta", text: "all"});
  const draw = () => {
    if (data.over === "heads") drawCosts(page);
    else drawCostCurve(page);
  };
  page.picker($("measure-picker"), Object.entries(data.measures), state.measure, measure => { state.measure = measure; draw(); });
  page.picker($("text-picker"), Object.entries(data.names), state.text, text => { state.text = text; draw(); });
  draw();
  drawDearest(page);
  return draw;
};

const tellCost = ({data, state}, r, c) => {
  const cells = data.cells[state.text], {measure} = state, value = of => cells[of] ? cells[of][r][c] : null;
  const between = value("low") !== null && measure === "delta" ? ` (95% interval ${signed(value("low"))} to ${signed(value("high"))})` : "";
  const other = data.placebo ? `; placebo ${signed(value(`placebo_${measure}`))}` : "";
  return `${placeName(data, r, c)}: ${signed(value(measure))} nats${between}${other}`;
};

const placeName = (data, r, c) => {
  if (data.over === "heads") return `Layer ${data.rows[r]}, head ${data.columns[c]}`;
  if (data.over === "layers") return `Layer ${data.rows[r]}`;
  const token = data.tokens[data.rows[r]];
  return `Position ${data.rows[r]}${token === undefined ? "" : ` “${token}”`}`;
};

const drawCosts = page => {
  const {data, $, state} = page, {measure} = state, scale = data.scales[measure], colours = costColours(scale), marks = [];
  const say = (r, c) => { $("map-readout").textContent = tellCost(page, r, c); };
  const maps = data.placebo ? {map: measure, placebo: `placebo_${measure}`} : {map: measure};
  for (const [id, of] of Object.entries(maps)) {
    const name = of === measure ? data.edit : "its placebo";
    $(`${id}-caption`).textContent = `${name}, by layer and head`;
    const value = data.cells[state.text][of] || data.rows.map(() => data.columns.map(() => null));
    const {mark} = grid($(id), {
      rows: data.rows, columns: data.columns, value, rowName: "layer", columnName: "head", mark: null, range: [-scale.most, scale.most],
      label: `${name}: ${data.measures[measure]} by layer and head`, cellName: (r, c) => placeName(data, r, c).toLowerCase(), say,
      pick: (r, c) => page.pickHead(r, c),
    }, colours);
    marks.push(mark);
  }
  const again = () => { for (const mark of marks) mark(state.layer, state.head); };
  page.listen("head", "maps", () => { again(); say(state.layer, state.head); });
  again();
};

const drawCostCurve = page => {
  const {data, $, state} = page, {measure} = state, cells = data.cells[state.text], of = name => cells[name]?.map(row => row[0]);
  const axis = data.over.slice(0, -1), y = of(measure) || data.rows.map(() => null), other = of(`placebo_${measure}`), low = measure === "delta" ? of("low") : null;
  const lines = [{kind: "main", name: "the edit", y}];
  if (other) lines.push({kind: "placebo", name: "its placebo", y: other});
  $("map-caption").textContent = `${data.edit}: ${data.measures[measure]}, by ${axis}`;
  chart($("map"), {
    x: data.rows, lines, band: low && {low, high: of("high"), name: "95% interval", kind: ""}, zero: true, direct: true, wide: 1000,
    xName: axis, label: `${data.measures[measure]} by ${axis}`, tell: i => tellCost(page, i, 0),
    say: words => { $("map-readout").textContent = words; },
  });
};

// The places that cost most, as a list to pick from.
const drawDearest = page => {
  const {data, $} = page;
  if (data.over !== "heads") return;
  const list = data.top.slice(0, 6).map(({row, column, delta}) => {
    const r = data.rows.indexOf(row), c = data.columns.indexOf(column), item = html("li");
    const button = html("button", {type: "button"}, `layer ${row}, head ${column}: ${signed(delta)}`);
    button.onclick = () => page.pickHead(r, c);
    item.append(button);
    return item;
  });
  $("strongest").replaceChildren(...list);
};
