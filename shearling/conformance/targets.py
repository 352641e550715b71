"""What a small model is cut to: each axis alone, or with what its family couples it to, and all at once."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import product

import torch
from torch import Tensor

from shearling.axes.axis import MASKABLE, mask_shape
from shearling.axes.index import Kept, places, select
from shearling.axes.shape import Shape
from shearling.axes.target import resolve_target
from shearling.conformance.model import Small
from shearling.errors import UserError
from shearling.masks.gates import cut_axes

Unit = tuple[str, ...]  # axes that are cut together
LEAST = 0.01  # what soft values of kept entries are raised to


def alone(made: Small, *, axes: Iterable[str] = MASKABLE) -> dict[Unit, Shape]:
    """A smaller shape for each of the axes that the family can be cut along, with what its couplings take along.

    An axis that can't be cut alone comes with another, if that helps; one that can't be cut at all has no target.
    """
    found: dict[Unit, Shape] = {}
    wide = [axis for axis in axes if made.shape.axes.get(axis, 1) > 1]
    for axis in wide:
        single = ({axis: size} for size in _sizes(made.shape, axis))
        paired = (
            {axis: size, other: n}
            for other in wide
            if other != axis
            for size in _sizes(made.shape, axis)
            for n in _sizes(made.shape, other)
        )
        target = _first(made, single) or _first(made, paired)
        if target is not None:
            found.setdefault(cut_axes(made.shape, target), target)
    return found


def together(made: Small, *, axes: Iterable[str]) -> dict[Unit, Shape]:
    """One shape that is smaller along all of these axes at once; empty if the family allows none."""
    # Rules are about hidden, so it goes through all of its sizes, and fastest.
    chosen = sorted(axes, key=lambda axis: axis == "hidden")
    choices = product(*([*_sizes(made.shape, axis)][: None if axis == "hidden" else 3] for axis in chosen))
    target = _first(made, (dict(zip(chosen, sizes, strict=True)) for sizes in choices))
    return {cut_axes(made.shape, target): target} if target and chosen else {}


def _sizes(shape: Shape, axis: str) -> Iterator[int]:
    """Smaller sizes of an axis, the most telling first: two thirds rounded up, then down, then up."""
    size = shape.axes[axis]
    start = min(size - 1, -(-size * 2 // 3))
    yield from range(start, 0, -1)
    yield from range(start + 1, size)


def _first(made: Small, tried: Iterable[Mapping[str, int]]) -> Shape | None:
    return next(filter(None, (_accepted(made, smaller) for smaller in tried)), None)


def _accepted(made: Small, smaller: Mapping[str, int]) -> Shape | None:
    """The shape with these axes smaller, if the family allows it; what is coupled to them moves too."""
    shape, sizes = made.shape, {**made.shape.axes, **smaller}
    wanted = {key: dim.size(sizes) for key, dim in shape.dims.items() if dim.size(sizes) != shape[key]}
    try:
        target, _ = resolve_target(made.family, shape, wanted, made.config)
    except UserError:
        return None
    return target if set(smaller) <= set(cut_axes(shape, target)) else None


def random_cut(shape: Shape, target: Shape, *, seed: int = 3) -> tuple[Kept, dict[str, Tensor]]:
    """Random entries kept, with random soft values in [LEAST, 1]: masks of shape [*within, size]."""
    generator = torch.Generator().manual_seed(seed)
    axes = cut_axes(shape, target)
    scores = {axis: torch.rand(mask_shape(axis, shape.axes), generator=generator) for axis in axes}
    kept = select({axis: score.tolist() for axis, score in scores.items()}, source=shape, target=target)
    masks = {}
    for axis in axes:
        soft = LEAST + (1 - LEAST) * torch.rand(mask_shape(axis, shape.axes), generator=generator)
        masks[axis] = torch.zeros_like(soft)
        for place in places(axis, kept):
            chosen = list(kept.along(axis, place))
            masks[axis][place][chosen] = soft[place][chosen]
    return kept, masks
