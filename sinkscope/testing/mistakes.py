"""Mistakes of evicting caches, by name: which keys are kept, and at which rotary positions they stand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from sinkscope.models import Adapter

#: How near a held value must be to that of a token, relative to its norm, to be taken for it.
NEAR = 1e-3


def matched(near: Bool[Tensor, "slot position"]) -> tuple[int, ...]:
    """Take for each slot the token that it holds, -1 where it is none; equal ones in their order, from the last."""
    held: list[int] = []
    for row in near.flip(0):
        candidates = row.nonzero().flatten().tolist()
        before = [k for k in candidates if not held or k < held[-1]]
        held.append(max(before or candidates, default=-1))
    return tuple(held[::-1])


def kept(held: tuple[int, ...], expected: tuple[int, ...], sinks: int, evicts: bool) -> str:
    """Name what is wrong with which keys are kept."""
    if not evicts:
        return "nothing is evicted"
    if set(range(sinks)) & set(expected) - set(held):
        return f"sinks are evicted: of the first {sinks} tokens it keeps {ranges([k for k in held if k < sinks]) or 'none'}"
    if abs(len(held) - len(expected)) == 1:
        return f"off by one in size: it keeps {len(held)} keys where {len(expected)} are expected"
    return f"it keeps other keys, {len(held)} where {len(expected)} are expected"


def stands(adapter: Adapter, keys: Tensor, own: Tensor, held: tuple[int, ...], far: int) -> list[int | None]:
    """Find the rotary position at which each held key stands: which turn of the token's own key gives it."""
    turns = adapter.rotations[0].float().to(keys.device)
    half = len(turns)
    angles = torch.arange(-far, far + 1, device=keys.device)[:, None] * turns
    wheel = torch.polar(torch.ones_like(angles), angles)
    found: list[int | None] = []
    for slot, token in enumerate(held):
        mine, theirs = (torch.complex(k[:, :half], k[:, half : 2 * half]) for k in (own[:, token].float(), keys[:, slot]))
        gap = (wheel[:, None] * mine - theirs).abs().amax((1, 2))
        best = int(gap.argmin())
        near = float(gap[best]) < 10 * NEAR * float(mine.abs().max())
        found.append(token + best - far if near else None)
    return found


def positions_of(held: tuple[int, ...], stand: list[int | None] | None) -> str:
    """Name what is wrong with where the right keys stand."""
    if stand is None:
        return "the right keys, and other positions"
    last = len(held) - 1
    if all(at in (k, min(k, last)) for k, at in zip(held, stand, strict=True)):
        return "no position shift: keys stand where they stood when they came, and are not moved up"
    wrong = [(slot, k, at) for slot, (k, at) in enumerate(zip(held, stand, strict=True)) if at not in (slot, k)]
    if not wrong:
        return "positions inside the cache and original ones are mixed: " + _where(held, stand)
    if all(at in (k + slot, 2 * k, 2 * slot, 2 * slot - min(k, last)) for slot, k, at in wrong):
        return "keys are rotated twice: " + _where([k for _, k, _ in wrong], [at for _, _, at in wrong])
    return "keys stand at other positions: " + _where([k for _, k, _ in wrong], [at for _, _, at in wrong])


def _where(held: Sequence[int], stand: Sequence[int | None]) -> str:
    some = [f"token {k} at {'none' if at is None else at}" for k, at in zip(held, stand, strict=True)]
    return ", ".join(some[:4]) + (", ..." if len(some) > 4 else "")


def ranges(numbers: Sequence[int]) -> str:
    """Write 0, 1, 5, 6, 7 as `0-1, 5-7`."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
