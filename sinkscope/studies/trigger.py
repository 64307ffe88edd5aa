"""necessity: must softmax have a sink where ReLU need not? (Ran-Milo 2026, arXiv 2603.11487).

The task: tokens are vectors; one of them is the trigger, at which the mean of all tokens after the first is wanted, and
nothing anywhere else. Coordinate 0 marks the first token, 1 the trigger, the last one all others; the rest are uniform from
-1 to 1. Weights that must sum to one have to go where they do no harm; the theorem is that this is the first token.
As in the paper: width and length 16, attention and residual stream alone, heads as wide as the model, ReLU divided by the
tokens after the first; Adam with betas 0.9 and 0.95. Shorter than there: hundreds of steps, at a higher rate that falls to 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from torch import Generator, Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from sinkscope.errors import SinkscopeError
from sinkscope.metrics.across import POSITIVE, SHARE
from sinkscope.reports.drawing import LINE, MARK, NULL, SERIES, WIDE, finish
from sinkscope.runs.progress import bar
from sinkscope.studies.kinds import ATTENTIONS, Attention
from sinkscope.studies.report import Estimate, Row, StudyReport, asked, beside, tabulate
from sinkscope.studies.toy import DRAWING, one_thread, side_by_side

WIDTH = LENGTH = 16
#: A task is learned where less than this share of the target's variance is left, and a head sinks from this weight on.
LEARNED, SINK = 0.05, 0.5
RATE, WARMUP, BATCH, TESTS = 1e-2, 50, 16, 1000
#: Kinds that the paper compares, and that are trained alone at sizes above this, for they take most of the time.
COMPARED, LARGE = ("softmax", "relu"), 2
#: Where the learned logit starts: from 0 it is the off-by-one until it has been learned.
LOGIT = 4.0
BOUNDS = {"unexplained": POSITIVE, "largest_error": POSITIVE, "row_sum": POSITIVE}
QUANTITIES = (*BOUNDS, "first_token_other", "first_token_trigger", "first_token_mean", "first_token_least")


class Model(nn.Module):
    """Layers of attention on a residual stream; gives what they add to it, and all weights, `[n, layer and head, ...]`."""

    def __init__(self, attention: str, size: int) -> None:
        super().__init__()
        layers = (Attention(attention, WIDTH, size, d_head=WIDTH, logit=LOGIT) for _ in range(size))
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Run."""
        given, weights, over = x, [], torch.arange(LENGTH).clamp(min=1)[:, None]
        for layer in self.layers:
            added, here, _ = layer(x, over)
            x = x + added
            weights.append(here)
        return x - given, torch.cat(weights, dim=1)


def draw(generator: Generator, n: int) -> tuple[Float[Tensor, "n length width"], Tensor, Bool[Tensor, "n length"]]:
    """Draw sequences: tokens, what is wanted, and where the trigger is, from the third token on."""
    at, row = torch.randint(2, LENGTH, (n,), generator=generator), torch.arange(n)
    x, wanted = torch.zeros(n, LENGTH, WIDTH), torch.zeros(n, LENGTH, WIDTH)
    x[:, 0, 0], x[:, 1:, -1] = 1.0, 1.0
    x[:, 1:, 2:-1] = 2 * torch.rand(n, LENGTH - 1, WIDTH - 3, generator=generator) - 1
    x[row, at, 1], x[row, at, -1] = 1.0, 0.0
    wanted[row, at] = x[:, 1:].cumsum(1)[row, at - 1] / at[:, None]
    return x, wanted, torch.arange(LENGTH) == at[:, None]


def train(attention: str, size: int, *, steps: int, seeds: int) -> dict[str, list[float]]:
    """Train one model per seed, all at once, and measure each on the same new sequences; the numbers of `QUANTITIES`.

    Weights are as they are, not divided by a row's sum; of the head with the largest weight on the first token at queries
    that are no triggers (other), of that head at triggers, and of others the mean over heads and the least.
    """
    with one_thread(), torch.device("cpu"), torch.inference_mode(False), torch.enable_grad():
        models = []
        with DRAWING, torch.random.fork_rng(devices=[]):
            for seed in range(seeds):
                torch.default_generator.manual_seed(seed)
                models.append(Model(attention, size))
        weights = {name: p.detach().requires_grad_() for name, p in stack_module_state(models)[0].items()}
        run = vmap(lambda given, x: functional_call(models[0], given, (x,)))
        optimizer = torch.optim.Adam(weights.values(), lr=RATE, betas=(0.9, 0.95))
        at = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, (s + 1) / WARMUP) * (1 - s / (steps + 1)) ** 0.5)
        streams = [Generator().manual_seed(1000 + seed) for seed in range(seeds)]
        for _ in range(steps):
            x, wanted, _ = (torch.stack(t) for t in zip(*(draw(g, BATCH) for g in streams), strict=True))
            optimizer.zero_grad()
            loss = (run(weights, x)[0] - wanted).square().mean((1, 2, 3)).sum()  # a sum: no seed bears on another
            torch.autograd.backward(loss)
            optimizer.step()
            at.step()
        x, wanted, trigger = draw(Generator().manual_seed(999), TESTS)
        with torch.no_grad():
            got, paid = run(weights, x.expand(seeds, -1, -1, -1))
            each = [look(given, row, wanted, trigger) for given, row in zip(got, paid, strict=True)]
    return {name: [one[name] for one in each] for name in QUANTITIES}


