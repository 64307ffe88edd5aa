// Small tools. Data reaches the page through textContent and attributes only, never as markup.

const SVG = "http://www.w3.org/2000/svg";

const fill = (node, attributes, text) => {
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.textContent = text;
  return node;
};
export const svg = (name, attributes = {}, text = "") => fill(document.createElementNS(SVG, name), attributes, text);
export const html = (name, attributes = {}, text = "") => fill(document.createElement(name), attributes, text);

export const number = x => x === null || x === undefined ? "–" : String(Number(x.toPrecision(3)));
export const signed = x => x === null || x === undefined ? "–" : (x > 0 ? "+" : "") + number(x);
export const percent = x => x === null || x === undefined ? "–" : `${(100 * x).toFixed(Math.abs(x) < 0.095 ? 1 : 0)}%`;
export const said = ({nouns = {}}, words) =>  // of images and sound, what is written of texts and tokens
  words.replace(/\b(text|token)(?=s?\b)/gi, word => { const noun = nouns[word.toLowerCase()] || word; return /^T/.test(word) ? noun[0].toUpperCase() + noun.slice(1) : noun; });
export const short = (word, most) => word.length > most ? `${word.slice(0, most - 1)}…` : word;

// A grid is rows of columns, or the one number that is in every cell.
export const at = (grid, row, column) => Array.isArray(grid) ? grid[row][column] : grid;
export const mean = values => {
  const known = values.filter(x => x !== null && x !== undefined);
  return known.length ? known.reduce((a, b) => a + b, 0) / known.length : null;
};
export const extent = values => values.reduce(
  ([a, b], x) => x === null || x === undefined ? [a, b] : [Math.min(a, x), Math.max(b, x)], [Infinity, -Infinity]);

// Round steps: every how many of `count` things, of which `most` have room; and round numbers between two.
export const every = (count, most) => {
  for (let power = 1; ; power *= 10) for (const n of [1, 2, 5]) if (count <= most * n * power) return n * power;
};
export const ticks = (low, high, most, whole) => {
  let step = 10 ** Math.floor(Math.log10((high - low) / most || 1));
  step *= [1, 2, 5, 10].find(n => (high - low) / (step * n) <= most);
  if (whole) step = Math.max(1, step);
  const first = Math.ceil(low / step - 1e-9);
  return Array.from({length: Math.max(0, Math.floor(high / step + 1e-9) - first + 1)}, (_, i) => (first + i) * step);
};

// Shares in 8 or 16 bits, as pack.py writes them: a table from whole number to share, and the whole numbers.
export const unpack = packed => {
  const {bits, floor, shape} = packed, bytes = Uint8Array.from(atob(packed.data), c => c.charCodeAt(0));
  const whole = bits === 8 ? bytes : new Uint16Array(bytes.buffer), top = 2 ** bits - 1;
  const share = Float32Array.from({length: top + 1}, (_, q) => floor ** (1 - (q - 1) / (top - 2)));
  share[0] = 0;
  share[top] = NaN;
  return {shape, at: i => share[whole[i]], whole, share};
};

// Colours from 0 to 1: as words for SVG, as bytes for a canvas.
export const scale = names => {
  const parts = names.map(name => [1, 3, 5].map(i => parseInt(name.slice(i, i + 2), 16)));
  const index = share => Math.round(Math.max(0, Math.min(1, share)) * (names.length - 1));
  return {names, name: share => names[index(share)], bytes: share => parts[index(share)]};
};

const COOL = [0, 114, 178], WARM = [213, 94, 0];

// From blue through nothing to vermilion; the middle is the paper's grey.
export const diverging = () => {
  const names = Array.from({length: 65}, (_, i) => {
    const share = (i - 32) / 32, to = share < 0 ? COOL : WARM;
    return `#${to.map(c => Math.round(235 + (c - 235) * Math.abs(share)).toString(16).padStart(2, "0")).join("")}`;
  });
  return {names, name: share => names[Math.round(Math.max(0, Math.min(1, share)) * 64)]};
};

// Linear up to a size, logarithmic beyond, where few places cost much and all others would be without a colour.
export const costColours = ({most, linear}) => {
  const base = diverging(), bent = size => size <= linear / most ? size * most / linear : 1 + Math.log10(size * most / linear);
  const name = share => {
    const s = 2 * Math.max(0, Math.min(1, share)) - 1;
    return base.name((1 + Math.sign(s) * bent(Math.abs(s)) / bent(1)) / 2);
  };
  return {names: base.names.map((_, i) => name(i / (base.names.length - 1))), name};
};

export const roomFor = (host, most) => Math.max(260, Math.min(most, host.clientWidth || most));
