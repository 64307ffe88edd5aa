// Along a text: attention received by layer and position, reduced to the screen by maxima; the text below goes with it.

import {html, number, roomFor, said, svg, unpack} from "./tools.js";
import {explore} from "./keys.js";
import {chart} from "./chart.js";
import {drawPatches} from "./patches.js";

export const detail = ({data, state}) => data.texts.find(text => text.label === state.text)
  || data.texts.reduce((a, b) => b.tokens.length > a.tokens.length ? b : a, data.texts[0]);

// A text's profile: layer by layer, the mean of layers, and the null.
const opened = (page, text, name) => {
  const packed = text.profiles[name];
  if (!packed) return null;
  const key = `${name} ${text.label}`;
  if (!page.opened.has(key)) {
    const {shape: [layers, count], at, whole, share: shares} = unpack(packed.layers);
    const value = (l, k) => { const y = at(l * count + k); return Number.isNaN(y) ? null : y; };
    page.opened.set(key, {layers, count, value, mean: averages(shares, whole, count), null: packed.null});
  }
  return page.opened.get(key);
};

const averages = (shares, whole, count) => {
  const sums = new Float64Array(count), known = new Uint16Array(count);
  for (let i = 0; i < whole.length; i++) {
    const y = shares[whole[i]];
    if (Number.isNaN(y)) continue;
    sums[i % count] += y;
    known[i % count] += 1;
  }
  return Array.from(sums, (y, k) => known[k] ? y / known[k] : null);
};

export const drawAlong = page => {
  const {data, $} = page;
  if (!data.texts.length || !$("strip")) return;
  const text = detail(page), name = $("profile-picker").value, profile = opened(page, text, name);
  $("along-figures").hidden = !profile;
  if (!profile) return;
  const along = {text, profile, name: data.profiled[name], position: 0, layer: 0};
  const cut = text.count > profile.count ? `, its first ${profile.count} of ${text.count} positions` : "";
  $("strip-caption").textContent = `Attention received, by layer and position: ${along.name}; ${said(data, "text")}: ${text.name}${cut}`;
  const strip = drawStrip(page, along);
  const words = drawText(page, along, i => { strip(i); });
  const patch = drawPatches(page, along, i => { page.along(i); });
  page.along = (i, layer) => {
    const there = Math.max(0, Math.min(profile.count - 1, i));
    strip(there, layer);
    if (words) words(there);
    if (patch) patch(there);
  };
  drawLayer(page);
  page.listen("head", "along", () => drawLayer(page));
};

const about = (page, {text, profile}, i, layer) => `Position ${i}${i in text.tokens ? ` “${text.tokens[i]}”` : ""}`
  + (layer === undefined ? "" : `, layer ${page.data.layers[layer]}: ${number(share(profile.value(layer, i)))}`)
  + `${layer === undefined ? ":" : ";"} mean of layers ${number(profile.mean[i])}; null ${number(profile.null[i])}`;
const share = y => y === null ? null : +y.toPrecision(3);

const drawStrip = (page, along) => {
  const {data, $, colours} = page, {profile} = along, {count, layers} = profile, host = $("strip");
  const W = roomFor(host, 1120), left = 52, high = Math.max(4, Math.min(14, 340 / (layers + 1))), width = W - left - 4, height = high * (layers + 1);
  const ratio = Math.min(2, window.devicePixelRatio || 1), columns = Math.round(width * ratio), floor = Math.log(0.1 / count);
  const canvas = html("canvas", {"aria-hidden": "true"}), context = canvas.getContext("2d");
  Object.assign(canvas, {width: columns, height: layers + 1});
  Object.assign(canvas.style, {left: `${left}px`, top: "4px", width: `${width}px`, height: `${height}px`});
  const image = context.createImageData(columns, layers + 1);
  for (let row = 0; row <= layers; row++) paintRow(image, row, columns, count, k => row < layers ? profile.value(row, k) : profile.null[k], floor, colours);
  context.putImageData(image, 0, 0);
  const drawing = svg("svg", {viewBox: `0 0 ${W} ${height + 42}`, width: W, height: height + 42, role: "slider", tabindex: 0,
    "aria-label": said(data, "position in the text; up and down change the layer"), "aria-valuemin": 0, "aria-valuemax": count - 1, "aria-valuenow": 0,
    "aria-valuetext": about(page, along, 0, 0)});
  const word = (x, y, text, anchor = "middle") => drawing.append(svg("text", {x, y, "text-anchor": anchor}, text));
  const skip = Math.ceil(14 / high);
  for (let l = 0; l < layers; l += skip) if (layers - l >= skip || l === 0) word(left - 5, 4 + (l + 0.5) * high + 4, data.layers[l], "end");
  word(left - 5, 4 + (layers + 0.5) * high + 6, "chance", "end");
  const px = k => left + (k + 0.5) * width / count;
  const step = Math.max(1, Math.ceil(count / (width / 60)));
  for (let k = 0, round = step > 5 ? Math.ceil(step / 10) * 10 : step; k < count; k += round) word(px(k), height + 20, k);
  word(left + width / 2, height + 38, "position");
  const cursor = svg("rect", {class: "here", y: 4, width: Math.max(3, width / count), height, visibility: "hidden"});
  const spot = svg("rect", {class: "ring", width: Math.max(5, width / count), height: high, visibility: "hidden"});
  drawing.append(cursor, spot);
  let now = 0, layer = 0;
  const show = (i, at) => {
    now = Math.max(0, Math.min(count - 1, i));
    if (at !== undefined) layer = Math.max(0, Math.min(layers - 1, at));
    cursor.setAttribute("x", px(now) - Math.max(3, width / count) / 2);
    spot.setAttribute("x", px(now) - Math.max(5, width / count) / 2);
    spot.setAttribute("y", 4 + layer * high);
    for (const mark of [cursor, spot]) mark.setAttribute("visibility", "visible");
    const words = about(page, along, now, layer);
    drawing.setAttribute("aria-valuenow", now);
    drawing.setAttribute("aria-valuetext", words);
    $("strip-readout").textContent = words;
  };
  drawing.onfocus = () => page.along(now, layer);
  drawing.onpointermove = event => {
    const area = drawing.getBoundingClientRect(), x = event.clientX - area.left, y = event.clientY - area.top;
    page.along(Math.floor((x - left) / width * count), Math.floor((y - 4) / high));
  };
  drawing.onkeydown = event => {
    const far = Math.max(1, Math.round(count / 20));
    const moves = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], PageUp: [-far, 0], PageDown: [far, 0],
                   Home: [-count, 0], End: [count, 0]};
    if (!(event.key in moves)) return;
    page.along(now + moves[event.key][0], layer + moves[event.key][1]);
    event.preventDefault();
  };
  const box = html("div", {class: "stack"});
  box.append(canvas, drawing);
  host.replaceChildren(box);
  return show;
};

