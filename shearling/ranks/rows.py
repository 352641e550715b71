"""The rows of a tensor that a rank holds, and all of them."""

from dataclasses import dataclass

from torch import Tensor
from torch.distributed.tensor import DTensor

from shearling.ranks.ranks import Ranks


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


def gathered(tensor: Tensor) -> Tensor:
    """All of a tensor, if its rows are shared out: every rank comes here for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
