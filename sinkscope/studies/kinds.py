"""Kinds of attention for toys: what turns scores into weights, and what a head may do with a row that it does not want."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sinkscope.errors import unknown

#: Ways to turn scores into weights, and outputs into what is written: `weigh` and `Attention` say what each does.
ATTENTIONS = ("softmax", "learned sink", "key bias", "off by one", "output gate", "sigmoid", "relu")


def weigh(
    scores: Float[Tensor, "*any query key"], attention: str, logit: Tensor | None = None, over: Tensor | None = None
) -> Float[Tensor, "*any query key"]:
    """Turn scores into causal weights.

    - softmax, output gate: a row sums to one.
    - learned sink: softmax over the row and one more logit, whose column is dropped: a row sums to less than one (gpt-oss).
    - key bias: the same, and the logit is the query's score with one more, learned, key (Gu et al. 2024, arXiv 2410.10781).
    - off by one: the same, and the logit is 0 (Miller 2023; "Zero Sink" of Xiao et al. 2023, arXiv 2309.17453).
    - sigmoid: each weight by itself, from 0 to 1 (Gu et al. 2024).
    - relu: each weight by itself, divided by the number of keys, T (Wortsman et al. 2023, arXiv 2309.08586). Guo et al.'s
      code divides row i by i + 1 instead, so that <s> attends to itself T times as strongly for the same score: tried on
      Bigram-Backcopy, it then peaks in the residual stream without being a sink.

    Args:
        scores: scaled products of queries and keys.
        attention: one of `ATTENTIONS`.
        logit: of the learned sink or the key bias, as anything that broadcasts to a column of the scores; 0 without one.
        over: what weights of sigmoid and ReLU are divided by, as a column of rows; None: nothing, and T.

    Raises:
        SinkscopeError: no such attention; lists them.

    >>> weigh(torch.zeros(2, 2), "off by one")
    tensor([[0.5000, 0.0000],
            [0.3333, 0.3333]])
    """
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    if attention in ("softmax", "output gate"):
        return scores.masked_fill(future, -torch.inf).softmax(-1)
    if attention in ("learned sink", "key bias", "off by one"):
        extra = torch.zeros(1) if logit is None else logit
        row = torch.cat([scores.masked_fill(future, -torch.inf), extra.expand_as(scores[..., :1])], dim=-1)
        return row.softmax(-1)[..., :-1]
    if attention == "sigmoid":
        return scores.sigmoid().masked_fill(future, 0.0) / (1.0 if over is None else over)
    if attention == "relu":
        return scores.relu().masked_fill(future, 0.0) / (scores.shape[-1] if over is None else over)
    raise unknown("attention", attention, ATTENTIONS)


class Attention(nn.Module):
    """Causal self-attention of one kind, without biases.

    What a kind adds to softmax's parameters starts at a constant, so that one seed gives all kinds the same weights: a
    logit per head at `logit`, a bias of the keys at 0, a gate at one half. The output gate multiplies what each head gives,
    number by number, by a sigmoid of the token (Qiu et al. 2025, arXiv 2505.06708).

    Args:
        attention: one of `ATTENTIONS`.
        width: of what comes in and goes out.
        heads: how many.
        d_head: of a head; None: they share the width.
        logit: where the learned sink starts.
    """

    def __init__(self, attention: str, width: int, heads: int, *, d_head: int | None = None, logit: float = 0.0) -> None:
        super().__init__()
        self.attention, self.heads = attention, heads
        inner = heads * d_head if d_head else width
        self.qkv, self.out = nn.Linear(width, 3 * inner, bias=False), nn.Linear(inner, width, bias=False)
        self.logit = nn.Parameter(torch.full((heads, 1, 1), logit)) if attention == "learned sink" else None
        self.key = nn.Parameter(torch.zeros(heads, inner // heads, 1)) if attention == "key bias" else None
        self.gate = nn.Parameter(torch.zeros(width, inner)) if attention == "output gate" else None

    def forward(self, x: Float[Tensor, "n length width"], over: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Give what is to be added to the residual stream, the weights and the values."""
        n, length, _ = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scale = q.shape[-1] ** -0.5
        logit = self.logit if self.key is None else q @ self.key * scale
        weights = weigh(q @ k.transpose(-1, -2) * scale, self.attention, logit, over)
        z = (weights @ v).transpose(1, 2).reshape(n, length, -1)
        return self.out(z if self.gate is None else z * (x @ self.gate).sigmoid()), weights, v
