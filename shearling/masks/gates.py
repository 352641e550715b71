"""The gates of one model, a location for every entry of every axis that is cut, and what is read from them."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from shearling.axes.axis import FOLLOWS, MASKABLE, mask_shape
from shearling.axes.index import Kept, best, places, select
from shearling.axes.shape import Shape
from shearling.masks.hard_concrete import KEPT_MIN


@dataclass(frozen=True)
class Miss:
    """A place where the gates left another number of entries open than the target asks."""

    axis: str
    within: tuple[int, ...]
    open: int
    target: int

    def __str__(self) -> str:
        place = f" in {list(self.within)}" if self.within else ""
        return f"{self.axis}{place}: {self.open} open, {self.target} asked"


class Gates(nn.Module, ABC):
    """`location` by axis, [*within, size], for the axes on which `target` is smaller than `source`.

    The higher the likelier to stay. Entries that `closed` marks, [*within, size], are shut and stay so. `axes` are all
    that masks lie on. Those in `settled` have nothing to learn: which entries of q and k stay is one of a few choices
    for all heads, and is made before the first step, by the highest start.
    """

    def __init__(self, source: Shape, target: Shape, *, start: Mapping[str, Tensor], closed: Mapping[str, Tensor]):
        super().__init__()
        self.source, self.target = source, target
        self.axes = cut_axes(source, target)
        self.learned = tuple(axis for axis in self.axes if axis not in FOLLOWS)
        self.location = nn.ParameterDict({a: nn.Parameter(start[a].detach().clone().float()) for a in self.learned})
        self.closed = nn.ParameterDict({a: nn.Parameter(closed[a], requires_grad=False) for a in self.learned})
        settled = {a: _support(start[a], a, source, target) for a in self.axes if a in FOLLOWS}
        self.settled = nn.ParameterDict({a: nn.Parameter(mask, requires_grad=False) for a, mask in settled.items()})

    @abstractmethod
    def draw(self, step: int) -> dict[str, Tensor]:
        """The masks of one training step, of all axes."""

    @abstractmethod
    def support(self, masks: Mapping[str, Tensor]) -> Mapping[str, Tensor] | None:
        """What stands for the supports of a step's masks, whose sums the norms count; None: what isn't exactly 0."""

    @abstractmethod
    def penalty(self, step: int) -> Tensor | None:
        """What the constraint adds to a step's loss; None where it holds by construction."""

    @abstractmethod
    def end(self, step: int) -> None:
        """After the optimizers have stepped."""

    @abstractmethod
    def optimizers(self) -> list[Optimizer]:
        """For the gates and whatever else is learned with them."""

    @abstractmethod
    def soft_values(self, axis: str) -> Tensor:
        """The values that kept entries would end with now, [*within, size], in (0, 1]."""

    @abstractmethod
    def expected(self, axis: str, step: int) -> Tensor:
        """The expected number of entries kept at a step, one for each place with a choice of its own: [*within]."""

    @abstractmethod
    def opened(self, axis: str) -> Tensor:
        """Which entries the gates themselves would keep, whatever the target: [*within, size]."""

    @torch.no_grad()
    def kept(self) -> Kept:
        """The highest entries, exactly as many as the target asks along each axis; closed ones last of all."""
        scores = {a: self.location[a].masked_fill(self.closed[a], -torch.inf).tolist() for a in self.learned}
        settled = {axis: mask.tolist() for axis, mask in self.settled.items()}
        return select({**scores, **settled}, source=self.source, target=self.target)

    @torch.no_grad()
    def masks(self, kept: Kept) -> dict[str, Tensor]:
        """Soft values of at least KEPT_MIN on the kept entries, exact zeros on all others."""
        masks = {axis: mask.detach().clone() for axis, mask in self.settled.items()}
        for axis in self.learned:
            soft = self.soft_values(axis).clamp(min=KEPT_MIN)
            mask = torch.zeros(mask_shape(axis, self.source.axes), device=soft.device)
            for place in places(axis, kept):
                chosen = torch.tensor(kept.along(axis, place), device=soft.device)
                mask[place][chosen] = soft[place][chosen]
            masks[axis] = mask
        return masks

    @torch.no_grad()
    def misses(self, kept: Kept) -> list[Miss]:
        """Where the gates' own choice isn't the target's number, in what is kept of the axes outside."""
        counts = {axis: self.opened(axis).sum(-1) for axis in self.learned}
        found = (
            Miss(axis, place, int(counts[axis][place]), self.target.axes[axis])
            for axis in self.learned
            for place in places(axis, kept)
        )
        return [miss for miss in found if miss.open != miss.target]


def _support(scores: Tensor, axis: str, source: Shape, target: Shape) -> Tensor:
    """1 on the entries of an axis that nothing encloses which these scores [size] keep, 0 elsewhere."""
    kept = best(axis, scores.tolist(), target.axes[axis], source)
    return torch.zeros(source.axes[axis]).index_fill(0, torch.tensor(kept), 1.0)


def cut_axes(source: Shape, target: Shape) -> tuple[str, ...]:
    """The axes on which the target is smaller."""
    of_source, of_target = source.axes, target.axes
    return tuple(axis for axis in MASKABLE if axis in of_source and of_target[axis] < of_source[axis])
