"""Slow and obvious references for the statistics of attention sinks.

Written from the definitions alone, in plain loops, and independent of the package: nothing here imports it.
`A[i, k]` is the attention that query `i` gives to key `k`; positions are 0-based.
Sums are rounded only once (`fsum`); a mean over no queries at all is nan.
"""

import math
import sys
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from scipy import stats

SHARE_OF_HEADS_EPS = 0.3
"""The threshold of `sink_share_of_heads`, whatever `eps` says."""

NOT_OF_THE_PATTERN = frozenset({"value_drain", "sink_output_share", "key_norm", "query_key_cosine", "massive_activation"})
"""Statistics that an attention pattern does not determine, so that uniform attention gives them no value."""


def reference(
    pattern: np.ndarray,
    *,
    key: int = 0,
    causal: bool = True,
    windows: Sequence[int | None] | None = None,
    eps: Sequence[float] = (0.3, 0.8),
) -> dict[str, np.ndarray | float]:
    """Give every statistic of one sequence's attention `pattern`, [layer, head, query, key], by its name."""
    pattern = np.asarray(pattern, dtype=np.float64)
    if pattern.ndim != 4 or pattern.shape[2] != pattern.shape[3]:
        raise ValueError(f"pattern must be [layer, head, T, T], got {pattern.shape}")
    layers, heads, length, _ = pattern.shape
    windows = [None] * layers if windows is None else list(windows)
    if len(windows) != layers:
        raise ValueError(f"{len(windows)} windows for {layers} layers")
    if not 0 <= key < length:
        raise ValueError(f"key {key} lies outside 0..{length - 1}")

    per_head: dict[str, np.ndarray] = {}
    per_key = {
        "position_profile": np.zeros((layers, heads, length)),
        "received_profile": np.zeros((layers, heads, length)),
    }
    for layer in range(layers):
        for head in range(heads):
            rows = pattern[layer, head].tolist()
            numbers = _one_head(rows, key=key, causal=causal, window=windows[layer], eps=eps)
            for name, number in numbers.items():
                per_head.setdefault(name, np.zeros((layers, heads)))[layer, head] = number
            for k in range(length):
                per_key["position_profile"][layer, head, k] = sink_mass(rows, k)
                per_key["received_profile"][layer, head, k] = received(rows, k, causal=causal)

    series = [_mean(per_head["sink_mass"][layer]) for layer in range(layers)]
    third = max(1, layers // 3)
    share_of_heads = []
    for k in range(length):
        alphas = per_key["received_profile"][:, :, k].flat
        share_of_heads.append(_mean(1.0 if alpha > SHARE_OF_HEADS_EPS else 0.0 for alpha in alphas))
    return {
        **per_head,
        **per_key,
        "sink_strength": _divide(math.fsum(pattern[:, :, :, key].flat), math.fsum(pattern.flat)),
        "first_to_rest_ratio": _first_to_rest_ratio(_mean(per_head["sink_mass"].flat), length),
        "layer_progression": _mean(series[-third:]) - _mean(series[:third]),
        "layer_series": np.array(series),
        "sink_share_of_heads": np.array(share_of_heads),
    }


def null(
    name: str,
    T: int,
    *,
    key: int = 0,
    causal: bool = True,
    window: int | None = None,
    eps: float = 0.3,
) -> float | None:
    """Give the value of the statistic `name` when attention is uniform; None where there is no such value.

    The uniform pattern is built and measured as a model of one layer and one head. The window counts only for
    the `visible_*` names. A rate may be named with its threshold (`sink_rate@0.8`) or without (then `eps` is
    it); a statistic that has one value per key gives that of `key`.
    """
    base, _, threshold = name.partition("@")
    if base in NOT_OF_THE_PATTERN:
        return None
    if base in ("sink_rate", "visible_sink_rate"):
        eps = float(threshold) if threshold else eps
        name = f"{base}@{eps:g}"
    if not base.startswith("visible_"):
        window = None

    pattern = uniform(T, causal=causal, window=window)[None, None]
    statistics = reference(pattern, key=key, causal=causal, windows=[window], eps=[eps])
    if name not in statistics:
        raise ValueError(f"no statistic is named {name!r}; there are {sorted(statistics)}")
    if name in ("position_profile", "received_profile"):
        value = statistics[name][0, 0, key]
    elif name == "sink_share_of_heads":
        value = statistics[name][key]
    else:
        value = np.asarray(statistics[name]).item()
    return None if math.isnan(value) else float(value)


def consistency(values: Iterable[float]) -> dict[str, float]:
    """Give how much one number varies across texts; nan where fewer than two texts leave it undefined."""
    values = [float(value) for value in values]
    mean = _mean(values)
    std = _standard_deviation(values)
    if len(values) < 2:
        return {"std": math.nan, "cv": math.nan, "low": math.nan, "high": math.nan}
    margin = float(stats.t.ppf(0.975, len(values) - 1)) * std / math.sqrt(len(values))
    if not 0 < mean < 1:
        return {"std": std, "cv": _divide(std, mean), "low": max(0.0, mean - margin), "high": min(1.0, mean + margin)}
    logit, slope = math.log(mean / (1 - mean)), 1 / (mean * (1 - mean))  # a share: the interval is made on the logit scale
    low, high = (1 / (1 + math.exp(-(logit + way * margin * slope))) for way in (-1, 1))
    return {"std": std, "cv": _divide(std, mean), "low": low, "high": high}


def standard_error(values: Iterable[float]) -> float:
    """Give the standard error of the mean of per-text numbers; nan for fewer than two."""
    values = [float(value) for value in values]
    if len(values) < 2:
        return math.nan
    return _standard_deviation(values) / math.sqrt(len(values))


def uniform(T: int, *, causal: bool = True, window: int | None = None) -> np.ndarray:
    """Build the pattern [T, T] in which each query attends equally to every key that it sees."""
    pattern = np.zeros((T, T))
    for i in range(T):
        seen = [k for k in range(T) if sees(i, k, causal=causal, window=window)]
        for k in seen:
            pattern[i, k] = 1 / len(seen)
    return pattern


def sees(i: int, k: int, *, causal: bool = True, window: int | None = None) -> bool:
    """Say whether query `i` sees key `k`."""
    if window is not None and window < 1:
        raise ValueError(f"a window holds at least the query's own position, got {window}")
    if not causal:
        if window is not None:
            raise ValueError("a window is defined here for causal attention only")
        return True
    if window is None:
        return k <= i
    return 0 <= i - k < window


def keys_seen(i: int, T: int, *, causal: bool = True) -> int:
    """Count the keys that query `i` of `T` sees (n_i), windows ignored."""
    return i + 1 if causal else T


# The statistics of one head: `rows[i][k]` is the attention of query i to key k.

Rows = list[list[float]]


def _one_head(rows: Rows, *, key: int, causal: bool, window: int | None, eps: Sequence[float]) -> dict[str, float]:
    """Give every statistic that has one value per head."""
    alpha = received(rows, key, causal=causal)
    visible = visible_sink_mass(rows, key, causal=causal, window=window)
    entropies = [entropy(row) for row in rows]
    numbers = {
        "sink_mass": sink_mass(rows, key),
        "sink_mass_excess": sink_mass_excess(rows, key, causal=causal),
        "visible_sink_mass": visible,
        "received": alpha,
        "last_row_share": rows[-1][key],
        "row_entropy": _mean(entropies),
        "normalized_row_entropy": normalized_row_entropy(rows, causal=causal),
        "effective_keys": _mean(math.exp(nats) for nats in entropies),
        "row_deficit": _mean(1 - math.fsum(row) for row in rows),
    }
    for threshold in eps:
        numbers[f"sink_rate@{threshold:g}"] = 1.0 if alpha > threshold else 0.0
        numbers[f"visible_sink_rate@{threshold:g}"] = 1.0 if visible > threshold else 0.0
    return numbers


def sink_mass(rows: Rows, key: int) -> float:
    """Mean over all queries of the attention to `key`."""
    return _mean(row[key] for row in rows)


def sink_mass_excess(rows: Rows, key: int, *, causal: bool = True) -> float:
    """Mean of A[i, key] - 1/n_i over the queries that see the key and at least one other key."""
    excess = []
    for i, row in enumerate(rows):
        if not causal or i >= max(1, key):
            excess.append(row[key] - 1 / keys_seen(i, len(rows), causal=causal))
    return _mean(excess)


def visible_sink_mass(rows: Rows, key: int, *, causal: bool = True, window: int | None = None) -> float:
    """Mean of A[i, key] over the queries that can see the key, the window respected."""
    return _mean(row[key] for i, row in enumerate(rows) if sees(i, key, causal=causal, window=window))


def received(rows: Rows, key: int, *, causal: bool = True) -> float:
    """Sum over i >= key of A[i, key] / (T - key) (alpha_k); the mean over all queries when not causal."""
    if not causal:
        return _mean(row[key] for row in rows)
    return math.fsum(rows[i][key] for i in range(key, len(rows))) / (len(rows) - key)


def entropy(row: Sequence[float]) -> float:
    """Minus the sum of A log A in nats, with 0 log 0 = 0; a row that lacks mass is taken as it is."""
    return -math.fsum(a * math.log(a) for a in row if a != 0)


def normalized_row_entropy(rows: Rows, *, causal: bool = True) -> float:
    """Mean of entropy / log(n_i) over the queries that see at least two keys."""
    ratios = []
    for i, row in enumerate(rows):
        n = keys_seen(i, len(rows), causal=causal)
        if n >= 2:
            ratios.append(entropy(row) / math.log(n))
    return _mean(ratios)


def _first_to_rest_ratio(mass: float, T: int) -> float:
    """Mass on the key over the mean mass of the other keys: nan for one token, inf if they have none."""
    return math.nan if T == 1 else _divide(mass, (1 - mass) / (T - 1))


def _standard_deviation(values: Sequence[float]) -> float:
    """Sample standard deviation (ddof = 1); nan for fewer than two."""
    if len(values) < 2:
        return math.nan
    mean = _mean(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def _mean(values: Iterable[float]) -> float:
    """Plain mean; nan of nothing."""
    values = list(values)
    return math.fsum(values) / len(values) if values else math.nan


def _divide(above: float, below: float) -> float:
    """Quotient as in numpy: x / 0 is infinite, 0 / 0 is nan."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.float64(above) / np.float64(below))


# --- eviction, token by token ---------------------------------------------------------------------------------------


def evicting_loop(model, ids, size, sinks, *, cache_positions):
    """Token by token with Hugging Face's own cache, from which entries are cut out; loss of every next token, in nats.

    With cache positions, keys are turned back and forth between steps so that each stands where it is in the cache.
    """
    from transformers import DynamicCache

    cache, found = DynamicCache(), []
    for i, token in enumerate(ids.tolist()):
        held = 0 if not cache.layers or not cache.layers[0].is_initialized else cache.layers[0].keys.shape[2]
        if held >= size:  # room for the new token: the oldest that is no sink goes
            keep = torch.tensor([*range(sinks), *range(held - (size - 1 - sinks), held)], dtype=torch.long)
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys[:, :, keep], layer.values[:, :, keep]
                if cache_positions:
                    layer.keys = turned(model, layer.keys, torch.arange(len(keep)) - keep)
            held = len(keep)
        at = torch.tensor([[held if cache_positions else i]])
        with torch.no_grad():
            logits = model(torch.tensor([[token]]), position_ids=at, past_key_values=cache, use_cache=True).logits[0, -1]
        if i + 1 < len(ids):
            found.append(-float(logits.double().log_softmax(-1)[ids[i + 1]]))
    return np.array(found)


def turned(model, keys, by):
    """Turn keys by some positions, with the tables and the function of Hugging Face's modelling code."""
    rotary = next(m for name, m in model.named_modules() if name.endswith("rotary_emb"))
    cos, sin = rotary(keys, by[None])
    apply = sys.modules[type(rotary).__module__].apply_rotary_pos_emb
    d = cos.shape[-1]
    moved, _ = apply(keys[..., :d], keys[..., :d], cos, sin)
    return torch.cat([moved, keys[..., d:]], -1)


# --- edits of attention, one head and one query at a time -----------------------------------------------------------


class Loops:
    """Attention in plain loops, for Hugging Face's interface; a test edits it by overriding one of the first four methods."""

    def score(self, layer, head, i, k, score):
        """Give the score of key `k` for query `i`; minus infinity hides it."""
        return score

    def weight(self, layer, head, i, k, weight):
        """Give the attention to use."""
        return weight

    def states(self, layer, what, i, x):
        """Give the keys or values [key, d] of one key head as query `i` sees them: those up to `i` alone count."""
        return x

    def values(self, layer, head, x):
        """Give the values [key, d] that one query head reads."""
        return x

    def outputs(self, layer, head, x):
        """Give what a head gives, [query, d]."""
        return x

    def __call__(self, module, query, key, value, mask, scaling=None, sliding_window=None, softcap=None, s_aux=None, **_):
        (_, heads, length, d), groups = query.shape, query.shape[1] // key.shape[1]
        scaling, found = d**-0.5 if scaling is None else scaling, []
        for head in range(heads):
            keys, values = (x[0, head // groups].double() for x in (key, value))
            values, rows = self.values(module.layer_idx, head, values), []
            for i in range(length):
                seen = [k for k in range(i + 1) if sliding_window is None or i - k < sliding_window]
                these, those = (self.states(module.layer_idx, what, i, x) for what, x in (("keys", keys), ("values", values)))
                scores = [scaling * float(query[0, head, i].double() @ these[k]) for k in seen]
                if softcap is not None:
                    scores = [softcap * math.tanh(score / softcap) for score in scores]
                scores = [self.score(module.layer_idx, head, i, k, s) for k, s in zip(seen, scores, strict=True)]
                total = math.fsum(map(math.exp, scores)) + (0 if s_aux is None else math.exp(float(s_aux[head])))
                weights = [math.exp(s) / total for s in scores]
                weights = [self.weight(module.layer_idx, head, i, k, w) for k, w in zip(seen, weights, strict=True)]
                rows.append(sum(w * those[k] for w, k in zip(weights, seen, strict=True)))
            found.append(self.outputs(module.layer_idx, head, torch.stack(rows)))
        return torch.stack(found, 1)[None].to(query.dtype), None


def attend_by(model, name):
    """Choose how a Hugging Face model attends; transformers 4.51 has no method for it."""
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation(name)
    else:
        model.config._attn_implementation = name


def looping(model, ids, loops):
    """Loss of every next token, in nats, of a Hugging Face decoder that attends by these loops."""
    import transformers

    names = ("AttentionInterface", "AttentionMaskInterface")  # the second is not in transformers 4.51, which takes any mask
    interfaces = [getattr(transformers, name) for name in names if hasattr(transformers, name)]
    before = model.config._attn_implementation
    for interface, function in zip(interfaces, (loops, lambda *args, **how: None), strict=False):
        interface.register("loops", function)
    try:
        attend_by(model, "loops")
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1].double()
    finally:
        attend_by(model, before)
        for interface in interfaces:
            interface._global_mapping.pop("loops")
    return -logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0].numpy()


def to_levels(x, bits):
    """Round a row of numbers to the levels between its least and its largest."""
    low, step = min(x), (max(x) - min(x)) / (2**bits - 1)
    return [low + step * round((number - low) / step) if step else number for number in x]
