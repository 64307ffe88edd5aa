"""The causal loop: interventions -> forward passes on the same tokens -> loss, KL and where the sink went."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinkscope.capture.edited import NONE, EditedCapture, plan
from sinkscope.capture.proof import WRONG, WRONG_IN_HALF
from sinkscope.effect import EffectReport, Run
from sinkscope.errors import SinkscopeError
from sinkscope.interventions import Intervention, parse
from sinkscope.models import Adapter, adapt
from sinkscope.progress import bar
from sinkscope.tokens import TextTokens, Tokens

#: Logits at a time, in numbers: tokens x vocabulary is never whole.
LOGITS = 8 << 20


def evaluate(
    model: Any,
    texts: Any,
    interventions: Intervention | str | Sequence[Intervention | str],
    *,
    score_from: int = 1,
    bos: bool | None = None,
    max_tokens: int | None = None,
    progress: bool = False,
) -> EffectReport:
    """Edit the forward pass and see what happens to the loss, on the same tokens as the unedited pass.

    Args:
        model: a TransformerBridge or a plain Hugging Face decoder whose attention asks Hugging Face's attention interface.
            It is left exactly as it was.
        texts: as for :func:`sinkscope.measure`.
        interventions: one or several, as objects or in text form, such as `"sink_window(size=256, sinks=4)"`.
        score_from: score the predictions of tokens at this position (0-based) and later ones.
        bos: as for :func:`sinkscope.measure`.
        max_tokens: keep at most this many tokens of each text, BOS included.
        progress: show a progress bar on stderr.

    Returns:
        An :class:`EffectReport`. Losses are in nats per token. Intervals are of the difference to the unedited run, paired
        token by token: across texts where there are several, else across consecutive blocks of the one text.

    Raises:
        SinkscopeError: bad input; keys outside a text; positions that a streaming window can't be defined for.
        InertHookError: a model inside whose attention no edit can be made; names what works.
    """
    adapter = adapt(model)
    given = [interventions] if isinstance(interventions, Intervention | str) else list(interventions)
    edits = [parse(e) if isinstance(e, str) else e for e in given]
    for edit in edits:
        if not isinstance(edit, Intervention):
            raise SinkscopeError(f"expected an intervention or its text form, got a {type(edit).__name__}")
    if not edits or len({str(e) for e in edits}) < len(edits):
        raise SinkscopeError("give at least one intervention, and each once")
    tokens = adapter.tokenize(texts, bos=bos, max_tokens=max_tokens)
    adapter.check(tokens)
    _check(adapter, tokens, edits, score_from)
    capture = plan(adapter, tokens)
    runs: list[Run] = []
    total = len(tokens) * (1 + len(edits)) * len(adapter.layers)
    _check_logits(adapter, tokens)
    with capture, bar(progress, total, "evaluate") as tick:
        for sequence in tokens.sequences:
            runs += _runs(adapter, capture, sequence, edits, score_from, partial(tick, 1))
    about = adapter.describe() | {
        "engine": capture.name,
        "engine_why": capture.why,
        "bos": tokens.bos,
        "arguments": {"interventions": [str(e) for e in edits], "score_from": score_from, "max_tokens": max_tokens},
        "texts": [{"label": s.label, "n_tokens": len(s)} for s in tokens.sequences],
    }
    return EffectReport.assemble(runs, about)


def _check(adapter: Adapter, tokens: Tokens, edits: Sequence[Intervention], score_from: int) -> None:
    """Refuse, before anything runs, what can't be done on these texts."""
    for s in tokens.sequences:
        if not 1 <= score_from < len(s):
            raise SinkscopeError(
                f"score_from={score_from}: {s.label!r} has {len(s)} tokens, so the first one scored can be 1 to {len(s) - 1}"
            )
        for edit in edits:
            edit.check(len(s))
    for edit in (part for e in edits for part in e.parts()):
        layers = [layer for layer in edit.layers or () if layer not in adapter.layers]
        if layers:
            raise SinkscopeError(
                f"{edit}: layers {layers}; those with attention are {adapter.layers[0]} to {adapter.layers[-1]}"
            )
        heads = [h for h in getattr(edit, "heads", None) or () if not 0 <= h < adapter.n_heads]
        if heads:
            raise SinkscopeError(f"{edit}: heads {heads}; the heads are 0 to {adapter.n_heads - 1}")


