// Every head's whole pattern, with the sink or without: then its key is taken out and each row shared out anew.

import {unpack} from "./tools.js";

const FLOOR = 1e-3;  // of the logarithmic colours

// A rectangle of a square of `side` by `side` is at least `share`.
const keep = (best, side, share, left, right, top, bottom) => {
  for (let y = top; y < bottom; y++) for (let x = left; x < right; x++) if (share > best[y * side + x]) best[y * side + x] = share;
};

export const patternsOf = data => {
  const {tokens, causal, sinks, heads, value} = data, packed = unpack(value), T = tokens.length, per = value.shape[1];
  const first = q => causal ? q * (q + 1) / 2 : q * T, seen = q => causal ? q + 1 : T;
  const isSink = Uint8Array.from({length: T}, (_, k) => sinks.includes(k) ? 1 : 0);
  const raw = (head, q, k) => {
    const share = k < seen(q) ? packed.at(head * per + first(q) + k) : null;
    return Number.isNaN(share) ? null : share;
  };
  const there = head => !Number.isNaN(packed.at(head * per));
  const taken = (head, q) => sinks.reduce((sum, k) => sum + (raw(head, q, k) || 0), 0);
  const left = (head, q) => { const rest = 1 - taken(head, q); return rest > 0.005 ? rest : null; };
  const weight = (head, q, k, without) => {
    if (k >= seen(q)) return null;
    if (!without) return raw(head, q, k);
    const rest = left(head, q);
    return isSink[k] || rest === null ? null : raw(head, q, k) / rest;
  };
  const chance = (q, k, without) => {
    if (k >= seen(q) || (without && isSink[k])) return null;
    const others = seen(q) - (without ? sinks.filter(s => s < seen(q)).length : 0);
    return 1 / others;
  };
  const takenOut = head => {
    let sum = 0;
    for (let q = 0; q < T; q++) sum += taken(head, q);
    return sum / T;
  };

  // One head's pattern, `side` by `side`: where cells are smaller than pixels the largest is kept, not the mean; -1 where none is.
  const largest = (side, head, without) => {
    const best = new Float32Array(side * side).fill(-1), hidden = without ? isSink : new Uint8Array(T), cell = i => Math.floor(i * side / T);
    for (let q = 0; q < T; q++) {
      const rest = without ? left(head, q) : 1, base = head * per + first(q), bottom = Math.max(cell(q) + 1, cell(q + 1));
      for (let k = 0; k < (rest === null ? 0 : seen(q)); k++) {
        if (hidden[k]) continue;
        const share = packed.share[packed.whole[base + k]] / rest, right = Math.max(cell(k) + 1, cell(k + 1));
        keep(best, side, share, cell(k), right, cell(q), bottom);
      }
    }
    return best;
  };
  const paint = (pixels, stride, x0, y0, side, head, {without, log}, colours) => {
    largest(side, head, without).forEach((share, i) => {
      if (share < 0) return;
      const to = 4 * ((y0 + Math.floor(i / side)) * stride + x0 + i % side), rgb = colours.bytes(shade(share, log));
      pixels[to] = rgb[0];
      pixels[to + 1] = rgb[1];
      pixels[to + 2] = rgb[2];
      pixels[to + 3] = 255;
    });
  };
  return {T, tokens, sinks, index: (r, c) => r * heads.length + c, there, weight, chance, taken, takenOut, paint};
};

export const shade = (share, log) => log ? 1 - Math.log(Math.max(share, FLOOR)) / Math.log(FLOOR) : share;
