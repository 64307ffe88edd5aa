"""QuantizeKV: keys and values as a quantised cache holds them."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import SupportsIndex

import torch
from jaxtyping import Int
from torch import Tensor

from sinkscope.edit import Whole
from sinkscope.errors import SinkscopeError
from sinkscope.interventions.base import Intervention, one_of
from sinkscope.tokens import whole_number

#: Past any position: of a token whose copy no query ever sees.
NEVER = 1 << 62


def rounded(x: Tensor, bits: int, axis: int) -> Tensor:
    """Round to 2^bits levels between the least and the largest number along an axis (asymmetric min-max, as KIVI).

    >>> rounded(torch.tensor([0.0, 0.2, 0.7, 3.0]), 1, 0)
    tensor([0., 0., 0., 3.])
    """
    low, high = x.float().amin(axis, keepdim=True), x.float().amax(axis, keepdim=True)
    step = (high - low) / (2**bits - 1)
    levels = ((x.float() - low) / step.clamp_min(torch.finfo(torch.float32).tiny)).round()
    return torch.addcmul(low, levels, step).to(x.dtype)


@dataclass(frozen=True)
class QuantizeKV(Intervention):
    """Round keys and values as a quantised cache holds them; `keep` tokens from `at` on stay as they are.

    Each group of numbers is rounded to `bits` bits (1 to 16) between its least and its largest. `scheme="per_token"`: the
    keys and values of each token, `group` channels of a head at a time. `"kivi"`: keys by channel, in groups of `group`
    tokens, values as before; a group is rounded once it is full, and a query sees keys of one that is not as they are.
    Tokens that are kept are in no group. The latest `residual_length` tokens, a query's own among them, are seen as they are.

    `rotated` says whether the cache holds keys with rotary positions in them, or without.
    Sources: KIVI, arXiv 2402.02750; KVSink, arXiv 2508.04257.

    >>> str(QuantizeKV(2, keep=4))
    'quantize_kv(bits=2, keep=4)'
    """

    bits: Whole = 4
    keep: Whole = 0
    at: Whole = field(default=0, kw_only=True)
    scheme: str = field(default="per_token", kw_only=True)
    group: Whole = field(default=64, kw_only=True)
    residual_length: Whole = field(default=0, kw_only=True)
    rotated: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        """Refuse numbers that make no sense."""
        super().__post_init__()
        one_of(self.scheme, ("per_token", "kivi"), f"{type(self).__name__}(scheme=...)")
        whole = ("bits", 1, 16), ("group", 1, NEVER), *((n, 0, NEVER) for n in ("keep", "at", "residual_length"))
        for name, least, most in whole:
            allowed = f"a whole number, at least {least}" if most == NEVER else f"a whole number, {least} to {most}"
            number = whole_number(getattr(self, name), f"{type(self).__name__}({name}=...)", allowed)
            if not least <= number <= most:
                raise SinkscopeError(f"{type(self).__name__}({name}={number}): {name} is {allowed}")
            object.__setattr__(self, name, number)
        if not isinstance(self.rotated, bool):
            raise SinkscopeError(f"{type(self).__name__}(rotated={self.rotated!r}): rotated is True or False")

    @property
    def touches(self) -> frozenset[str]:  # type: ignore[override]
        """What a hook can edit, where each key is the same for all queries; else what the op alone knows."""
        if self.scheme == "kivi" or self.residual_length:
            return frozenset({"held"})
        return frozenset({"values", "rotated keys" if self.rotated else "keys"})

    def check(self, length: int) -> None:
        """Refuse kept tokens outside the text."""
        if self.keep and self.at + self.keep > length:
            raise SinkscopeError(f"{self} keeps tokens outside the text, whose positions are 0 to {length - 1}")

    def placebo(self, seed: SupportsIndex = 0) -> Intervention:
        """Keep as many later tokens instead of the first."""
        if not self.keep:
            return super().placebo(seed)
        return replace(self, at=random.Random(whole_number(seed, "seed")).randrange(16, 64))

    def unrotated(self, layer: int) -> bool:
        """Tell whether keys are held without rotary positions."""
        return not self.rotated

    def held(self, layer: int, what: str, states: Tensor, keys: Tensor) -> tuple[Tensor, Int[Tensor, " key"]]:
        """Round them.

        Raises:
            SinkscopeError: the cache has dropped keys whose groups can't be told.
        """
        others = (keys < self.at) | (keys >= self.at + self.keep)
        if self.scheme == "per_token" or what == "values":
            copies = torch.cat([rounded(part, self.bits, -1) for part in torch.split(states, self.group, -1)], -1)
            copies = torch.where(others.to(states.device)[:, None], copies, states)
            return copies, torch.where(others, keys + self.residual_length, NEVER)
        if len(keys) and int(keys[-1]) + 1 != len(keys):
            raise SinkscopeError(
                f"{self}: layer {layer} holds no keys before {int(keys[0])}, so that groups can't be told: take "
                "scheme='per_token', or evaluate"
            )
        which = others.nonzero().flatten()
        which = which[: len(which) // self.group * self.group]
        first = torch.full_like(keys, NEVER)
        first[which] = keys[which].view(-1, self.group)[:, -1:].expand(-1, self.group).flatten() + self.residual_length
        inside = torch.unflatten(states[:, :, which.to(states.device)], 2, (-1, self.group))
        copies = states.clone()
        copies[:, :, which.to(states.device)] = rounded(inside, self.bits, 3).flatten(2, 3)
        return copies, first
