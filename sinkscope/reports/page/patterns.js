// Every head's whole pattern, with the sink or without: then its key is taken out and each row shared out anew.

import {unpack} from "./tools.js";

const FLOOR = 1e-3;  // of the logarithmic colours

export const patternsOf = data => {
  const {tokens, causal, sinks, heads, value} = data, packed = unpack(value), T = tokens.length, per = value.shape[1];
  const first = q => causal ? q * (q + 1) / 2 : q * T, seen = q => causal ? q + 1 : T;
  const isSink = Uint8Array.from({length: T}, (_, k) => sinks.includes(k) ? 1 : 0);
  const raw = (head, q, k) => k < seen(q) ? packed.at(head * per + first(q) + k) : null;
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

  // One head's pattern as pixels, `side` by `side`: where cells are smaller than pixels the largest is kept, not the mean.
  const paint = (pixels, stride, x0, y0, side, head, {without, log}, colours) => {
    const best = new Float32Array(side * side).fill(-1);
    for (let q = 0; q < T; q++) {
      const rest = without ? left(head, q) : 1, base = head * per + first(q), count = seen(q);
      const top = Math.floor(q * side / T), bottom = Math.max(top + 1, Math.floor((q + 1) * side / T));
      for (let k = 0; k < count; k++) {
        if (without && (isSink[k] || rest === null)) continue;
        const share = packed.share[packed.whole[base + k]] / rest;
        const start = Math.floor(k * side / T), end = Math.max(start + 1, Math.floor((k + 1) * side / T));
        for (let y = top; y < bottom; y++) for (let x = start; x < end; x++) if (share > best[y * side + x]) best[y * side + x] = share;
      }
    }
    for (let y = 0; y < side; y++) for (let x = 0; x < side; x++) {
      const share = best[y * side + x], to = 4 * ((y0 + y) * stride + x0 + x);
      if (share < 0) continue;
      const [r, g, b] = colours.bytes(shade(share, log));
      pixels[to] = r;
      pixels[to + 1] = g;
      pixels[to + 2] = b;
      pixels[to + 3] = 255;
    }
  };
  return {T, tokens, sinks, index: (r, c) => r * heads.length + c, weight, chance, taken, takenOut, paint};
};

export const shade = (share, log) => log ? 1 - Math.log(Math.max(share, FLOOR)) / Math.log(FLOOR) : share;
