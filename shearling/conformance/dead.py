"""Units that carry nothing are what one-shot scores remove, and without them the model is the same function."""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from shearling.axes.axis import is_per_layer
from shearling.axes.factors import Factor, factors
from shearling.axes.index import Kept, positions, select
from shearling.axes.shape import Shape
from shearling.axes.spec import Family
from shearling.axes.table import Tensor as Row
from shearling.conformance.exact import config_of, cut_model
from shearling.conformance.finding import Finding
from shearling.conformance.model import Small, relative
from shearling.conformance.targets import Unit, random_cut
from shearling.cut.extract import Cut
from shearling.cut.fold import spread_over
from shearling.cut.importance import measure

# Where a norm loses entries, its epsilon weighs more among those left, which no factor makes good at every token: so
# small that it weighs nothing, what is left is rounding. (At the configs' own 1e-5 or 1e-6 it is up to 1.4e-3 here.)
EPSILON = 1e-12


def dead_units(made: Small, targets: Mapping[Unit, Shape]) -> Iterator[Finding]:
    """For each unit of axes: kills just as many entries as the target cuts, measures, selects and cuts."""
    for unit, target in targets.items():
        kept, masks = random_cut(made.shape, target)
        killed = replace(made, model=_without_epsilons(deepcopy(made.model), made.family, made.config))
        kill(killed, {axis: (mask > 0).float() for axis, mask in masks.items()})
        ids = made.ids(seed=9)
        # Many tokens: a unit of a ReLU that none of them opens would look dead.
        batches = [made.ids(sequences=16, seed=seed) for seed in range(3)]
        found = measure(killed.model, made.family, config=made.config, batches=batches)
        chosen = select({a: s.tolist() for a, s in found.scores.items()}, source=made.shape, target=target)
        wrong = sorted(axis for axis in unit if _chosen_otherwise(kept, chosen, axis, found.scores[axis]))
        yield Finding("dead units go first", made.name, unit, why=", ".join(wrong))
        if wrong or not claims_logits(made, unit):
            continue
        cut = Cut(made.family, made.config, target, chosen, norm_scales=found.norm_scales(chosen))
        smaller = _without_epsilons(cut_model(killed, cut), made.family, config_of(cut))
        with torch.no_grad():
            logits = smaller(ids, use_cache=False).logits
        yield Finding("dead units are free", made.name, unit, relative(logits, killed.logits(ids)))


@torch.no_grad()
def kill(made: Small, alive: Mapping[str, Tensor]) -> None:
    """Sets to 0, in place, what the entries that aren't alive put into anything. `alive` is 0 or 1, [*within, size].

    Under LayerNorm the writers are centred over what is left: else its mean would move with the cut.
    """
    found = factors(made.family, tied=made.tied)
    for row, layer in made.family.named(made.config):
        offset = made.family.normalisation(row).offset if row.role in ("norm", "post") and not row.is_bias else 0.0
        weight = made.model.get_parameter(row.at(layer))
        for factor in found.get(row, ()):
            if factor.axis not in alive or factor.when == "cut" or factor.part == "count":
                continue
            mask = _along(made, row, factor, alive[factor.axis], layer)
            if factor.part == "centre":
                assert factor.dim is not None
                weight.sub_(weight.sum(factor.dim, keepdim=True) / mask.sum() * mask)
            else:
                weight.add_(offset).mul_(mask).sub_(offset)


def claims_logits(made: Small, unit: Unit) -> bool:
    """Whether the cut of dead units is claimed to be the same function: not where a choice among them is made anew."""
    routed = {axis for row in made.family.role("route") for dim in row.dims for axis in dim.axes()} - {"hidden"}
    return not routed & set(unit)


def _without_epsilons(model: Any, family: Family, config: Mapping[str, Any]) -> Any:
    for row, layer in family.named(config):
        if row.role in ("norm", "post") and not row.is_bias:
            norm = model.get_submodule(row.at(layer).rpartition(".")[0])
            setattr(norm, family.normalisation(row).eps_attribute, EPSILON)
    return model


def _along(made: Small, row: Row, factor: Factor, mask: Tensor, layer: int | None) -> Tensor:
    """A mask's values as something to multiply a row of the uncut model by."""
    if is_per_layer(factor.axis):
        mask = mask[layer]
    if factor.dim is None:
        return mask
    nested = row.nested(factor.dim)
    spread = spread_over(mask, positions(nested or row.dims[factor.dim], factor.axis, made.shape.axes))
    along = (factor.dim,) if nested is None else (0, factor.dim)
    shape = row.shape(made.shape.axes)
    return spread.reshape([size if dim in along else 1 for dim, size in enumerate(shape)])


def _chosen_otherwise(kept: Kept, chosen: Kept, axis: str, scores: Tensor) -> bool:
    """Whether a selection differs anywhere that there is something to select: not every layer has every axis."""
    places = (place for place in kept.choices[axis] if scores[place].any())
    return any(chosen.choices[axis].get(place) != kept.choices[axis][place] for place in places)
