"""Which layout in memory a fused weight has: entries of an axis are moved about, and the model must not notice.

Only where all entries of an axis are alike, and every tensor has them where the table says, are the logits the same.
"""

import random
from collections.abc import Iterator, Mapping
from itertools import islice, product
from typing import Any

import torch
from torch import Tensor

from shearling.axes.axis import AXES
from shearling.axes.index import Kept
from shearling.axes.spec import Family
from shearling.draft.propose import Proposal
from shearling.draft.rows import Line

TOLERANCE = 1e-5  # relative: norms compute in float32
MOST_TRIED = 60
TOGETHER = (("kv_head", "group"), ("intermediate",), ("expert", "moe_intermediate"), ("hidden",))


def choose(proposal: Proposal) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """For each row which of its layouts, and the axes whose entries aren't alike under any of them, with the reason."""
    choice: dict[str, tuple[int, ...]] = {}
    uncut: dict[str, str] = {}
    lines = [line for line in proposal.lines if isinstance(line, Line)]
    for axes in TOGETHER:
        mine = [line for line in lines if any(axis in way for axis in axes for ways in line.dims for way in ways)]
        open_lines = [line for line in mine if any(len(ways) > 1 for ways in line.dims) and line.name not in choice]
        present = [axis for axis in axes if axis in proposal.family(choice).axes]
        found = None
        for tried in islice(_choices(open_lines), MOST_TRIED):
            family = proposal.family({**choice, **tried})
            if all(is_alike(proposal, family, axis) for axis in present):
                found = tried
                break
        if found is None:
            reason = "its entries aren't alike: moving them about changes what the model gives"
            uncut |= {axis: reason for axis in present if not is_alike(proposal, proposal.family(choice), axis)}
        choice |= found or {}
    return choice, uncut


def _choices(lines: list[Line]) -> Iterator[dict[str, tuple[int, ...]]]:
    each = [list(product(*(range(len(ways)) for ways in line.dims))) for line in lines]
    for chosen in product(*each):
        yield {line.name: one for line, one in zip(lines, chosen, strict=True)}


@torch.no_grad()
def is_alike(proposal: Proposal, family: Family, axis: str) -> bool:
    """Whether the logits stay when the entries along an axis are moved about in all tensors that have it."""
    probe = proposal.probe
    sizes = _sizes(proposal)
    if sizes.get(axis, 1) < 2:
        return True
    state = dict(probe.model.named_parameters())
    before = {name: p.detach().clone() for name, p in state.items()}
    try:
        for name, moved in _moved(family, probe.small, sizes, axis, before):
            state[name].copy_(moved)
        logits = probe.model(probe.trace.ids, use_cache=False).logits
    finally:
        for name, p in state.items():
            p.copy_(before[name])
    difference = (logits - probe.trace.logits).norm() / probe.trace.logits.norm()
    return bool(difference < TOLERANCE)


def _moved(
    family: Family, config: Mapping[str, Any], sizes: Mapping[str, int], axis: str, before: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    draw = random.Random(1)
    layers = sizes["layer"]
    within = AXES[axis].within
    places = product(*(range(layers if outer == "layer" else sizes[outer]) for outer in within))
    kept = Kept({axis: {place: _shuffled(sizes[axis], draw) for place in places}}, sizes)
    for row, layer in family.named(config):
        tensor = before[row.at(layer)]
        for dim, spec in enumerate(row.dims):
            index = kept.rows(spec, layer)
            if index is not None:
                tensor = tensor.index_select(dim, torch.tensor(index))
        yield row.at(layer), tensor


def _shuffled(size: int, draw: random.Random) -> tuple[int, ...]:
    order = list(range(size))
    while order == sorted(order):
        draw.shuffle(order)
    return tuple(order)


def _sizes(proposal: Proposal) -> dict[str, int]:
    from shearling.axes.shape import shape_of

    return shape_of(proposal.family({}), proposal.probe.small).axes