def look(got: Tensor, weights: Tensor, wanted: Tensor, trigger: Bool[Tensor, "n length"]) -> dict[str, float]:
    """Measure a model on sequences: how well it does, and what its heads pay the first token, at queries from 1 on."""
    first, here = weights[..., 1:, 0].double(), trigger[:, None, 1:].double()
    other = ((first * (1 - here)).sum((0, 2)) / (1 - here).sum()).numpy()
    paid, sums = (first * here).sum((0, 2)) / here.sum(), weights[..., 1:, :].double().sum(-1)
    top = int(other.argmax())
    return {
        "unexplained": float((got - wanted).square().sum() / wanted.square().sum()),
        "largest_error": float((got - wanted).abs().max()),
        "row_sum": float((sums[:, top] * (1 - here[:, 0])).sum() / (1 - here).sum()),
        "first_token_other": float(other.max()),
        "first_token_trigger": float(paid[top]),
        "first_token_mean": float(other.mean()),
        "first_token_least": float(other.min()),
    }


def necessity(
    model: Any = None,
    text: Any = None,
    *,
    steps: int = 400,
    seeds: int = 5,
    sizes: Sequence[int] = (1, 2, 4),
    progress: bool = False,
) -> StudyReport:
    """Train small models with every kind of attention on a task that has nothing to attend to but at a trigger.

    Sizes above 2x2 are trained with softmax and ReLU alone, the two that the paper compares.

    Args:
        model: not looked at: models are trained from scratch.
        text: not looked at.
        steps: of training.
        seeds: models trained per case, at least two; intervals are across them.
        sizes: layers of the models, and heads of each layer.
        progress: show a progress bar on stderr.

    Returns:
        A report with, per kind and size, the loss reached (`unexplained`: the share of the target's variance that is left;
        `largest_error`), and the weight on the first token at queries that are no triggers (`first_token_other`, of the most
        sinking head; mean and least of all heads), and of that head at triggers.

    Raises:
        SinkscopeError: fewer than two seeds.
    """
    if seeds < 2:
        raise SinkscopeError(f"seeds={seeds}: one model has no interval; train at least two")
    of, null = f"{steps} steps, {seeds} seeds", float((1 / torch.arange(2, LENGTH + 1)).mean())
    rows: list[Row] = []
    cases = [(kind, size) for size in sizes for kind in _kinds(size)]

    def trained(case: tuple[str, int]) -> dict[str, list[float]]:
        return train(*case, steps=steps, seeds=seeds)

    with bar(progress, sum(size**2 for _, size in cases), "necessity", "head") as tick:
        for (kind, size), found in zip(cases, side_by_side(trained, cases), strict=True):
            for name, values in found.items():
                chance = null if name.startswith("first") else float("nan")
                rows.append((f"{kind}, {size}x{size}", name, Estimate.of(values, chance, BOUNDS.get(name, SHARE)), of))
            tick(size**2)
    table = tabulate("necessity", "trigger-mean", rows)
    value = {(case, quantity): estimate for case, quantity, estimate, _ in rows}
    verdict, said = _say(value, of, sizes)
    said += beside(table)
    pictures = {"first-token": partial(_draw, value, sizes)}
    about = {"model": "trigger-mean", "steps": steps, "seeds": seeds, "sizes": list(sizes)}
    return StudyReport("necessity", asked(__doc__), table, verdict, said, about, pictures)


def _kinds(size: int) -> tuple[str, ...]:
    return COMPARED if size > LARGE else ATTENTIONS


