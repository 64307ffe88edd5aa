// What each patch of an image receives, where it lies: the mean over layers. What is no patch, such as [CLS], stands above.

import {extent, html, number, roomFor, svg} from "./tools.js";

const PATCH = /^patch (\d+),(\d+)$/;

// Rows and columns of patches, where each lies, and the positions that are none; null where the positions are no grid.
const placesOf = tokens => {
  const cells = [], apart = [];
  tokens.forEach((token, i) => {
    const place = PATCH.exec(token);
    if (place) cells.push({row: +place[1], column: +place[2], i});
    else apart.push(i);
  });
  const [rows, columns] = ["row", "column"].map(axis => cells.reduce((most, cell) => Math.max(most, cell[axis]), -1) + 1);
  return cells.length > 1 && cells.length === rows * columns ? {rows, columns, cells, apart} : null;
};

const shared = y => number(y === null ? null : +y.toPrecision(3));

export const drawPatches = (page, {text, profile, name}, show) => {
  const {$, colours} = page, places = $("patches") && placesOf(text.tokens);
  if ($("patches")) $("patches-figure").hidden = !places;
  if (!places) return null;
  const {rows, columns, cells, apart} = places, values = profile.mean, room = roomFor($("patches"), 560), step = 78, box = 14;
  const side = Math.max(2, Math.min(26, room / columns, 420 / rows)), width = side * columns, height = side * rows;
  const across = Math.max(1, Math.floor(room / step)), top = 24 * Math.ceil(apart.length / across), W = Math.max(width, room);
  const [least, most] = extent(values.filter(y => y > 0)), span = Math.log(most / least) || 1;
  const shade = y => y > 0 ? Math.log(y / least) / span : 0;
  $("patches-caption").textContent = `${name[0].toUpperCase()}${name.slice(1)}, by patch, mean of layers; ${text.name}. `
    + `Logarithmic, from ${shared(least)} (dark) to ${shared(most)}; uniform attention gives ${shared(profile.null[0])}`;
  const canvas = html("canvas", {"aria-hidden": "true", class: "pixels"}), context = canvas.getContext("2d");
  Object.assign(canvas, {width: columns, height: rows});
  Object.assign(canvas.style, {left: "0px", top: `${top}px`, width: `${width}px`, height: `${height}px`});
  const image = context.createImageData(columns, rows);
  for (const {row, column, i} of cells) image.data.set([...colours.bytes(shade(values[i])), values[i] === null ? 0 : 255], 4 * (row * columns + column));
  context.putImageData(image, 0, 0);
  const drawing = svg("svg", {viewBox: `0 0 ${W} ${top + height + 2}`, width: W, height: top + height + 2, role: "img",
    "aria-label": `what each of ${rows} by ${columns} patches receives`});
  const corners = new Map(cells.map(({row, column, i}) => [i, [column * side, top + row * side, side]]));
  apart.forEach((i, n) => {
    const x = n % across * step, y = 24 * Math.floor(n / across);
    corners.set(i, [x, y, box]);
    drawing.append(svg("rect", {x, y, width: box, height: box, fill: colours.name(shade(values[i]))}),
                   svg("text", {x: x + box + 4, y: y + 11, class: "small"}, text.tokens[i]));
  });
  const ring = svg("rect", {class: "ring", visibility: "hidden"});
  drawing.append(ring);
  drawing.onpointermove = event => {
    const area = drawing.getBoundingClientRect(), x = event.clientX - area.left, y = event.clientY - area.top;
    for (const [i, [left, high, size]] of corners) if (x >= left && x < left + size && y >= high && y < high + size) show(i);
  };
  const stack = html("div", {class: "stack"});
  stack.append(canvas, drawing);
  $("patches").replaceChildren(stack);
  return i => {
    const [x, y, size] = corners.get(i) || [0, 0, 0];
    for (const [key, value] of Object.entries({x, y, width: size, height: size, visibility: size ? "visible" : "hidden"})) ring.setAttribute(key, value);
    $("patches-readout").textContent = `${text.tokens[i] || `Position ${i}`}: ${shared(values[i])}; uniform attention ${shared(profile.null[i])}`;
  };
};
