// One short text: a map of all heads' patterns, and of the picked head its rows and columns, token by token.

import {extent, html, number, percent, roomFor, said, short, svg} from "./tools.js";
import {explore} from "./keys.js";
import {grid} from "./grid.js";
import {patternsOf} from "./patterns.js";

export const drawExplorer = page => {
  const {data, $, state} = page, from = data.patterns, patterns = patternsOf(from);
  Object.assign(state, {token: state.token ?? patterns.T - 1, without: $("without").checked, log: $("log").checked, pinned: state.pinned ?? null});
  let panels = [];
  const row = () => Math.max(0, from.layers.indexOf(data.layers[state.layer])), column = () => Math.max(0, from.heads.indexOf(data.heads[state.head]));
  const map = grid($("map"), {
    rows: from.layers, columns: from.heads, rowName: "layer", columnName: "head", label: "every head’s pattern, by layer and head", wide: 640,
    cellName: (r, c) => `layer ${from.layers[r]}, head ${from.heads[c]}`,
    say: (r, c) => {
      $("map-readout").textContent = `Layer ${from.layers[r]}, head ${from.heads[c]}: ${takenWords(patterns, patterns.index(r, c))}`;
    },
    pick: (r, c) => page.pickHead(data.layers.indexOf(from.layers[r]), data.heads.indexOf(from.heads[c])),
    paint: (context, side) => paintMap(context, side, patterns, from, state, page.colours),
  }, page.colours);
  const redraw = () => {
    map.mark(row(), column());
    const heads = [[row(), column()], ...(state.pinned ? [state.pinned] : [])];
    panels = heads.map(([r, c], i) => panel(page, patterns, r, c, i === 1));
    $("panels").replaceChildren(...panels.map(made => made.node));
    for (const made of panels) made.draw();
    token(state.token);
  };
  const token = i => {
    state.token = i;
    for (const made of panels) made.token(i);
  };
  page.pickToken = token;
  page.pin = head => { state.pinned = head; redraw(); };
  page.listen("head", "explorer", redraw);
  for (const name of ["without", "log"]) $(name).onchange = () => { state[name] = $(name).checked; map.repaint(); redraw(); };
  redraw();
};

const sinkWords = ({sinks, tokens}) => sinks.length ? sinks.map(k => `position ${k} “${tokens[k]}”`).join(", ") : "no sink here";
const takenWords = (patterns, head) => !patterns.there(head) ? "this layer has no such head" : `${percent(patterns.takenOut(head))} of its attention goes to the sink (${sinkWords(patterns)})`;

// Row after row, as many as fit into a frame: thousands of heads keep nobody waiting. A later call ends an earlier one.
const paintMap = (context, side, patterns, from, state, colours) => {
  const width = side * from.heads.length, gap = side > 9 ? 1 : 0, canvas = context.canvas, call = String(Number(canvas.dataset.call || 0) + 1);
  Object.assign(canvas, {width, height: side * from.layers.length});
  canvas.dataset.call = call;
  let r = 0;
  const some = () => {
    for (const end = performance.now() + 25; r < from.layers.length && performance.now() < end; r++) {
      const image = context.createImageData(width, side);
      for (let c = 0; c < from.heads.length; c++)
        patterns.paint(image.data, width, c * side, 0, side - gap, patterns.index(r, c), state, colours);
      context.putImageData(image, 0, r * side);
    }
    if (r < from.layers.length) requestAnimationFrame(() => { if (canvas.dataset.call === call) some(); });
  };
  some();
};

// One head: its title and pin, its pattern, the text shaded, and bars. `token` shows a token's row and column in all of them.
const panel = (page, patterns, r, c, pinned) => {
  const {data, state} = page, from = data.patterns, head = patterns.index(r, c), {tokens} = patterns;
  const node = html("article", {class: "panel"}), title = html("h3", {}, `Layer ${from.layers[r]}, head ${from.heads[c]}`);
  const pin = html("button", {type: "button"}, pinned ? "Unpin" : "Pin beside");
  pin.onclick = () => page.pin(pinned ? null : [r, c]);
  const about = html("p", {class: "soft"}, facts(data, r, c));
  const out = html("p", {class: "soft taken"}), matrix = html("div", {class: "stack matrix"});
  const text = html("div", {class: `tokens short${said(data, "token") === "token" ? "" : " names"}`}), bars = html("div"), say = html("output", {"aria-live": "polite"});
  node.append(title, pin, about, out, matrix, text, say, bars);
  const spans = tokens.map(token => html("span", {role: "option", "aria-selected": "false"}, token));
  const box = html("div", {role: "listbox", "aria-label": `${said(data, "tokens")}, layer ${from.layers[r]}, head ${from.heads[c]}`});
  box.append(...spans);
  text.append(box);
  const reach = explore(box, spans, 1, i => page.pickToken(i));
  const at = {head, node, matrix, bars, out, say, spans, cross: null, reach};
  at.draw = () => { drawMatrix(page, patterns, at); };
  at.token = i => {
    const weights = tokens.map((_, k) => patterns.weight(head, i, k, state.without));
    const received = tokens.map((_, q) => patterns.weight(head, q, i, state.without));
    spans.forEach((span, k) => {
      span.classList.toggle("here", k === i);
      span.style.setProperty("--shade", level(weights[k]));
      span.style.setProperty("--below", level(received[k]));
    });
    at.cross(i);
    drawBars(page, patterns, at, i, weights, received);
    const gone = state.without ? `; ${percent(patterns.taken(head, i))} of its row taken out` : "";
    const best = largest(weights), by = largest(received);
    say.textContent = `${said(data, "Token")} ${i} “${tokens[i]}” looks most at ${name(tokens, best, weights)}; most looks at it from ${name(tokens, by, received)}${gone}.`;
    out.textContent = state.without ? `Without the sink: ${percent(patterns.takenOut(head))} of this head’s attention is taken out (${sinkWords(patterns)}), and each row shared out anew.` : `With the sink: ${takenWords(patterns, head)}.`;
  };
  return at;
};

