// The page of edits: each one's difference with its interval and its placebo, over a number, and along the text.

import {html, mean, number, percent, signed} from "./tools.js";
import {axisOf, interval} from "./numbers.js";
import {chart} from "./chart.js";
import {windowed} from "./strip.js";

const NONE = "none";
const band = (low, high, name, kind) => ({low, high, name, kind});

export const drawEdits = page => {
  const {data, $, state} = page, edits = data.edits.filter(edit => edit.name !== NONE);
  const by = Object.fromEntries(data.edits.map(edit => [edit.name, edit]));
  Object.assign(page, {by, edits});
  const largest = edits.filter(edit => edit.delta !== null && !edit.placebo_of).sort((a, b) => b.delta - a.delta)[0];
  state.edit = (largest || edits[0] || data.edits[0]).name;
  state.text = data.texts.length ? data.texts[0].label : null;
  state.family = 0;
  drawTable(page);
  const choose = name => { state.edit = name; page.tell("edit"); };
  page.choose = choose;
  page.picker($("edit-picker"), edits.map(edit => [edit.name, edit.shown]), state.edit, choose);
  page.picker($("text-picker"), data.texts.map(text => [text.label, text.name]), state.text, label => { state.text = label; drawLosses(page); });
  page.picker($("family-picker"), data.families.map((family, i) => [i, family.name]), 0, i => { state.family = +i; drawFamily(page, true); });
  page.listen("edit", "all", () => { $("edit-picker").value = state.edit; drawLosses(page); drawFamily(page); });
  const draw = () => { drawFamily(page); drawLosses(page); };
  draw();
  return draw;
};

const drawTable = ({root, data, edits}) => {
  const unseen = edit => edit.placebos && edit.placebos.delta !== null && !edits.some(other => other.placebo_of === edit.name) ? edit.placebos : null;
  const deltas = [...edits, ...edits.map(unseen).filter(Boolean)].map(({delta, low = null, high = null}) => ({value: delta, low, high}));
  const range = axisOf(deltas, "");
  for (const cell of root.querySelectorAll("td.drawn")) {
    const edit = data.edits[+cell.dataset.row], kind = edit.placebo_of ? "placebo" : "main";
    if (edit.delta === null || edit.name === NONE) continue;
    const marks = [{value: edit.delta, low: edit.low, high: edit.high, kind}], beside = unseen(edit);
    if (beside) marks.push({value: beside.delta, low: null, high: null, kind: "placebo"});
    cell.replaceChildren(interval(marks, range, `difference ${signed(edit.delta)} nats${beside ? `; placebo ${signed(beside.delta)}` : ""}`));
  }
  for (const cell of root.querySelectorAll("td.share")) {
    const {sink_mass: value} = data.edits[+cell.dataset.row];
    if (value === null) continue;
    const bar = html("span", {class: "fill", "aria-hidden": "true"});
    bar.style.setProperty("--share", value.toFixed(3));
    cell.append(bar);
  }
};

// Edits that differ in one number: their difference over it, the placebos' beside it, and a slider.
const drawFamily = (page, jump) => {
  const {data, $, state, by} = page, family = data.families[state.family];
  if (!family) return;
  const {values, edits, placebos} = family, of = (names, key) => names.map(name => name && by[name] ? by[name][key] : null);
  const slider = $("family-slider"), here = edits.indexOf(state.edit), now = Math.max(0, here);
  Object.assign(slider, {min: 0, max: values.length - 1, step: 1, value: now});
  const beside = edits.map((name, i) => placebos[i] && by[placebos[i]] ? by[placebos[i]].delta : by[name].placebos ? by[name].placebos.delta : null);
  const words = i => `${family.over} = ${values[i]}: ${signed(by[edits[i]].delta)} nats`
    + (beside[i] !== null ? `; placebo ${signed(beside[i])}` : "") + `; on the first token ${percent(by[edits[i]].sink_mass)}`;
  const say = i => { slider.setAttribute("aria-valuetext", words(i)); $("family-readout").textContent = words(i); };
  slider.oninput = () => { page.choose(edits[+slider.value]); };
  const lines = [{kind: "main", name: "edit", y: of(edits, "delta")}];
  if (beside.some(y => y !== null)) lines.push({kind: "placebo", name: "placebo", y: beside});
  $("family-caption").textContent = `Difference in loss (nats per token) over ${family.over}, of ${family.name}`;
  const {move} = chart($("family"), {
    x: values, lines, band: band(of(edits, "low"), of(edits, "high"), "95% interval"), zero: true, direct: true, wide: 560, xName: family.over, parts: true,
    label: `difference in loss over ${family.over}`, tell: words, say: (_, i) => say(i), pick: i => page.choose(edits[i]),
  });
  move(now);
  say(now);
  if (jump && here < 0) page.choose(edits[0]);
};

