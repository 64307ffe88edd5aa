"""How much attention stays near."""

from torch import Tensor

import sinkscope as ss

#: Tokens that count as near, the query itself included.
NEAR = 8


@ss.metric(needs="pattern", unit="share of attention")
def locality(block: ss.Block) -> Tensor:
    """Share of a query's attention that goes to the last 8 tokens: sum over i - k < 8 of A[i, k]; 0 to 1."""
    return (block.pattern * (block.distance < NEAR)).sum(-1)