const level = share => share === null || !share ? "0" : Math.max(0, Math.min(1, 1 + Math.log10(share) / 2.5)).toFixed(3);
const largest = values => values.reduce((best, x, i) => x !== null && x > (values[best] ?? -1) ? i : best, 0);
const name = (tokens, i, values) => values[i] ? `${i} “${tokens[i]}” (${number(+values[i].toPrecision(2))})` : "nothing";

// What was measured of this head, over all texts.
const facts = (data, r, c) => {
  const row = data.layers.indexOf(data.patterns.layers[r]), column = data.heads.indexOf(data.patterns.heads[c]);
  if (row < 0 || column < 0) return "";
  const wanted = ["sink_mass", "row_entropy", "value_drain", "sink_output_share"];
  const known = Object.keys(data.names).filter(metric => wanted.includes(metric.replace(/\[.*/, "")));
  const value = metric => { const grid = (data.cells[metric].all || Object.values(data.cells[metric])[0]).value; return Array.isArray(grid) ? grid[row][column] : grid; };
  return known.length ? `${said(data, "All texts")}: ${known.map(metric => `${data.names[metric]} ${number(value(metric))}`).join("; ")}.` : "";
};

const drawMatrix = (page, patterns, at) => {
  const {state, colours} = page, {T, tokens} = patterns, side = roomFor(at.matrix, 330);
  const ratio = Math.min(2, window.devicePixelRatio || 1), pixels = Math.max(T, Math.floor(side * ratio / T) * T || T);
  const canvas = html("canvas", {role: "img", "aria-label": "the head’s pattern: queries down, keys across"});
  Object.assign(canvas, {width: pixels, height: pixels});
  Object.assign(canvas.style, {left: "0px", top: "0px", width: `${side}px`, height: `${side}px`});
  const context = canvas.getContext("2d"), image = context.createImageData(pixels, pixels);
  patterns.paint(image.data, pixels, 0, 0, pixels, at.head, state, colours);
  context.putImageData(image, 0, 0);
  const over = svg("svg", {viewBox: `0 0 ${T} ${T}`, width: side, height: side, "aria-hidden": "true"});
  const row = svg("rect", {class: "crossrow", x: 0, width: T, height: 1}), column = svg("rect", {class: "crosscolumn", y: 0, width: 1, height: T});
  over.append(row, column);
  at.cross = i => { row.setAttribute("y", i); column.setAttribute("x", i); };
  over.onpointermove = event => {
    const area = over.getBoundingClientRect(), place = (v, start, length) => Math.max(0, Math.min(T - 1, Math.floor((v - start) / length * T)));
    const q = place(event.clientY, area.top, area.height), k = place(event.clientX, area.left, area.width);
    page.pickToken(q);
    const share = patterns.weight(at.head, q, k, state.without);
    at.say.textContent = `Query ${q} “${tokens[q]}” → key ${k} “${tokens[k]}”: ${share === null ? "–" : number(+share.toPrecision(2))}; chance ${number(patterns.chance(q, k, state.without))}`;
  };
  at.matrix.replaceChildren(canvas, over);
};

// Up: where the token looks. Down: who looks at it. Dashed: chance.
const drawBars = (page, patterns, at, i, weights, received) => {
  const {state} = page, {T, tokens} = patterns, W = roomFor(at.bars, 560), H = 168, left = 40, middle = 80, tall = 62, step = (W - left - 6) / T;
  const most = Math.max(extent([...weights, ...received])[1], 0.05);
  const drawing = svg("svg", {viewBox: `0 0 ${W} ${H}`, width: W, height: H, role: "img", "aria-label": `rows and columns of ${said(page.data, "token")} ${i}`});
  const word = (x, y, text, more = {}) => drawing.append(svg("text", {x, y, ...more}, text));
  const area = (values, sign, kind) => values.forEach((share, k) => {
    if (!share) return;
    const high = tall * share / most;
    drawing.append(svg("rect", {class: kind, x: left + k * step + 0.5, width: Math.max(1, step - 1), y: sign < 0 ? middle - high : middle, height: high}));
  });
  area(weights, -1, "bar row");
  area(received, 1, "bar column");
  const line = (sign, of) => tokens.map((_, k) => of(k)).map((y, k, all) => y === null ? "" :
    `${k && all[k - 1] !== null ? "L" : "M"}${(left + (k + 0.5) * step).toFixed(1)},${(middle + sign * tall * Math.min(1, y / most)).toFixed(1)}`).join("");
  drawing.append(svg("path", {class: "line null", d: line(-1, k => patterns.chance(i, k, state.without))}),
                 svg("path", {class: "line null", d: line(1, q => patterns.chance(q, i, state.without))}),
                 svg("line", {class: "rule zero", x1: left, x2: W - 6, y1: middle, y2: middle}));
  word(left - 5, middle - tall + 8, number(most), {"text-anchor": "end"});
  word(left - 5, middle + tall, number(most), {"text-anchor": "end"});
  word(left, 12, `where “${short(tokens[i], 14)}” looks`, {class: "name mark"});
  word(left, H - 8, `who looks at “${short(tokens[i], 14)}”`, {class: "name main"});
  at.bars.replaceChildren(drawing);
};
