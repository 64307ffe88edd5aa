"""What a report must say: Hugging Face's own attentions (eager, float32, no bridge) and their reduction."""

from __future__ import annotations

import functools
import importlib.metadata
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch

from sinkscope.models.versions import installed
from sinkscope.testing.families import FAMILIES, WINDOW, tiny_hf_model
from tests import oracles
from tests.conftest import table, total

TL4 = int(importlib.metadata.version("transformer-lens").partition(".")[0]) >= 4
#: That of transformers 4 computes its attention by itself.
bert_asks = pytest.mark.skipif(
    installed("transformers") < (5, 0), reason="transformers 5 has BERT's attention by its interface"
)
TOLERANCE = 1e-5
#: Families whose attention Hugging Face's interface can't replace, so that `engine="auto"` takes hooks.
#: GPT-J asks it from 5.24 on.
NOT_FLASH = {"bloom", "gpt_neo"} if installed("transformers") >= (5, 24) else {"gptj", "bloom", "gpt_neo"}
PER_HEAD = [
    "sink_mass", "sink_mass_excess", "visible_sink_mass", "received", "last_row_share", "row_entropy",
    "normalized_row_entropy", "effective_keys", "row_deficit",
]  # fmt: skip
RATES = {"sink_rate": "received", "visible_sink_rate": "visible_sink_mass"}
PROFILES = ["position_profile", "received_profile"]
MODEL_LEVEL = ["sink_strength", "first_to_rest_ratio", "layer_progression"]
EPS = (0.3, 0.8)