def _cases(kind: str, sizes: Sequence[int]) -> list[str]:
    return [f"{kind}, {size}x{size}" for size in sizes if kind in _kinds(size)]


def _kind(value: Mapping[tuple[str, str], Estimate], case: str) -> str:
    """Say what became of a case: whether its task is learned, and whether its most sinking head sinks at others."""
    paid = value[case, "first_token_other"]
    if not value[case, "unexplained"].high < LEARNED:
        return "not learned"
    return "a sink" if paid.low > SINK else "no sink" if paid.high < paid.null else "in between"


def _say(value: Mapping[tuple[str, str], Estimate], of: str, sizes: Sequence[int]) -> tuple[str, str]:
    """Say what was found, and what was not."""
    found = {kind: {_kind(value, case) for case in _cases(kind, sizes)} for kind in ATTENTIONS}
    groups = {
        what: [k for k in ATTENTIONS if found[k] == {what}] for what in ("a sink", "no sink", "in between", "not learned")
    }
    groups["not the same at all sizes"] = [k for k in ATTENTIONS if len(found[k]) > 1]
    verdict = "; ".join(f"{what}: {', '.join(kinds)}" for what, kinds in groups.items() if kinds) + "."
    said = (
        f"Models of {', '.join(f'{n}x{n}' for n in sizes)} layers and heads, {of}. Where nothing is wanted, the most sinking "
    )
    said += "head pays the first token, by size: "
    for kind in ATTENTIONS:
        paid = ", ".join(str(value[case, "first_token_other"]) for case in _cases(kind, sizes))
        said += f"{kind} {paid}; "
    left = max(value[f"{kind}, {n}x{n}", "unexplained"].value for kind in ("softmax", "relu") for n in sizes)
    said += f"uniform attention {value[f'softmax, {sizes[0]}x{sizes[0]}', 'first_token_other'].null:.3g}. "
    if found["softmax"] == {"a sink"} and found["relu"] == {"no sink"}:
        said += (
            f"So softmax has a sink at every size, and ReLU, which learns the same task (both leave at most {left:.2g} of it "
        )
        said += "unexplained), has none, as the theorem has it. "
    else:
        said += "That softmax has a sink at every size, and ReLU, on the same task, none, is not borne out. "
    free = [k for k in ATTENTIONS if k not in ("softmax", "output gate") and "a sink" in found[k]]
    if free:
        said += f"A sink that is not needed may grow all the same: rows of {', '.join(free)} need not go anywhere. "
    least = value[f"softmax, {sizes[-1]}x{sizes[-1]}", "first_token_least"]
    if sizes[-1] > 1 and least.high < SINK:
        said += f"Not every head sinks: with softmax, the least one at the largest size pays {least}. "
    return verdict[:1].upper() + verdict[
        1:
    ], said + "A toy: it shows what is enough for a sink, not why language models have one."


def _draw(value: Mapping[tuple[str, str], Estimate], sizes: Sequence[int], *, ax: Axes | None = None) -> Axes:
    """Draw weight on the first token by kind: filled where nothing is wanted, hollow at triggers, a colour per size."""
    import matplotlib.pyplot as plt

    ax = plt.figure(**WIDE).add_subplot() if ax is None else ax
    places = np.arange(len(ATTENTIONS), dtype=float)
    for i, (size, colour) in enumerate(zip(sizes, (LINE, SERIES[2], MARK, *SERIES), strict=False)):
        at = np.array([place for place, kind in enumerate(ATTENTIONS) if kind in _kinds(size)])
        for name, fill in (("first_token_other", colour), ("first_token_trigger", "none")):
            each = [value[f"{ATTENTIONS[place]}, {size}x{size}", name] for place in at]
            ends = np.array([[e.value - e.low, e.high - e.value] for e in each]).T
            label = f"{size}x{size}, nothing wanted" if fill != "none" else f"{size}x{size}, at the trigger"
            style: dict[str, Any] = {"fmt": "o", "color": colour, "markerfacecolor": fill, "markersize": 4, "capsize": 2}
            ax.errorbar(
                places[at] + 0.2 * (i - (len(sizes) - 1) / 2), [e.value for e in each], yerr=ends, label=label, **style
            )
    null = value[f"softmax, {sizes[0]}x{sizes[0]}", "first_token_other"].null
    ax.axhline(null, color=NULL, linestyle="--", linewidth=1, label="uniform attention")
    ax.set_xticks(places, labels=[kind.replace(" ", "\n") for kind in ATTENTIONS])
    return finish(ax, "", "", "weight on the first token", legend=True)
