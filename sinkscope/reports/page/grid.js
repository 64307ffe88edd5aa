// A grid of cells by row and column: coloured by a number, with a colour bar, or with a picture of each painted behind.

import {every, extent, html, number, roomFor, svg} from "./tools.js";
import {explore} from "./keys.js";

// view: rows, columns, value, rowName, columnName, mark (the null, or null), label, cellName, say, pick; range (least, most);
// left, bottom, rowLabel where cells have names of their own; paint(context, size), which makes cells square.
export const grid = (host, view, colours) => {
  const {rows, columns} = view, bar = view.paint ? 8 : 92, left = view.left || 46, top = 6;
  const room = (roomFor(host, view.wide || 560) - left - bar) / columns.length;
  const wide = view.paint ? Math.floor(Math.max(7, Math.min(26, room))) : Math.max(4, Math.min(48, room));
  const high = view.paint ? wide : Math.max(5, Math.min(32, 420 / rows.length));
  const width = wide * columns.length, height = high * rows.length, bottom = view.bottom || 36;
  const size = [left + width + bar, Math.max(height, view.paint ? 0 : 120) + top + bottom];
  const drawing = svg("svg", {viewBox: `0 0 ${size[0]} ${size[1]}`, width: size[0], height: size[1], role: "grid",
                              "aria-label": view.label, "aria-readonly": "true"});
  const frame = {left, top, wide, high, width, height};
  const [low, upper] = view.range || (view.paint ? [0, 1] : rangeOf(view));
  const shade = share => view.paint ? "transparent" : share === null ? "none" : colours.name((share - low) / (upper - low || 1));
  const items = [];
  rows.forEach((_row, r) => {
    const line = svg("g", {role: "row"});
    columns.forEach((_column, c) => {
      const cell = svg("rect", {role: "gridcell", x: left + c * wide, y: top + r * high, width: wide, height: high,
                                fill: shade(view.paint ? null : view.value[r][c]), "aria-label": view.cellName(r, c)});
      cell.dataset.row = r;
      cell.dataset.column = c;
      items.push(cell);
      line.append(cell);
    });
    drawing.append(line);
  });
  labels(drawing, view, frame);
  if (!view.paint) colourBar(drawing, view, frame, colours, low, upper);
  const ring = svg("rect", {class: "ring", width: wide, height: high, visibility: "hidden"});
  const picked = svg("rect", {class: "picked", width: wide, height: high, visibility: "hidden"});
  drawing.append(picked, ring);
  const place = (mark, i) => {
    for (const side of ["x", "y"]) mark.setAttribute(side, items[i].getAttribute(side));
    mark.setAttribute("visibility", "visible");
  };
  const spot = i => [+items[i].dataset.row, +items[i].dataset.column];
  const box = html("div", {class: "stack"});  // an svg that listens for focus would be a tab stop itself
  const repaint = view.paint ? behind(box, frame, view.paint) : () => {};
  box.append(drawing);
  if (items.length) explore(box, items, columns.length, i => { place(ring, i); view.say(...spot(i)); }, i => view.pick?.(...spot(i)));
  host.replaceChildren(box);
  return {repaint, mark: (row, column) => place(picked, row * columns.length + column)};
};

const rangeOf = view => {
  const [least, most] = extent(view.value.flat());
  return [Number.isFinite(least) ? Math.min(0, least) : 0, Number.isFinite(most) ? Math.max(most, view.mark ?? most) : 1];
};

const labels = (drawing, view, {left, top, wide, high, width, height}) => {
  const word = (x, y, text, anchor = "middle", more = {}) => drawing.append(svg("text", {x, y, "text-anchor": anchor, ...more}, text));
  const {rows, columns} = view, named = view.rowLabel;
  for (let r = 0, step = every(rows.length, height / 15); r < rows.length; r += step)
    word(left - 6, top + (r + 0.5) * high + 4, named ? named(r) : rows[r], "end");
  for (let c = 0, step = every(columns.length, width / (named ? 15 : 24)); c < columns.length; c += step) {
    const x = left + (c + 0.5) * wide, y = top + height + 14;
    if (named) word(x + 4, y - 6, named(c), "end", {transform: `rotate(-90 ${x + 4} ${y - 6})`});
    else word(x, y, columns[c]);
  }
  if (named) return;
  word(left + width / 2, top + height + 31, view.columnName);
  word(12, top + height / 2, view.rowName, "middle", {transform: `rotate(-90 12 ${top + height / 2})`});
};

const colourBar = (drawing, view, {left, top, width, height}, colours, low, upper) => {
  const x = left + width + 16, size = Math.max(height, 120) - 32, y0 = top + 16, steps = colours.names.length;
  for (const [i, fill] of colours.names.entries())
    drawing.append(svg("rect", {x, width: 14, fill, y: y0 + size * (1 - (i + 1) / steps), height: size / steps + 0.5}));
  const word = (dx, y, text, more = {}) => drawing.append(svg("text", {x: x + dx, y, ...more}, text));
  word(0, y0 - 5, number(upper));
  word(0, y0 + size + 14, number(low));
  if (view.mark === null || view.mark === undefined) return;
  const y = y0 + size * (1 - (view.mark - low) / (upper - low || 1));
  drawing.append(svg("line", {class: "mark", x1: x - 3, x2: x + 18, y1: y, y2: y}));
  word(21, y + 4, `null ${number(view.mark)}`, {class: "small"});
};

// A canvas below the cells, in the screen's own pixels.
const behind = (box, {left, top, wide, width, height}, paint) => {
  const ratio = Math.min(2, window.devicePixelRatio || 1), canvas = html("canvas", {"aria-hidden": "true"});
  Object.assign(canvas, {width: width * ratio, height: height * ratio});
  Object.assign(canvas.style, {left: `${left}px`, top: `${top}px`, width: `${width}px`, height: `${height}px`});
  box.append(canvas);
  const again = () => paint(canvas.getContext("2d"), Math.round(wide * ratio));
  again();
  return again;
};