// A pixel shows the largest of the positions that it stands for, so that no sink is lost between them.
const paintRow = (image, row, columns, count, value, floor, colours) => {
  const best = new Float32Array(columns).fill(-1);
  for (let k = 0; k < count; k++) {
    const y = value(k), from = Math.floor(k * columns / count), to = Math.max(from + 1, Math.floor((k + 1) * columns / count));
    if (y !== null && y !== undefined) for (let x = from; x < to; x++) if (y > best[x]) best[x] = y;
  }
  for (let x = 0; x < columns; x++) {
    if (best[x] < 0) continue;
    const [r, g, b] = colours.bytes(best[x] ? 1 - Math.log(best[x]) / floor : 0), to = 4 * (row * columns + x);
    image.data[to] = r;
    image.data[to + 1] = g;
    image.data[to + 2] = b;
    image.data[to + 3] = 255;
  }
};

// The text, shaded by the mean over layers: an equal share for every token, 1 / T, is unshaded; all attention fully shaded.
const drawText = (page, {text, profile}, show) => {
  const {$} = page, host = $("tokens");
  if (host) host.hidden = !text.tokens.length;
  if (!host || host.hidden) return null;
  const shade = y => y ? Math.max(0, Math.min(1, 1 + Math.log(y) / Math.log(Math.max(2, text.count)))) : 0;
  return windowed(host, {...text, of: said(page.data, "tokens")}, i => ["--shade", shade(profile.mean[i])], show);
};

// The tokens around a place, MOST at a time: what a strip of thousands of positions is scrolled through.
const MOST = 500;
export const windowed = (host, {tokens, name, of = "tokens"}, shaded, show) => {
  let from = 0, spans = [], last = null;
  const fill = start => {
    from = Math.max(0, Math.min(start, tokens.length - MOST));
    spans = tokens.slice(from, from + MOST).map((token, i) => {
      const span = html("span", {role: "option", "aria-selected": "false"}, token), [property, share] = shaded(from + i);
      if (share) span.style.setProperty(property, share.toFixed(3));
      return span;
    });
    const box = html("div", {role: "listbox", "aria-label": `${of} of ${name}`});
    box.append(...spans);
    host.replaceChildren(box);
    const before = from;
    explore(box, spans, 1, i => { mark(before + i); show(before + i); });
  };
  const mark = i => {
    if (last) last.classList.remove("here");
    last = spans[i - from] || null;
    if (last) last.classList.add("here");
  };
  fill(0);
  return i => {  // scroll the box alone, not the page
    if (i < from || i >= from + MOST) fill(i - MOST / 2);
    mark(i);
    if (last) host.scrollTop = last.offsetTop - host.offsetTop - host.clientHeight / 2;
  };
};

// Of many positions those that are drawn: of each step of the logarithmic axis the largest.
const thinned = ({count, value}, layer) => {
  if (count <= 1500) return Array.from({length: count}, (_, k) => k);
  const steps = 900 / Math.log(count + 1), best = new Map();
  for (let k = 0; k < count; k++) {
    const step = Math.floor(Math.log(k + 1) * steps), held = best.get(step);
    if (held === undefined || (value(layer, k) ?? -1) > (value(layer, held) ?? -1)) best.set(step, k);
  }
  return [...best.values()];
};

const drawLayer = page => {
  const {data, $, state} = page, text = detail(page), profile = opened(page, text, $("profile-picker").value);
  if (!profile) return;
  const x = thinned(profile, state.layer), layer = data.layers[state.layer], y = x.map(k => share(profile.value(state.layer, k)));
  const of = values => x.map(k => values[k]);
  $("profile-caption").textContent = `Attention received by position in layer ${layer}, ${said(data, "text")}: ${text.name}`;
  chart($("profile"), {
    x, log: profile.count > 64, first: true, xName: "key position", wide: 720, label: `attention received in layer ${layer}`,
    lines: [{kind: "main", name: `layer ${layer}, mean of heads`, y}, {kind: "pale", name: "mean of layers", y: of(profile.mean)},
            {kind: "null", name: "uniform attention (null)", y: of(profile.null)}],
    tell: i => `Position ${x[i]}${x[i] in text.tokens ? ` “${text.tokens[x[i]]}”` : ""}: ${number(y[i])}; mean of layers ${number(profile.mean[x[i]])}; null ${number(profile.null[x[i]])}`,
    say: words => { $("profile-readout").textContent = words; },
  });
};