const smooth = (values, reach) => {
  const sums = [0], counts = [0];
  values.forEach((y, i) => { sums.push(sums[i] + (y ?? 0)); counts.push(counts[i] + (y === null ? 0 : 1)); });
  return values.map((y, i) => {
    const from = Math.max(0, i - reach), to = Math.min(values.length, i + reach + 1), known = counts[to] - counts[from];
    return y === null || !known ? null : (sums[to] - sums[from]) / known;
  });
};

const drawLosses = page => {
  const {data, $, state, by} = page, text = data.texts.find(one => one.label === state.text);
  if (!text) return;
  const edited = text.losses[state.edit] || [], clean = text.losses[NONE] || edited.map(() => null);
  const placebo = page.edits.find(edit => edit.placebo_of === state.edit), x = clean.map((_, i) => text.first + i);
  const delta = clean.map((y, i) => y === null || edited[i] === null || edited[i] === undefined ? null : edited[i] - y);
  const reach = Math.max(1, Math.round(clean.length / 60)), shown = by[state.edit].shown;
  const tell = i => `Position ${x[i]}${text.tokens[x[i]] ? ` “${text.tokens[x[i]]}”` : ""}: loss ${number(clean[i])} unedited, ${number(edited[i])} edited; difference ${signed(delta[i])}`;
  drawStretches(page, text, placebo, shown);
  const lines = [{kind: "null", name: "unedited", y: smooth(clean, reach)}, {kind: "main", name: "edited", y: smooth(edited, reach)}];
  if (placebo && text.losses[placebo.name]) lines.push({kind: "placebo", name: "placebo", y: smooth(text.losses[placebo.name], reach)});
  $("loss-caption").textContent = `Loss along “${text.name}” (nats, running mean of ${2 * reach + 1} tokens): ${shown}`;
  const {move} = chart($("losses"), {
    x, lines, direct: true, wide: 1000, xName: "position", label: `loss along the text under ${shown}`, tell,
    say: (words, i) => { $("loss-readout").textContent = words; if (mark) mark(i); },
  });
  const mark = drawTokens(page, text, delta, i => { move(i); $("loss-readout").textContent = tell(i); });
};

// In stretches of the text: the mean difference as an area with its interval, and the placebo's.
const drawStretches = ({$, state}, text, placebo, shown) => {
  const found = text.stretches[state.edit], host = $("stretches");
  $("stretch-figure").hidden = !found;
  if (!found) return;
  const x = found.edges.map(mean), lines = [{kind: "main", name: "difference", y: found.mean}], other = placebo && text.stretches[placebo.name];
  if (other && other.mean.length === x.length) lines.push({kind: "placebo", name: "placebo", y: other.mean});
  $("stretch-caption").textContent = `Difference from the unedited run along “${text.name}” (nats per token): ${shown}`;
  const tell = i => `Positions ${found.edges[i].join(" to ")}: ${signed(found.mean[i])}, 95% interval ${signed(found.low[i])} to ${signed(found.high[i])}`;
  chart(host, {
    x, lines, band: band(found.low, found.high, `95% interval over the tokens of each of ${x.length} stretches`), zero: true, direct: true, wide: 1000,
    xName: "position", label: `difference along the text under ${shown}`, tell, say: words => { $("stretch-readout").textContent = words; },
  });
};

// The text, shaded by the difference of each token's loss: three nats are full.
const drawTokens = ({$, by, state}, text, delta, show) => {
  const host = $("tokens");
  if (host) host.hidden = !text.tokens.length;
  if (!host || host.hidden) return null;
  const shaded = position => {
    const y = delta[position - text.first];
    return [y > 0 ? "--shade" : "--cool", y ? Math.min(1, Math.abs(y) / 3) : 0];
  };
  const named = {tokens: text.tokens, name: `${text.name} under ${by[state.edit].shown}`};
  const mark = windowed(host, named, shaded, i => {
    if (i >= text.first) show(i - text.first);
    else $("loss-readout").textContent = `Position ${i} “${text.tokens[i]}”: not scored`;
  });
  return i => mark(i + text.first);
};
