"""Where gates start: all open, as in the paper, or ranked by a one-shot score."""

from collections.abc import Mapping

import torch
from torch import Tensor

from shearling.axes.axis import mask_shape
from shearling.axes.shape import Shape
from shearling.masks import hard_concrete as gate
from shearling.masks.gates import cut_axes


def open_start(source: Shape, target: Shape, *, level: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Every gate near `level`, N(level, 0.01) (LLM-Shearing: 5, which the clamp brings to 4.605 at once)."""
    return {
        axis: level + 0.01 * torch.randn(mask_shape(axis, source.axes), generator=generator)
        for axis in cut_axes(source, target)
    }


def ranked_start(
    source: Shape, target: Shape, *, scores: Mapping[str, Tensor], level: float, spread: float
) -> dict[str, Tensor]:
    """Gates in the order of their scores: the last kept and the first cut on either side of `level`, `spread` apart
    at the ends. Scores are [*within, size]; of equals the first ranks higher.
    """
    start = {}
    for axis in cut_axes(source, target):
        order = torch.argsort(scores[axis], dim=-1, descending=True, stable=True)
        rank = order.argsort(-1).float()
        kept, size = target.axes[axis], source.axes[axis]
        start[axis] = level + spread * (kept - 0.5 - rank) / size
    return {axis: s.clamp(gate.LOG_ALPHA_MIN, gate.LOG_ALPHA_MAX) for axis, s in start.items()}


def dead(source: Shape, target: Shape, *, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Which entries to close for good: those with a score of exactly 0, at most as many as must go in each place.

    Nothing comes into such a unit or nothing goes out of it, so no gradient could tell whether it is worth keeping.
    """
    closed = {}
    for axis in cut_axes(source, target):
        zero = scores[axis] == 0
        excess = source.axes[axis] - target.axes[axis]
        last = zero.flip(-1).cumsum(-1).flip(-1)  # 1 for the last zero of a place, counting up towards its front
        closed[axis] = zero & (last <= excess)
    return closed


def none_closed(source: Shape, target: Shape) -> dict[str, Tensor]:
    """Every gate free."""
    return {axis: torch.zeros(mask_shape(axis, source.axes), dtype=torch.bool) for axis in cut_axes(source, target)}
