"""When does a sink appear? A task that a tiny transformer learns in a minute, and kinds of attention to learn it with.

The task is Bigram-Backcopy (Guo et al. 2024, arXiv 2410.13835): a Markov chain in which the token after a *trigger* is a
copy of the token before it. A head that copies is wanted at triggers only; what does it do elsewhere? Weights that must sum
to one have to go somewhere. The paper finds that they go to <s>, that its value shrinks (value drain), and that it stands
out of the residual stream (residual peak). The other kinds lift the constraint: see `kinds.py`.

As in the paper: AdamW with betas 0.9 and 0.99 and weight decay 1e-4, torch's initialisation, learned positions, pre-norm
LayerNorm, a ReLU MLP, one head, three triggers. Smaller, so that it trains on a CPU: width, length, batch; hence the rate.

Losses are in nats. Sinks are measured over the queries from 1 on, for query 0 has no choice: uniform attention gives `null`
= (H_T - 1) / (T - 1), and for softmax `sink_mass - null` is the metric `sink_mass_excess`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Lock
from typing import NamedTuple, TypeVar

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from sinkscope.errors import SinkscopeError, unknown
from sinkscope.metrics.across import SHARE, t_interval
from sinkscope.runs.progress import bar
from sinkscope.studies.bigrams import BigramBackcopy
from sinkscope.studies.kinds import ATTENTIONS, Attention

Given = TypeVar("Given")
Made = TypeVar("Made")
#: Held by whoever draws from torch's default generator, of which there is one for all threads.
DRAWING = Lock()


class Run(NamedTuple):
    """One forward pass: the logits, and per layer the weights, the values and the residual stream after the layer."""

    logits: Tensor
    weights: list[Tensor]
    values: list[Tensor]
    residuals: list[Tensor]


class Layer(nn.Module):
    """A pre-norm block: attention, then an MLP."""

    def __init__(self, attention: str, width: int, heads: int, logit: float) -> None:
        super().__init__()
        self.norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend = Attention(attention, width, heads, logit=logit)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Float[Tensor, "n length width"]) -> tuple[Tensor, Tensor, Tensor]:
        """Give the residual stream after the layer, the weights and the values."""
        added, weights, values = self.attend(self.norm(x))
        x = x + added
        return x + self.down(self.up(self.mlp_norm(x)).relu()), weights, values


class Toy(nn.Module):
    """A GPT-2 in miniature: learned positions, pre-norm blocks, untied output."""

    def __init__(self, task: BigramBackcopy, attention: str, *, layers: int, width: int, heads: int, logit: float) -> None:
        super().__init__()
        self.attention = attention
        self.tokens = nn.Embedding(task.vocabulary + 1, width)
        self.positions = nn.Embedding(task.length, width)
        self.layers = nn.ModuleList(Layer(attention, width, heads, logit) for _ in range(layers))
        self.norm, self.unembed = nn.LayerNorm(width), nn.Linear(width, task.vocabulary + 1, bias=False)

    def forward(self, ids: Int[Tensor, "n length"]) -> Run:
        """Predict, and keep what is looked at."""
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        run = Run(x, [], [], [])
        for layer in self.layers:
            x, weights, values = layer(x)
            run.weights.append(weights)
            run.values.append(values)
            run.residuals.append(x)
        return run._replace(logits=self.unembed(self.norm(x)))


def train(
    task: BigramBackcopy,
    attention: str = "softmax",
    *,
    steps: int = 1000,
    seed: int = 0,
    every: int = 100,
    layers: int = 3,
    width: int = 64,
    heads: int = 1,
    rate: float = 3e-3,
    warmup: int = 50,
    batch: int = 32,
    held_out: int = 128,
    logit: float = 0.0,
    progress: bool = False,
) -> pd.DataFrame:
    """Train from scratch on the CPU, and measure at checkpoints.

    One seed means the same initial weights and the same sequences for every attention. Held-out sequences depend on the
    task alone. On one machine the result depends on nothing else: it runs on one thread, and puts torch's number of threads
    back. torch's own random numbers are left alone.

    Args:
        task: what to learn.
        attention: one of `ATTENTIONS`.
        steps: updates, each on a new batch.
        seed: of the initial weights and of the training sequences.
        every: steps between checkpoints; a quarter of that in the first fifth of the run.
        layers: blocks.
        width: of the residual stream.
        heads: per block.
        rate: of learning, constant after the warm-up.
        warmup: steps over which the rate grows, linearly.
        batch: sequences per step.
        held_out: sequences to measure on.
        logit: where the learned sink starts. It competes with <s> from there, and may lose.
        progress: show a progress bar on stderr.

    Returns:
        One row per checkpoint, with `attention`, `seed`, `step` and the columns of :func:`look`.

    Raises:
        SinkscopeError: no such attention; a width that heads don't divide.
    """
    if attention not in ATTENTIONS:
        raise unknown("attention", attention, ATTENTIONS)
    if width % heads:
        raise SinkscopeError(f"width={width} is no multiple of heads={heads}")
    marks, rows = {*range(0, steps // 5, max(1, every // 4)), *range(0, steps, every), steps}, []
    with one_thread(), torch.device("cpu"), torch.inference_mode(False), torch.enable_grad():
        with DRAWING, torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            model = Toy(task, attention, layers=layers, width=width, heads=heads, logit=logit)
            generator = torch.default_generator.clone_state()
        test = task.batch(Generator().manual_seed(2**31 + task.seed), held_out)
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup))
        with bar(progress, steps, f"training with {attention}", "step") as done:
            for step in range(steps + 1):
                if step in marks:
                    rows.append({"attention": attention, "seed": seed, "step": step, **look(model, task, test)})
                if step < steps:
                    ids = task.batch(generator, batch)
                    optimizer.zero_grad()
                    torch.autograd.backward(losses(model(ids).logits, ids).mean())
                    optimizer.step()
                    schedule.step()
                    done(1)
    return pd.DataFrame(rows)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: such small tensors gain nothing from more, which on a busy machine wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def side_by_side(train: Callable[[Given], Made], cases: Iterable[Given]) -> Iterator[Made]:
    """Train several models at once, as many as torch may use threads; give what comes of them in the order of the cases.

    Each runs on one thread, and none bears on another. An interrupt waits for those that are being trained.
    """
    pool = ThreadPoolExecutor(torch.get_num_threads())
    with one_thread():
        try:
            yield from pool.map(train, cases)
        finally:
            pool.shutdown(cancel_futures=True)


def losses(logits: Float[Tensor, "n length token"], ids: Int[Tensor, "n length"]) -> Float[Tensor, "n length-1"]:
    """Give the loss of each next token, in nats."""
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")


@torch.no_grad()
def look(model: Toy, task: BigramBackcopy, ids: Int[Tensor, "n length"]) -> dict[str, float]:
    """Measure a model on sequences: each number is a sequence's first, then the mean over sequences.

    Attention is that of the *most sinking head*: the largest `sink_mass` of all, at this checkpoint.

    - loss: nats per token. best_loss: of whoever knows the chain, on the same tokens. excess_loss: the difference.
      loss_trigger: after triggers alone, where 0 can be reached.
    - null: the `sink_mass` of uniform attention. layer, head: the most sinking head.
    - sink_mass: mean attention to <s> over the queries from 1 on, 0 to 1; sink_mass_low and sink_mass_high bound 95%. Rows of
      sigmoid and relu are divided by their sum first, and empty ones count 0: the proxy of Gu et al. 2024, arXiv 2410.10781.
      It says where a row goes, however faint; sink_weight says with how much.
    - sink_mass_trigger, sink_mass_other: over the queries that are triggers, and the others. sink_mass_mean: of all heads.
    - sink_weight: mean weight on <s>; row_sum: mean sum of a row's weights; neither divided by anything.
    - value_drain: norm of <s>'s value over the median norm of all values, as the metric. value_drain_min: the least of all.
    - residual_peak: largest |activation| of <s> over the median of all tokens' (Sun et al. 2024, arXiv 2402.17762), near 4
      where all are normal; residual_norm: norm of <s> over the median norm of all tokens (Guo et al.). Both after the layer
      where they are largest.
    - loss_se, excess_loss_se, sink_mass_se: standard errors across sequences. They don't say how much seeds differ.
    """
    run, trigger = model(ids), task.is_trigger(ids)
    loss, best = losses(run.logits, ids).double(), task.surprise(ids).double()
    weights, values = (torch.cat(per_layer, dim=1).double() for per_layer in (run.weights, run.values))  # every head, dim 1
    total = weights.sum(-1)
    share = weights[..., 0] / total.where(total > 0, 1.0) if model.attention in ("sigmoid", "relu") else weights[..., 0]
    mass = share[..., 1:].mean(-1)
    top = int(mass.mean(0).argmax())
    layer, head = divmod(top, weights.shape[1] // len(run.weights))
    drain = _first_to_median(values.norm(dim=-1)).mean(0)
    streams = torch.stack(run.residuals, dim=1).double()  # [sequence, layer, token, width]
    peak = streams[:, :, 0].abs().amax(-1) / streams.abs().flatten(2).median(-1).values
    sink = _across("sink_mass", mass[:, top])
    low, high = t_interval(sink["sink_mass"], sink["sink_mass_se"], len(ids), SHARE)
    return {
        **_across("loss", loss.mean(-1)),
        "best_loss": float(best.mean()),
        **_across("excess_loss", (loss - best).mean(-1)),
        "loss_trigger": _over(loss, trigger[:, :-1]),
        "null": float((1.0 / torch.arange(2, ids.shape[1] + 1).double()).mean()),
        "layer": layer,
        "head": head,
        **sink,
        "sink_mass_low": low,
        "sink_mass_high": high,
        "sink_mass_trigger": _over(share[:, top, 1:], trigger[:, 1:]),
        "sink_mass_other": _over(share[:, top, 1:], ~trigger[:, 1:]),
        "sink_mass_mean": float(mass.mean()),
        "sink_weight": float(weights[:, top, 1:, 0].mean()),
        "row_sum": float(total[:, top, 1:].mean()),
        "value_drain": float(drain[top]),
        "value_drain_min": float(drain.min()),
        "residual_peak": float(peak.mean(0).max()),
        "residual_norm": float(_first_to_median(streams.norm(dim=-1)).mean(0).max()),
    }


def _first_to_median(norms: Float[Tensor, "*any token"]) -> Float[Tensor, "*any"]:
    """Divide the norm at <s> by the median norm of all tokens."""
    return norms[..., 0] / norms.median(-1).values


def _across(name: str, values: Float[Tensor, " sequence"]) -> dict[str, float]:
    """Give the mean over sequences and its standard error."""
    return {name: float(values.mean()), f"{name}_se": float(values.std()) / len(values) ** 0.5}


def _over(values: Float[Tensor, "sequence token"], where: Bool[Tensor, "sequence token"]) -> float:
    """Average over some tokens of each sequence, then over the sequences that have any."""
    return float((values.where(where, 0.0).sum(-1) / where.sum(-1)).nanmean())
