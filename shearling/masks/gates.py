"""The gates of one model: a location for every entry of every axis that is cut, and what they come to."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shearling.axes.axis import MASKABLE, mask_shape
from shearling.axes.index import Kept, places, select
from shearling.axes.shape import Shape
from shearling.masks import hard_concrete as gate
from shearling.masks.constraint import expected_sparsity


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


class Gates(nn.Module):
    """log_alpha by axis, [*within, size], for the axes on which `target` is smaller than `source`.

    Entries that `closed` marks are shut and stay so.
    """

    def __init__(self, source: Shape, target: Shape, *, start: Mapping[str, Tensor], closed: Mapping[str, Tensor]):
        super().__init__()
        self.source, self.target = source, target
        self.axes = cut_axes(source, target)
        self.log_alpha = nn.ParameterDict(
            {axis: nn.Parameter(start[axis].detach().clone().float()) for axis in self.axes}
        )
        self.closed = {axis: closed[axis] for axis in self.axes}

    def location(self, axis: str) -> Tensor:
        """log_alpha, at the bottom where closed: no gradient gets there."""
        return self.log_alpha[axis].masked_fill(self.closed[axis].to(self.log_alpha[axis].device), gate.LOG_ALPHA_MIN)

    def sample(self, generator: torch.Generator) -> dict[str, Tensor]:
        """One draw of every mask, by noise from a CPU generator, so that it is the same on any device."""
        masks = {}
        for axis in self.axes:
            location = self.location(axis)
            uniform = torch.rand(location.shape, generator=generator)
            masks[axis] = gate.sample(location, uniform=uniform.to(location.device))
        return masks

    def sparsity(self) -> dict[str, Tensor]:
        """Expected sparsity by axis, one number for each place with a choice of its own: [*within]."""
        return {axis: expected_sparsity(gate.keep_probability(self.location(axis))) for axis in self.axes}

    def wanted_sparsity(self, axis: str) -> float:
        """Where an axis must end: 1 - target / source."""
        return 1 - self.target.axes[axis] / self.source.axes[axis]

    def clamp_(self) -> None:
        """Keeps every gate where its gradient can still move it (LLM-Shearing: after every step)."""
        with torch.no_grad():
            for log_alpha in self.log_alpha.values():
                log_alpha.clamp_(gate.LOG_ALPHA_MIN, gate.LOG_ALPHA_MAX)

    @torch.no_grad()
    def kept(self) -> Kept:
        """The most open entries, exactly as many as the target asks along each axis; closed ones last of all."""
        scores = {
            axis: self.log_alpha[axis]
            .masked_fill(self.closed[axis].to(self.log_alpha[axis].device), -torch.inf)
            .tolist()
            for axis in self.axes
        }
        return select(scores, source=self.source, target=self.target)

    @torch.no_grad()
    def masks(self, kept: Kept) -> dict[str, Tensor]:
        """Soft values on the kept entries, exact zeros elsewhere; what lies within a removed entry is zero too."""
        masks = {}
        for axis in self.axes:
            soft = gate.soft_value(self.location(axis))
            mask = torch.zeros(mask_shape(axis, self.source.axes), device=soft.device)
            for place in places(axis, kept):
                chosen = torch.tensor(kept.along(axis, place), device=soft.device)
                mask[place][chosen] = soft[place][chosen]
            masks[axis] = mask
        return masks

    @torch.no_grad()
    def misses(self, kept: Kept) -> list[Miss]:
        """Where the gates' own choice, open at a keep probability above 1/2, isn't the target's number."""
        found = []
        for axis in self.axes:
            opened = (gate.keep_probability(self.location(axis)) > 0.5).sum(-1)
            for place in places(axis, kept):
                count, wanted = int(opened[place]), self.target.axes[axis]
                if count != wanted:
                    found.append(Miss(axis, place, count, wanted))
        return found


def cut_axes(source: Shape, target: Shape) -> tuple[str, ...]:
    """The axes on which the target is smaller."""
    return tuple(axis for axis in MASKABLE if target.axes[axis] < source.axes[axis])
