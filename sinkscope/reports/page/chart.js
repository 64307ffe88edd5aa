// Lines over layers, positions or sizes; a slider to assistive technology, moved by the pointer or the arrow keys.

import {extent, html, number, roomFor, svg, ticks} from "./tools.js";

// view: x, lines (kind, name, y), band (name, low, high), dots ([x, y]), log, zero, first, direct (names at the lines' ends),
// label, xName, tell, say, pick.
export const chart = (host, view) => {
  const {x, lines, band} = view, frame = framed(host, view), {W, H, right, top, bottom, px, py} = frame;
  const drawing = svg("svg", {viewBox: `0 0 ${W} ${H}`, width: W, height: H, role: "slider", tabindex: 0, "aria-label": view.label,
    "aria-valuemin": x[0], "aria-valuemax": x[x.length - 1], "aria-valuenow": x[0], "aria-valuetext": view.tell(0)});
  axes(drawing, view, frame);
  const drawn = y => y !== null && y !== undefined && (!view.log || y > 0);
  if (view.dots) {
    const points = view.dots.filter(([, y]) => drawn(y)).map(([v, y]) => `M${px(v).toFixed(1)},${py(y).toFixed(1)}h0`);
    drawing.append(svg("path", {class: "dots", d: points.join("")}));
  }
  if (band) {
    const edge = side => x.map((v, i) => [v, band[side][i]]).filter(p => drawn(p[1])).map(([v, y]) => `${px(v)},${py(y)}`);
    drawing.append(svg("polygon", {class: `band ${band.kind || ""}`, points: [...edge("low"), ...edge("high").reverse()].join(" ")}));
  }
  for (const line of lines) {
    const joined = i => i && drawn(line.y[i - 1]) ? "L" : "M";
    const points = line.y.map((y, i) => drawn(y) ? `${joined(i)}${px(x[i]).toFixed(1)},${py(y).toFixed(1)}` : "");
    drawing.append(svg("path", {class: `line ${line.kind}`, d: points.join("")}));
    if (x.length === 1 && drawn(line.y[0])) drawing.append(svg("circle", {class: `dot ${line.kind}`, cx: px(x[0]), cy: py(line.y[0]), r: 4}));
  }
  if (view.first && drawn(lines[0].y[0])) drawing.append(
    svg("circle", {class: "first", cx: px(x[0]), cy: py(lines[0].y[0]), r: 5}),
    svg("text", {class: "first", x: px(x[0]) + 10, y: py(lines[0].y[0]) + 4}, `position 0: ${number(lines[0].y[0])}`));
  const shown = lines.filter(line => line.y.some(drawn));
  if (view.direct) names(drawing, shown, frame, drawn);
  const cursor = svg("line", {class: "cursor", y1: top, y2: H - bottom, visibility: "hidden"});
  drawing.append(cursor);
  const move = follow(drawing, view, cursor, px, W);
  host.replaceChildren(drawing, legend(view, shown, band));
  return {move, right};
};

const framed = (host, view) => {
  const W = roomFor(host, view.wide || 470), H = view.high || 236, left = 56, right = view.direct ? 96 : 14, top = 12, bottom = 40;
  const {x, lines, band, log} = view;
  const all = [...lines.flatMap(line => line.y), ...(band ? [...band.low, ...band.high] : []), ...(view.dots || []).map(dot => dot[1])];
  let [low, high] = extent(log ? all.filter(y => y > 0) : all);
  if (!Number.isFinite(low)) [low, high] = log ? [0.1, 1] : [0, 1];
  if (log) [low, high] = [10 ** Math.floor(Math.log10(low)), 10 ** Math.ceil(Math.log10(high) + 1e-9)];
  else [low, high] = [Math.min(0, low * 1.05), high > 0 ? high * 1.05 : low < 0 ? 0 : 1];
  const across = v => log ? Math.log10(1 + v) : v, up = v => log ? Math.log10(v) : v;
  const beside = view.dots ? 0.5 : 0, x0 = across(x[0]) - beside, x1 = across(x[x.length - 1]) + beside;
  const px = v => left + (x1 > x0 ? (across(v) - x0) / (x1 - x0) : 0.5) * (W - left - right);
  const py = v => top + (1 - (up(v) - up(low)) / (up(high) - up(low))) * (H - top - bottom);
  return {W, H, left, right, top, bottom, low, high, px, py};
};