def text_ids(length: int) -> list[int]:
    """Ids for a tiny model: BOS first; the pad's id and EOS inside and at the end, where a batch has pads of id 0."""
    ids = torch.randint(3, 64, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    ids[0], ids[2], ids[3] = 1, 0, 2
    ids[-2:] = [2, 0] if length % 2 else [0, 2]
    return ids


#: Unequal lengths, that make two padded batches: 7 with 13 and 24 with 40.
IDS = {f"text {i}": text_ids(length) for i, length in enumerate((7, 24, 40, 13))}


def layers_of(network, ids) -> list[torch.Tensor]:
    """Hugging Face's `output_attentions` of one text, `[head, query, key]` each."""
    assert network.config._attn_implementation == "eager"
    assert next(network.parameters()).dtype == torch.float32
    device = next(network.parameters()).device
    with torch.no_grad():
        found = network(input_ids=torch.as_tensor(ids, device=device)[None], output_attentions=True).attentions
    return [layer[0].cpu() for layer in found]


def attentions(network, ids) -> torch.Tensor:
    """The same as one tensor, `[layer, head, query, key]`."""
    return torch.stack(layers_of(network, ids))


def windows_of(family: str) -> list[int | None]:
    return [WINDOW if local else None for local in FAMILIES[family].local]


@functools.cache
def _tiny_attentions(family: str, ids: tuple[int, ...]) -> torch.Tensor:
    return attentions(tiny_hf_model(family), ids)


@functools.cache
def _tiny_reference(family: str, ids: tuple[int, ...], key: int) -> dict:
    pattern = _tiny_attentions(family, ids).numpy()
    return oracles.reference(pattern, key=key, causal=family != "bert", windows=windows_of(family))


def tiny_reference(family: str, ids, key: int = 0) -> dict:
    """The oracle on a fresh Hugging Face model of the family, that TransformerLens has not touched."""
    return _tiny_reference(family, tuple(ids), key % len(ids))


def reduced(layers: Iterable[torch.Tensor], *, key: int = 0, causal: bool = True) -> dict:
    """`oracles.reference` without its loops, in float64, for patterns too large for it; no windows."""
    found = defaultdict(list)
    for layer in layers:
        a = layer.double()
        t = a.shape[-1]
        i = torch.arange(t)
        n = (i + 1 if causal else torch.full((t,), t)).double()
        sees = i >= key if causal else n > 0
        column, entropy = a[:, :, key], torch.special.entr(a).sum(-1)
        found["sink_mass"].append(column.mean(-1))
        found["sink_mass_excess"].append((column - 1 / n)[:, sees & (n > 1)].mean(-1))
        found["visible_sink_mass"].append(column[:, sees].mean(-1))
        found["received"].append(column[:, sees].mean(-1))
        found["last_row_share"].append(column[:, -1])
        found["row_entropy"].append(entropy.mean(-1))
        found["normalized_row_entropy"].append((entropy / n.log())[:, n > 1].mean(-1))
        found["effective_keys"].append(entropy.exp().mean(-1))
        found["row_deficit"].append(1 - a.sum(-1).mean(-1))
        found["position_profile"].append(a.mean(1))
        found["received_profile"].append(a.sum(1) / (t - i if causal else t))
    expected = {name: torch.stack(values).numpy() for name, values in found.items()}
    for rate, of in RATES.items():
        expected |= {f"{rate}@{eps}": (expected[of] > eps).astype(float) for eps in EPS}
    m, series = expected["sink_mass"].mean(), expected["sink_mass"].mean(1)
    third = max(1, len(series) // 3)
    return expected | {
        "sink_strength": expected["sink_mass"].sum() / (1 - expected["row_deficit"]).sum(),
        "first_to_rest_ratio": m / (1 - m) * (t - 1),
        "layer_series": series,
        "layer_progression": series[-third:].mean() - series[:third].mean(),
        "sink_share_of_heads": (expected["received_profile"] > 0.3).mean((0, 1)),
    }


def close(got, expected, name: str, tol: float = TOLERANCE) -> None:
    """Absolute, but relative where the unit is keys or times."""
    relative = name in ("effective_keys", "first_to_rest_ratio")
    how = {"rtol": tol, "atol": 0.0} if relative else {"rtol": 0.0, "atol": tol}
    np.testing.assert_allclose(got, expected, err_msg=name, **how)


def check(report, expected: dict, text: str = "text 0", tol: float = TOLERANCE) -> None:
    """Compare everything that the default metrics say of one text with `oracles.reference` or `reduced`."""
    rates = [f"{rate}@{eps}" for rate in RATES for eps in EPS]
    measured = set(report.metrics) | {"sink_positions"}  # which has no rows where there is no sink
    assert measured == {*PER_HEAD, *rates, *PROFILES, *MODEL_LEVEL, "sink_positions"}, "a metric is not checked"
    for name in PER_HEAD:
        close(table(report, name, text), expected[name], name, tol)
        close(total(report, name, text), expected[name].mean(), name, tol)
    for name in PROFILES:
        close(table(report, name, text), expected[name].mean(1), name, tol)
    for name in MODEL_LEVEL:
        close(total(report, name, text), expected[name], name, tol)
    close(table(report, "layer_progression", text), expected["layer_series"], "layer_progression", tol)
    for name in rates:
        rate, _, eps = name.partition("@")
        clear = np.abs(expected[RATES[rate]] - float(eps)) > tol  # rounding may decide the others
        np.testing.assert_array_equal(table(report, name, text)[clear], expected[name][clear], err_msg=name)
        assert abs(total(report, name, text) - expected[name].mean()) <= (~clear).mean() + 1e-12
    alpha = expected["received_profile"]
    least, most = ((alpha > 0.3 + d).mean((0, 1)) for d in (tol, -tol))
    rows = report.frame[(report.frame["metric"] == "sink_positions") & (report.frame["text"] == text)]
    listed = dict(zip(rows["key"], rows["value"], strict=True))
    assert set(np.flatnonzero(least >= 0.1)) <= set(listed) <= set(np.flatnonzero(most >= 0.1))
    assert all(least[k] - 1e-12 <= share <= most[k] + 1e-12 for k, share in listed.items())
    assert total(report, "sink_positions", text) == len(listed)


def check_all(report, expected: dict[str, dict], tol: float = TOLERANCE) -> None:
    """Compare every text, and the means, standard errors and consistency across texts."""
    assert report.texts == list(expected)
    for text, one in expected.items():
        check(report, one, text, tol)
    for name in (*PER_HEAD, *MODEL_LEVEL):
        values = [float(np.mean(one[name])) for one in expected.values()]
        close(total(report, name, "all"), np.mean(values), name, tol)
        close(total(report, name, "all", "std_error"), oracles.standard_error(values), name, tol * 10)
    for part, value in oracles.consistency(one["sink_mass"].mean() for one in expected.values()).items():
        close(total(report, f"consistency@{part}", "all"), value, "consistency", tol * 10)


def same(report, text: str, other, other_text: str, tol: float) -> None:
    """Two reports say the same of a text."""
    for name in (*PER_HEAD, *PROFILES, "layer_progression"):
        close(table(report, name, text), table(other, name, other_text), name, tol)


def novel(tokens_at_most: int) -> str:
    """The start of a real novel; where the shared data are not at hand, of Python's own reference."""
    path = Path(__file__).parents[2] / "../shared/data/northangerabbey.txt"
    if path.exists():
        text = path.read_text(encoding="utf-8")
    else:
        from pydoc_data.topics import topics

        text = "\n".join(topics.values())
    return text[: 8 * tokens_at_most].strip()


def losses(report, name):
    """Give what each token scored costs under an edit, in nats."""
    rows = report.curves[report.curves["intervention"] == str(name)]
    return rows["loss"].to_numpy()
