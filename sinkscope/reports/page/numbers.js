// A value, its 95% interval and its null on one small axis, in the table's own row.

import {number, svg} from "./tools.js";

const WIDE = 150, HIGH = 18;

// rows: value, low, high, null, kind; all on the axis `range`. Empty where nothing is known.
export const interval = (rows, range, name) => {
  const [least, most] = range, px = v => 4 + Math.max(0, Math.min(1, (v - least) / (most - least || 1))) * (WIDE - 8);
  const drawing = svg("svg", {viewBox: `0 0 ${WIDE} ${HIGH}`, width: WIDE, height: HIGH, role: "img", class: "interval", "aria-label": name});
  drawing.append(svg("line", {class: "rule", x1: 4, x2: WIDE - 4, y1: HIGH / 2, y2: HIGH / 2}));
  if (least < 0 && most > 0) drawing.append(svg("line", {class: "rule zero", x1: px(0), x2: px(0), y1: 2, y2: HIGH - 2}));
  rows.forEach((row, i) => {
    if (!row || row.value === null || row.value === undefined) return;
    const y = rows.length > 1 ? 3 + (HIGH - 6) * i / (rows.length - 1) : HIGH / 2, kind = row.kind || "main";
    if (row.null !== null && row.null !== undefined)
      drawing.append(svg("line", {class: "chance", x1: px(row.null), x2: px(row.null), y1: 3, y2: HIGH - 3}));
    if (row.low !== null && row.low !== undefined)
      drawing.append(svg("line", {class: `span ${kind}`, x1: px(row.low), x2: px(row.high), y1: y, y2: y}));
    drawing.append(svg("circle", {class: `dot ${kind}`, cx: px(row.value), cy: y, r: rows.length > 2 ? 2.5 : 4}));
  });
  return drawing;
};

// Shares reach to 1; other numbers between 0 and the largest of what is drawn.
export const axisOf = (rows, unit) => {
  const known = rows.filter(Boolean).flatMap(row => [row.value, row.low, row.high, row.null]).filter(x => x !== null && x !== undefined);
  const least = Math.min(0, ...known), most = Math.max(...known, 0);
  return /share/.test(unit) && least >= -1 && most <= 1 ? [least, 1] : [least, most || 1];
};

// A term's definition beside it, while it is pointed at or has the focus; Escape takes it away.
const define = (root, $) => {
  const tip = $("definition"), hide = () => { tip.hidden = true; };
  for (const term of root.querySelectorAll(".term")) {
    const show = () => {
      tip.textContent = $(term.getAttribute("aria-describedby")).textContent;
      tip.hidden = false;
      const at = term.getBoundingClientRect(), above = at.top - tip.offsetHeight - 6;
      tip.style.left = `${Math.max(4, Math.min(at.left, window.innerWidth - tip.offsetWidth - 8))}px`;
      tip.style.top = `${above > 0 ? above : at.bottom + 6}px`;
    };
    for (const event of ["pointerenter", "focus"]) term.addEventListener(event, show);
    for (const event of ["pointerleave", "blur"]) term.addEventListener(event, hide);
    term.addEventListener("keydown", event => { if (event.key === "Escape") hide(); });
  }
};

export const drawNumbers = ({root, data, $}) => {
  for (const cell of root.querySelectorAll("td.drawn")) {
    const row = data.numbers[+cell.dataset.row], range = axisOf([row], row.name);
    const chance = row.null === null ? "" : `, chance ${number(row.null)}`;
    if (row.value !== null) cell.replaceChildren(interval([row], range, `${row.name}: ${number(row.value)}${chance}; axis ${number(range[0])} to ${number(range[1])}`));
  }
  if ($("definition")) define(root, $);
};

