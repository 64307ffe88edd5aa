"""sink-rate: how widespread are sinks, on natural, random and repeated tokens? (Gu et al. 2024, arXiv 2410.10781)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from sinkscope.capture.residuals import residuals
from sinkscope.errors import SinkscopeError
from sinkscope.metrics.across import POSITIVE
from sinkscope.models import adapt
from sinkscope.observe import measure
from sinkscope.reports.plots import estimates
from sinkscope.reports.words import percent
from sinkscope.studies.report import Estimate, Row, StudyReport, asked, sinks, tabulate
from sinkscope.studies.texts import pieces, same, setting


def sink_rate(
    model: Any,
    text: Any = None,
    *,
    sequences: int = 100,
    tokens: int = 64,
    eps: float = 0.3,
    seed: int = 0,
    progress: bool = False,
) -> StudyReport:
    """Count the heads whose first token receives more than `eps`, in three kinds of text, none with BOS.

    One token repeated leaves all hidden states of a rotary model the same: nothing marks the first token, and its sink must
    vanish. Attention need not be uniform then, since a head may prefer near or far tokens; but a row depends on distances
    alone. Absolute positions tell the tokens apart, and a sink may stay.

    Args:
        model: as for :func:`sinkscope.measure`.
        text: one long text, or several; None for the reference that comes with Python.
        sequences: how many of each kind; Gu et al. took 100.
        tokens: of each; Gu et al. took 64. The rate falls with length.
        eps: the threshold.
        seed: of the random and the repeated tokens.
        progress: show a progress bar on stderr.

    Returns:
        A report with `sink_rate@EPS` and `received` (alpha_0) per kind, and `state_difference` of repeated tokens: the
        largest norm(h_t - h_0) / norm(h_0) of the residual stream over positions and layers, of the first eight sequences.

    Raises:
        SinkscopeError: as :func:`sinkscope.measure`; texts that begin with BOS.
    """
    adapter = adapt(model)
    natural = pieces(adapter, text, count=sequences, size=tokens, bos=False)
    first = getattr(adapter.tokenizer, "bos_token_id", None)
    if adapter.causal and first is not None and any(int(s.ids[0]) == first for s in natural.sequences):
        raise SinkscopeError("these texts begin with BOS, and are to be run without: pass strings, or ids without it")
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(adapter.vocabulary, (len(natural), len(natural.sequences[0])), generator=generator)
    repeated = torch.randint(adapter.vocabulary, (len(natural), 1), generator=generator).expand_as(ids)
    kinds = {"natural": natural, "random tokens": same(natural, list(ids)), "repeated token": same(natural, list(repeated))}
    if first is not None or (adapter.tokenizer is not None and not adapter.causal):
        begun = pieces(adapter, text, count=sequences, size=tokens, bos=True)
        if not torch.equal(begun.sequences[0].ids, natural.sequences[0].ids):  # ids that were given get no BOS
            kinds["natural, BOS first"] = begun
    rate, of = f"sink_rate@{eps:g}", setting(natural, "sequences")
    rows: list[Row] = []
    reports = {}
    for kind, sample in kinds.items():
        report = measure(model, sample, [rate, "received"], batch_size=16, progress=progress)
        reports[kind.replace(" ", "-").replace(",", "")] = report
        rows += sinks(report, kind, [rate, "received"], of)
    gaps = [max(residuals(adapter, s.ids, _difference)) for s in kinds["repeated token"].sequences[:8]]
    rows.append(("repeated token", "state_difference", Estimate.of(gaps, bounds=POSITIVE), of))
    name, gap = adapter.name, max(gaps)
    table = tabulate("sink-rate", name, rows)
    found = {case: estimate for case, quantity, estimate, _ in rows if quantity == rate}
    real, again = found["natural"], found["repeated token"]
    verdict = f"{percent(real.value)} of the heads have a sink in natural text, {percent(again.value)} on a repeated token."
    said = (
        f"Without BOS, in {of}, the first token of {name} receives more than {eps:g} in {real} of its heads on "
        f"natural text, in {found['random tokens']} on random tokens and in {again} on one token repeated; chance is "
        f"{real.null:.3g}. On the repeated token, hidden states differ between positions by up to {gap:.1g} of their size: "
    )
    said += "nothing marks the first token. " if gap < 1e-3 else "positions tell the tokens apart. "
    if "natural, BOS first" in found:
        said += f"With BOS (an encoder's special tokens) in its place, natural text has {found['natural, BOS first']}."
    pictures = {"rates": partial(estimates, table, rate, unit="share of heads")}
    return StudyReport("sink-rate", asked(__doc__), table, verdict, said, reports["natural"].about, pictures, reports)


def _difference(layer: int, residual: Tensor) -> float:
    """Give the largest relative difference between a position's hidden state and the first one's."""
    h = residual.float()
    return float(((h - h[:1]).norm(dim=-1) / h[0].norm()).max())