const axes = (drawing, view, {W, H, left, right, bottom, low, high, px, py}) => {
  const {x, log} = view, decades = Math.round(Math.log10(high / low)), skip = Math.ceil(decades / 5);
  const ys = log ? Array.from({length: Math.floor(decades / skip) + 1}, (_, i) => high / 10 ** (i * skip)) : ticks(low, high, 5);
  for (const y of ys) drawing.append(
    svg("line", {class: y === 0 && view.zero ? "rule zero" : "rule", x1: left, x2: W - right, y1: py(y), y2: py(y)}),
    svg("text", {x: left - 6, y: py(y) + 4, "text-anchor": "end"}, log && y < 1e-3 ? y.toExponential(0) : number(y)));
  const end = x[x.length - 1], most = (W - left - right) / 44;
  const xs = log ? [0, 1, 10, 100, 1000, 10000].filter(v => v <= end) : ticks(x[0], end, most, !view.parts);
  for (const v of xs) drawing.append(svg("text", {x: px(v), y: H - bottom + 16, "text-anchor": "middle"}, number(v)));
  drawing.append(svg("text", {x: (left + W - right) / 2, y: H - 5, "text-anchor": "middle"}, view.xName));
};

// Names beside the lines' last points, none over another.
const names = (drawing, lines, {W, right, py}, drawn) => {
  const ends = lines.map(line => ({line, y: py(line.y.findLast(drawn)) + 4})).sort((a, b) => a.y - b.y);
  ends.forEach((end, i) => { if (i && end.y < ends[i - 1].y + 14) end.y = ends[i - 1].y + 14; });
  for (const {line, y} of ends) drawing.append(svg("text", {class: `name ${line.kind}`, x: W - right + 6, y}, line.name));
};

const follow = (drawing, view, cursor, px, W) => {
  const {x} = view;
  let now = 0;
  const show = i => {
    now = Math.max(0, Math.min(x.length - 1, i));
    for (const end of ["x1", "x2"]) cursor.setAttribute(end, px(x[now]));
    cursor.setAttribute("visibility", "visible");
    drawing.setAttribute("aria-valuenow", x[now]);
    drawing.setAttribute("aria-valuetext", view.tell(now));
  };
  const move = i => { show(i); view.say(view.tell(now), now); };
  const near = event => {
    const box = drawing.getBoundingClientRect(), here = (event.clientX - box.left) / box.width * W;
    return x.reduce((best, v, i) => Math.abs(px(v) - here) < Math.abs(px(x[best]) - here) ? i : best, 0);
  };
  drawing.onfocus = () => move(now);
  drawing.onpointermove = event => move(near(event));
  drawing.onclick = event => { if (view.pick) view.pick(near(event)); };
  drawing.onkeydown = event => {
    const moves = {ArrowLeft: now - 1, ArrowDown: now - 1, ArrowRight: now + 1, ArrowUp: now + 1, Home: 0, End: x.length - 1,
                   PageUp: now + 10, PageDown: now - 10};
    if (event.key in moves) move(moves[event.key]);
    else if (event.key === "Enter" && view.pick) view.pick(now);
    else return;
    event.preventDefault();
  };
  return show;
};

const legend = (view, lines, band) => {
  const list = html("ul", {class: "legend"});
  const shown = view.direct ? [] : lines.map(line => [line.kind, line.name]);
  if (view.dots) shown.push(["each", view.dotsName]);
  if (band) shown.push([`band ${band.kind || ""}`, band.name]);
  for (const [kind, name] of shown) list.append(html("li", {class: kind}, name));
  return list;
};