def _check_logits(adapter: Adapter, tokens: Tokens) -> None:
    """Prove on a few tokens that unembedding the last hidden state gives the model's own logits."""
    ids = tokens.sequences[0].ids[None, :8].to(adapter.device)
    with adapter.quiet():
        own = adapter.network(input_ids=ids, use_cache=False, output_attentions=False, return_dict=True).logits[0].float()
        ours = adapter.logits(adapter.body(ids, torch.ones_like(ids, dtype=torch.bool))[0])
    gap = float((own - ours).abs().max())
    if not gap < WRONG.get(adapter.dtype, WRONG_IN_HALF) * max(1.0, float(own.abs().max())):
        raise SinkscopeError(f"the logits of {adapter.name} are not its output layer's alone (they differ by {gap:.2g})")


@dataclass
class _Pass:
    """One forward pass over one text, and which row of it predicts which original token."""

    hidden: Float[Tensor, "position d_model"]
    row_of: Int[Tensor, " token"]
    mass: float
    sink: int
    sink_token: str


def _runs(
    adapter: Adapter,
    capture: EditedCapture,
    sequence: TextTokens,
    edits: Sequence[Intervention],
    score_from: int,
    tick: Any,
) -> Iterator[Run]:
    clean = _pass(adapter, capture, sequence, NONE, tick)
    for edit in (NONE, *edits):
        edited = clean if edit is NONE else _pass(adapter, capture, sequence, edit, tick)
        # a token is scored where it stands in both runs, after at least one other
        targets = torch.arange(score_from, len(sequence))
        targets = targets[edited.row_of[targets] >= 0]
        if not len(targets):
            raise SinkscopeError(f"{edit} leaves no token of {sequence.label!r} to be scored")
        clean_loss, loss, kl, same = _compare(adapter, sequence, targets, clean, edited)
        yield Run(
            text=sequence.label,
            intervention="none" if edit is NONE else str(edit),
            tokens=len(targets),
            positions=targets.numpy(),
            loss=loss,
            clean_loss=clean_loss,
            kl=float(kl.mean()),
            agreement=float(same.mean()),
            sink_mass=edited.mass,
            sink_position=edited.sink,
            sink_token=edited.sink_token,
        )


def _pass(adapter: Adapter, capture: EditedCapture, sequence: TextTokens, edit: Intervention, tick: Any) -> _Pass:
    ids, origin = edit.input(sequence.ids)
    strings = tuple(sequence.strings[int(i)] for i in origin)
    (batch,) = Tokens((TextTokens(sequence.label, ids, strings),), "").batches(1, adapter.device)
    hidden = capture.hidden(batch, edit, tick)
    received = capture.received / (len(adapter.layers) * adapter.n_heads * len(ids))
    first, same = (origin == 0).nonzero().flatten().tolist(), ids == sequence.ids[origin]
    row_of = torch.full((len(sequence),), -1)
    row_of[origin[same]] = torch.arange(len(ids))[same] - 1
    top = int(received.argmax())
    if bool(received.isnan().any()):
        return _Pass(hidden, row_of, math.nan, -1, "")
    return _Pass(
        hidden=hidden,
        row_of=row_of,
        mass=float(received[first[0]]) if first else math.nan,
        sink=int(origin[top]),
        sink_token=strings[top] if same[top] else f"(token {int(ids[top])})",
    )


def _compare(
    adapter: Adapter, sequence: TextTokens, targets: Tensor, clean: _Pass, edited: _Pass
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Give, per target: loss of the clean and of the edited run in nats, KL(clean || edited), and whether top-1 agrees."""
    rows = max(1, LOGITS // max(1, adapter.logits(clean.hidden[:1]).shape[-1]))
    found: list[list[Tensor]] = [[], [], [], []]
    for part in torch.split(targets, rows):
        truth = sequence.ids[part].to(clean.hidden.device)[:, None]
        p = adapter.logits(clean.hidden[clean.row_of[part].to(clean.hidden.device)]).log_softmax(-1)
        same = edited is clean
        q = p if same else adapter.logits(edited.hidden[edited.row_of[part].to(clean.hidden.device)]).log_softmax(-1)
        kl = torch.zeros(len(part)) if same else (p.exp() * (p - q)).sum(-1)
        for into, values in zip(
            found, (-p.gather(1, truth)[:, 0], -q.gather(1, truth)[:, 0], kl, p.argmax(-1) == q.argmax(-1)), strict=True
        ):
            into.append(values.double().cpu())
    a, b, c, d = (torch.cat(values).numpy() for values in found)
    return a, b, c, d
