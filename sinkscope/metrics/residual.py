"""Every token in the residual stream: how large it is, and how much like the sink; one number per token and layer.

In the place of head 0; measured when asked for by name.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sinkscope.block import Block
from sinkscope.metrics.base import metric


@metric(needs="residual", unit="norm", per_query=True)
def residual_norm(block: Block) -> Tensor:
    """Norm of every token's residual stream after a layer; 0 and up.

    |h_i|. Tokens far above the median are what dictionary_learning leaves out of an autoencoder's data. Source: its filter by
    a multiple of the median norm.
    """
    norms: Tensor = block.residual.float().norm(dim=-1)
    return norms[:, None]


@metric(needs="residual", unit="magnitude", per_query=True)
def residual_peak(block: Block) -> Tensor:
    """Largest magnitude in every token's residual stream after a layer; 0 and up. Source: Sun et al. 2024, 2402.17762."""
    return block.residual.float().abs().amax(-1)[:, None]


@metric(needs="residual", at_key=True, unit="cosine", per_query=True)
def sink_cosine(block: Block) -> Tensor:
    """Cosine of every token's residual stream with the sink key's, after a layer; -1 to 1.

    cos(h_i, h_k). With key 0, the sign of a secondary sink. Source: Wong et al. 2025, arXiv 2512.22213.
    """
    h = block.residual.float()
    at = h[torch.arange(len(h), device=h.device), block.keys.to(h.device)]
    return torch.nn.functional.cosine_similarity(h, at[:, None], dim=-1)[:, None]
