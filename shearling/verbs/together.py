"""What a verb does with several processes: one of them owns the stage, all of them share the models."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from shearling.loss.cross_entropy import token_losses
from shearling.loss.held_out import Sums, Windows
from shearling.masks.attach import Attached
from shearling.ranks.ranks import Ranks
from shearling.ranks.sharded import device_of, inside, shard
from shearling.stage import Stage
from shearling.verbs.source import Source
from shearling.weights.adapters import Adapters
from shearling.weights.experts import autocast_experts
from shearling.weights.model import empty_model, load_model

T = TypeVar("T", bound=Windows)


@contextmanager
def entered(stage: Stage, ranks: Ranks) -> Iterator[Path]:
    """The stage's folder, which the first rank holds and which becomes its output when all are done with it."""
    with ExitStack() as held:
        ranks.by_the_first(lambda: held.enter_context(stage))
        yield stage.partial
        ranks.meet()  # nobody reads in it any more
    ranks.meet()  # it has its name


def is_done(stage: Stage, ranks: Ranks) -> bool:
    """Whether a stage is finished, as the first rank sees it."""
    (done,) = ranks.any(ranks.first and stage.done)
    return done


def load(
    source: Source,
    *,
    device: str,
    ranks: Ranks,
    dtype: torch.dtype = torch.float32,
    compute: torch.dtype | None = None,
    adapters: Adapters | None = None,
) -> Any:
    """A source's model, frozen under `adapters` if there are any; shared out if there are several ranks, which then
    compute in `compute`.
    """
    model, _ = _plain(source, device, ranks, dtype, adapters)
    if ranks.mesh is not None:
        _share(model, source, device, ranks, compute, adapters)
    return model


def load_under_masks(
    source: Source,
    axes: tuple[str, ...],
    *,
    device: str,
    ranks: Ranks,
    dtype: torch.dtype = torch.float32,
    compute: torch.dtype | None = None,
    adapters: Adapters | None = None,
) -> Attached:
    """The same with masks on it along `axes`."""
    model, adapted = _plain(source, device, ranks, dtype, adapters)
    where = torch.device(device) if ranks.mesh is not None else None
    attached = Attached(model, source.family, config=source.config, axes=axes, device=where, adapted=adapted)
    if ranks.mesh is not None:
        _share(model, source, device, ranks, compute, adapters)
    return attached


def _plain(
    source: Source, device: str, ranks: Ranks, dtype: torch.dtype, adapters: Adapters | None
) -> tuple[Any, Collection[str]]:
    """A source's model, still to be filled if there are several ranks, and the paths of its linears with adapters."""
    if ranks.mesh is None:
        model = load_model(source.folder, dtype=dtype, device=device)
    else:
        model = empty_model(source.folder, dtype=dtype)
    autocast_experts(model, source.family, source.config)
    return model, adapters.add(model, source.family, source.config) if adapters else ()


def _share(
    model: Any, source: Source, device: str, ranks: Ranks, compute: torch.dtype | None, adapters: Adapters | None
) -> None:
    rows = {row.at(layer): (row, layer) for row, layer in source.family.named(source.config)}
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

    def plain(name: str) -> Tensor:
        return source.read(*rows[name])

    def read(name: str) -> Tensor:
        return adapters.read(name, shapes[name], plain) if adapters else plain(name)

    shard(model, source.blocks(), read=read, ranks=ranks, device=device, compute=compute)


@dataclass(frozen=True)
class Evenly:
    """Held-out windows dealt to ranks whose model is shared out: each has to go through it as often as the others."""

    model: Any
    ranks: Ranks
    length: int

    def taken(self, batches: Iterable[T]) -> Iterator[T]:
        """One rank's share of a domain's windows; then what the others have more of is gone through with nothing."""
        if self.ranks.count == 1:
            yield from batches
            return
        mine = list(batches)
        device = device_of(self.model)
        nothing = torch.zeros(1, self.length, dtype=torch.int64, device=device)
        most = self._largest(len(mine))
        yield from mine
        for _ in range(most - len(mine)):
            inside(self.model, token_losses, nothing)

    def together(self, sums: Sums) -> Sums:
        """The sum over ranks of one domain's sums."""
        if self.ranks.count == 1:
            return sums
        sums = sums.over(self._largest(len(sums.nats)))
        counts = torch.cat([sums.tokens, torch.tensor([sums.windows])])
        dist.all_reduce(sums.nats, group=self.ranks.group)
        dist.all_reduce(counts, group=self.ranks.group)
        return Sums(sums.nats, counts[:-1], int(counts[-1]))

    def _largest(self, number: int) -> int:
        found = torch.tensor(number)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.ranks.group)
        return int(found)


def dealt(ranks: Ranks) -> Mapping[str, int]:
    """A rank's place among those that windows are dealt to."""
    return {"rank": ranks.rank, "ranks": ranks.count}
