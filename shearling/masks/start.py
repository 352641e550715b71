"""Where gates start: all open, as in the paper, or ranked by a one-shot score. Scores are [*within, size]."""

from collections.abc import Mapping

import torch
from torch import Tensor

from shearling.axes.axis import mask_shape
from shearling.axes.shape import Shape
from shearling.masks import hard_concrete as gate
from shearling.masks.gates import cut_axes


def open_start(source: Shape, target: Shape, level: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Every gate near `level`, N(level, 0.01) (LLM-Shearing: 5, which the clamp brings to 4.605 at once)."""
    return {
        axis: level + 0.01 * torch.randn(mask_shape(axis, source.axes), generator=generator)
        for axis in cut_axes(source, target)
    }


def ranked_start(
    source: Shape, target: Shape, *, scores: Mapping[str, Tensor], level: float, spread: float
) -> dict[str, Tensor]:
    """log alphas in the scores' order, evenly over `spread`; `level` lies between the last kept and the first cut."""
    start = {}
    for axis in cut_axes(source, target):
        kept, size = target.axes[axis], source.axes[axis]
        located = level + spread * (kept - 0.5 - _rank(scores[axis])) / size
        start[axis] = located.clamp(gate.LOG_ALPHA_MIN, gate.LOG_ALPHA_MAX)
    return start


def unit_start(source: Shape, target: Shape, *, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Locations in the order of the scores, evenly over (0, 1)."""
    return {axis: 1 - (_rank(scores[axis]) + 0.5) / source.axes[axis] for axis in cut_axes(source, target)}


def dead(source: Shape, target: Shape, *, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Which entries to close for good: those with a score of exactly 0, at most as many as must go in each place.

    Nothing comes into such a unit or nothing goes out of it, so no gradient could tell whether it is worth keeping.
    """
    closed = {}
    for axis in cut_axes(source, target):
        zero = scores[axis] == 0
        from_the_last = zero.flip(-1).cumsum(-1).flip(-1)
        closed[axis] = zero & (from_the_last <= source.axes[axis] - target.axes[axis])
    return closed


def none_closed(source: Shape, target: Shape) -> dict[str, Tensor]:
    """Every gate free."""
    return {axis: torch.zeros(mask_shape(axis, source.axes), dtype=torch.bool) for axis in cut_axes(source, target)}


def _rank(scores: Tensor) -> Tensor:
    """0 for the highest along the last dimension; of equals the first is higher."""
    order = torch.argsort(scores, dim=-1, descending=True, stable=True)
    return order.argsort(-1).float()
