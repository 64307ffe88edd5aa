// What is on the page, drawn into a document or a shadow root.

import {html, said, scale} from "./tools.js";
import {drawNumbers} from "./numbers.js";
import {drawGlance, drawHeads, drawPairs, telling} from "./heads.js";
import {drawExplorer} from "./explorer.js";
import {drawAlong} from "./strip.js";
import {drawEdits} from "./edits.js";
import {drawSweep} from "./sweep.js";
import {drawCompared} from "./compare.js";

const picker = (node, choices, value, changed) => {
  if (!node) return;
  node.replaceChildren(...choices.map(([of, name]) => {
    const option = html("option", {}, name);
    option.value = of;
    return option;
  }));
  node.value = value;
  node.onchange = () => changed(node.value);
};

const drawMeasured = page => {
  const {data, $, state} = page, metrics = telling(data);
  state.metric = metrics.includes(data.glance.metric) ? data.glance.metric : metrics[0];
  const withCells = label => state.metric && label in data.cells[state.metric];
  if (!withCells("all") && data.texts.length) state.text = data.texts[0].label;
  const choices = data.texts.filter(text => text.label !== "all").map(text => [text.label, text.name]);
  picker($("metric-picker"), metrics.map(metric => [metric, data.names[metric]]), state.metric, metric => { state.metric = metric; drawHeads(page); });
  picker($("text-picker"), withCells("all") ? [["all", said(data, "all texts (mean)")], ...choices] : choices, state.text, text => {
    state.text = text;
    drawHeads(page);
    drawAlong(page);
  });
  const best = state.metric && data.cells[state.metric][state.text];
  if (best && Array.isArray(best.value)) {
    const flat = best.value.flat(), most = below => Math.max(...flat.filter(x => x !== null && x < below));
    const at = flat.indexOf(Number.isFinite(most(0.9)) ? most(0.9) : most(Infinity));  // all on the sink shows nothing else
    [state.layer, state.head] = [Math.floor(at / data.heads.length), at % data.heads.length].map(i => Math.max(0, i));
  }
  if ($("profile-picker")) $("profile-picker").onchange = () => drawAlong(page);
  drawNumbers(page);
  const draw = () => {
    drawGlance(page);
    drawHeads(page);
    if (data.patterns) drawExplorer(page);
    drawAlong(page);
    if (data.attention && $("pairs")) drawPairs(page);
  };
  draw();
  return draw;
};

const DRAW = {measure: drawMeasured, evaluate: drawEdits, sweep: drawSweep, compare: drawCompared};

export const start = (root, data) => {
  const listeners = new Map(), $ = id => root.getElementById(id);
  const page = {root, data, $, state: {text: "all", layer: 0, head: 0}, colours: scale(data.colours || []), opened: new Map(), picker};
  page.listen = (topic, name, act) => listeners.set(`${topic} ${name}`, act);
  page.tell = topic => { for (const [name, act] of listeners) if (name.startsWith(`${topic} `)) act(); };
  page.pickHead = (layer, head) => { Object.assign(page.state, {layer, head}); page.tell("head"); };
  const draw = DRAW[data.kind](page), host = root.querySelector(".report");
  let wide = host.clientWidth, waiting = 0;
  new ResizeObserver(() => {  // drawn in the page's own pixels: once more where there is more or less room
    if (Math.abs(host.clientWidth - wide) < 8) return;
    wide = host.clientWidth;
    clearTimeout(waiting);
    waiting = setTimeout(draw, 120);
  }).observe(host);
};
