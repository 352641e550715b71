"""The processes of one run, and the rows of a tensor that each of them holds."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Ranks:
    """This process, and how many there are. `group` carries what they have to agree on, by the CPU.

    One process is not a special case: it agrees with itself.
    """

    rank: int = 0
    count: int = 1
    group: Any = None

    @property
    def first(self) -> bool:
        """Whether this is the one that speaks for all."""
        return self.rank == 0

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Of each flag, whether it is up on some rank. Every rank comes here, and waits for the others."""
        if self.count == 1:
            return flags
        found = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.group)
        return tuple(bool(flag) for flag in found.tolist())


ALONE = Ranks()


@dataclass(frozen=True)
class Rows:
    """What one rank holds of a tensor of `shape`: the rows `local` from `start` on. `mine`: it is the one to save them.

    Of a plain tensor every rank holds all.
    """

    local: Tensor
    start: int
    shape: tuple[int, ...]
    mine: bool

    @classmethod
    def of(cls, tensor: Tensor, ranks: Ranks) -> "Rows":
        if not isinstance(tensor, DTensor):
            return cls(tensor, 0, tuple(tensor.shape), ranks.first)
        local, mesh, start, mine = tensor.to_local(), tensor.device_mesh, 0, True
        where = mesh.get_coordinate()
        assert where is not None
        for dim, placement in enumerate(tensor.placements):
            if placement.is_shard():
                assert placement.is_shard(0), "rows are what is shared out"
                # As torch.chunk divides: the first ranks have one of the larger parts each, the last perhaps none.
                each = -(-tensor.shape[0] // mesh.size(dim))
                start = min(where[dim] * each, tensor.shape[0])
            else:
                mine = mine and where[dim] == 0
        return cls(local, start, tuple(tensor.shape), mine)
