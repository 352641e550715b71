"""What is counted against what is there: parameters, cache, FLOPs."""

from collections.abc import Iterator, Mapping

import torch
from torch.utils.flop_counter import FlopCounterMode

from shearling.axes.count import cache_bytes_per_token, expected_parameters, flops_per_token, parameters
from shearling.axes.shape import Shape
from shearling.conformance.exact import config_of
from shearling.conformance.finding import Finding
from shearling.conformance.model import Small, on_meta
from shearling.conformance.targets import Unit, random_cut
from shearling.cut.extract import Cut

LENGTH, SEQUENCES = 7, 2


def counts(made: Small, targets: Mapping[Unit, Shape]) -> Iterator[Finding]:
    """Of the model and of each cut: what the table counts, what is expected at certainties, what is there."""
    yield _same("parameters", made, (), parameters(made.family, made.config), _numel(made.model))
    for unit, target in targets.items():
        kept, masks = random_cut(made.shape, target)
        cut = Cut(made.family, made.config, target, kept, masks)
        there = _numel(on_meta(config_of(cut)))
        yield _same("parameters", made, unit, parameters(made.family, config_of(cut)), there)
        certain = {axis: (mask > 0).float().tolist() for axis, mask in masks.items()}
        expected = expected_parameters(made.family, made.config, made.shape.axes, certain)
        yield _same("expected parameters", made, unit, expected, there)


def costs(made: Small) -> Iterator[Finding]:
    """The cache's tensors after some tokens, and what torch counts in a forward pass over them."""
    ids = made.ids(sequences=SEQUENCES, length=LENGTH)
    with torch.no_grad():
        cache = made.model(ids, use_cache=True).past_key_values
    # The state of a block that stays whole is no cache: it doesn't grow with tokens.
    held = [tensor for layer in cache.layers if hasattr(layer, "keys") for tensor in (layer.keys, layer.values)]
    entries = cache_bytes_per_token(made.family, made.config, bytes_per_entry=1)
    yield _same("cache", made, (), SEQUENCES * LENGTH * entries, sum(tensor.numel() for tensor in held))
    if any(row.role == "inner" and len(row.dims) > 2 for row in made.family.present(made.config)):
        return  # the recurrence inside such a block isn't counted
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        made.model(ids, use_cache=False)
    # Eager attention computes what it masks, so each token attends to all.
    flops = flops_per_token(made.family, made.config, context=LENGTH)
    yield _same("FLOPs", made, (), SEQUENCES * LENGTH * flops, counter.get_total_flops())


def _numel(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _same(check: str, made: Small, unit: Unit, counted: float, there: int) -> Finding:
    return Finding(check, made.name, unit, why="" if counted == there else f"{counted} counted, {there} there")
