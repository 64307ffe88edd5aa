"""Work shared among the processes that `torchrun` starts: each takes every n-th batch, all of them get the whole.

The batches are the same however many processes there are, and what is merged is merged in float64: so are the results.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from sinkscope.errors import SinkscopeError

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """One process's part.

    Attributes:
        rank: which process this is.
        world: how many there are.
    """

    rank: int = 0
    world: int = 1

    @classmethod
    def of(cls, distributed: bool) -> Share:
        """Look which process of torch.distributed this is, or be the only one.

        Raises:
            SinkscopeError: `distributed`, and no process group was made.
        """
        if not distributed:
            return cls()
        from torch import distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            raise SinkscopeError(
                "distributed=True, but there is no process group: call torch.distributed.init_process_group(), in a script "
                "started by torchrun; or run torchrun --nproc-per-node N -m sinkscope measure ..."
            )
        return cls(dist.get_rank(), dist.get_world_size())

    def mine(self, number: int) -> bool:
        """Tell whether this process does the batch of this number."""
        return number % self.world == self.rank

    def gather(self, part: T) -> list[T]:
        """Give every process's part, in the order of ranks, to all of them."""
        if self.world == 1:
            return [part]
        from torch import distributed as dist

        parts: list[Any] = [None] * self.world
        dist.all_gather_object(parts, part)
        return parts


@contextmanager
def joined() -> Iterator[Share]:
    """Join the process group that `torchrun` describes in the environment, if it started this process."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield Share()
        return
    import torch
    from torch import distributed as dist

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    yield Share(dist.get_rank(), dist.get_world_size())
    dist.destroy_process_group()  # after an error torchrun ends the others: there is nobody left to agree with
