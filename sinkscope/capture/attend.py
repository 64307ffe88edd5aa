"""Attention under an intervention: blocks of query rows over the keys in reach, whole rows at hand, nothing T x T."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sinkscope.capture.cuts import GPU_BYTES, cuts
from sinkscope.capture.held import Held
from sinkscope.capture.stream import Rotation, turn
from sinkscope.edit import NOTHING, Edit
from sinkscope.errors import SinkscopeError

#: Query rows at a time; on a GPU, where every block costs two dozen launches, as many as `GPU_BYTES` of scores hold, and no
#: more than this.
ROWS, GPU_ROWS = 128, 1024


def attend(
    edit: Edit,
    layer: int,
    query: Float[Tensor, "batch head query d_head"],
    key: Float[Tensor, "batch kv_head key d_head"],
    value: Float[Tensor, "batch kv_head key d_value"],
    at: Int[Tensor, " key"],
    length: int,
    given: dict[str, Any],
    rotation: Rotation | None = None,
    look: Callable[[Tensor, Tensor, Tensor], None] = lambda *_: None,
    crossing: Int[Tensor, " query"] | None = None,
) -> tuple[Float[Tensor, "batch head query d_value"], Float[Tensor, " key"]]:
    """Attend as edited; a window costs tokens x window.

    Args:
        edit: what is edited.
        layer: which layer this is.
        query: the latest tokens' queries, rotated and normed.
        key: those of all keys that are held; grouped keys are not expanded.
        value: theirs.
        at: the text's positions of the keys, ascending, on the CPU; the last of them are the queries'.
        length: tokens in the text whose positions are the keys.
        given: `scale, causal, softcap, sinks, window` of the layer, a `bias` of positions where it has one, and a `key_mask`
            where some keys are pads.
        rotation: needed by an edit that moves positions into a cache.
        look: is shown (positions of some queries, positions of the keys in their reach, weights), block by block.
        crossing: in cross-attention, the queries' positions in their own text: no key is then a query's own.

    Returns:
        The output, and the attention that each key received, summed over batch, heads and queries, in float64 on the CPU.

    Raises:
        SinkscopeError: positions inside a cache where a layer has a window of its own; every key is hidden.
    """
    edit = edit if edit.edits(layer) else NOTHING
    n, held, heads = query.shape[2], key.shape[2], query.shape[1]
    cache, value = edit.cache(layer), edit.values(layer, value, at, heads, length)
    if cache is not None and given["window"] is not None and given["window"] < int(at[-1]) + 1:
        raise SinkscopeError(f"layer {layer} has a sliding window of its own: {edit} is not defined there")
    straight, asking = int(at[-1]) == held - 1, at[held - n :] if crossing is None else crossing
    keys_held, values_held = Held.of(edit, layer, "keys", key, at, rotation), Held.of(edit, layer, "values", value, at)
    out = query.new_empty(query.shape[0], n, heads, value.shape[3]).transpose(1, 2)
    received = torch.zeros(held, dtype=torch.float64, device=query.device if query.is_cuda else "cpu")
    area, seen = GPU_BYTES / (4 * query.shape[0] * heads), len(edit.reach(layer, int(at[-1]), int(at[-1]) + 1))
    for start, stop in cuts(n, area, seen, fewest=ROWS, most=GPU_ROWS if query.is_cuda else ROWS):
        rows = asking[start:stop]
        reach = _reach(edit, layer, rows, at, given)
        index = reach if straight else torch.searchsorted(at, reach)
        first, last = int(index[0]), int(index[-1]) + 1
        pick: Any = slice(first, last) if last - first == len(index) else index
        q = query[:, :, start:stop]
        scores = keys_held.scores(q, pick, rows, given)
        if cache is not None and rotation is not None:
            inside = rows - rotation.shift
            by, kept = inside.clamp(max=cache[0] - 1) - inside, int((reach < cache[1]).sum())
            if kept and bool(by.any()):
                turned = turn(q, by.to(q.device), rotation.frequencies)
                scores = torch.cat([keys_held.scores(turned, index[:kept], rows, given), scores[..., kept:]], -1)
        queries, keys = rows[:, None].to(q.device), reach[None].to(q.device)
        own = given.get("bias")
        scores = _plus(scores, None if own is None else own[:, :, start:stop][..., index.to(q.device)])
        scores = _plus(scores, edit.biases(layer, keys[0], heads, length))
        hidden = _hidden(edit, layer, queries, keys, heads, length, given, crossing is not None)
        scores.masked_fill_(hidden, float("-inf"))
        lse = scores.logsumexp(-1, keepdim=True)
        if given["sinks"] is not None:
            lse = torch.logaddexp(lse, given["sinks"].to(lse.dtype)[:, None, None])
        weights = (scores - lse).exp_() if scores.requires_grad else scores.sub_(lse).exp_()  # in place without gradients
        zeroed = edit.zeroes(layer, keys[0], heads, length)
        if zeroed is not None:
            weights = weights.masked_fill(zeroed, 0)
        look(rows, reach, weights.detach())
        received[pick] += weights.detach().sum((0, 1, 2)).to(received.device).double()
        out[:, :, start:stop] = values_held.mixed(weights, pick, rows).to(out.dtype)
    return edit.outputs(layer, out, asking), received.cpu()


def _reach(edit: Edit, layer: int, rows: Tensor, at: Tensor, given: dict[str, Any]) -> Int[Tensor, " key"]:
    """Give the keys that some queries may see at all: where attention is not causal, every one."""
    if not given["causal"]:
        return at
    reach, window = edit.reach(layer, int(rows[0]), int(rows[-1]) + 1), given["window"]
    return reach if window is None else reach[reach > int(rows[0]) - window]


def _hidden(
    edit: Edit, layer: int, queries: Tensor, keys: Tensor, heads: int, length: int, given: dict[str, Any], crossed: bool
) -> Bool[Tensor, "*head query key"]:
    """Tell which keys are not seen; a query always sees itself, where there is such a key.

    Raises:
        SinkscopeError: no key is left.
    """
    gap, window = queries - keys, given["window"]
    hidden = gap < 0 if given["causal"] else torch.zeros_like(gap, dtype=torch.bool)
    if window is not None:
        hidden = hidden | ((gap if given["causal"] else gap.abs()) >= window)
    real = given.get("key_mask")
    if real is not None:
        hidden = hidden | ~real[:, None, None, keys[0]]
    also = edit.hides(layer, queries, keys, heads, length)
    if also is not None:
        hidden = hidden | (also if crossed else also & (gap != 0))
        if crossed and bool(hidden.all(-1).any()):
            raise SinkscopeError(f"{edit} hides all {length} keys of a source in layer {layer}: leave one")
        if real is not None:  # a pad's row, which nobody reads, must stay a number
            hidden = hidden & ~(hidden.all(-1, keepdim=True) & (gap == 0))
    return hidden


def _plus(scores: Tensor, bias: Tensor | None) -> Tensor:
    return scores if bias is None else scores + bias
