"""The table against transformers' model of the same config: names, sizes, ties, epsilons, names on disk, defaults."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from shearling.axes.disk import pieces
from shearling.axes.shape import shape_of
from shearling.axes.spec import Family
from shearling.conformance.finding import Finding
from shearling.conformance.model import build, on_meta, parsed
from shearling.conformance.small import flags
from shearling.weights.header import read_header

SHOWN = 5


def table_is_model(family: Family, config: Mapping[str, Any], name: str) -> Finding:
    """Every parameter by name and size, every tie, every norm's epsilon, on the meta device."""
    model = on_meta(config)
    faults = [*_sizes(family, config, model), *_ties(family, config, model), *_epsilons(family, config, model)]
    return Finding("table = model", name, why="; ".join(faults[:SHOWN]))


def names_on_disk(family: Family, config: Mapping[str, Any], folder: Path, name: str) -> Finding:
    """What `save_pretrained` writes: tensors by name and size against the table's names on disk, and a config that says
    the same sizes, under whatever keys. `folder` is to be empty.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    build(config).save_pretrained(folder)
    sizes = shape_of(family, config).axes
    counted = {p.name: p.shape for row, layer in family.named(config) for p in pieces(row, layer, sizes)}
    there = {
        tensor: tuple(info.shape)
        for shard in sorted(folder.glob("*.safetensors"))
        for tensor, info in read_header(shard).items()
    }
    said, meant = shape_of(family, json.loads((folder / "config.json").read_text())), shape_of(family, config)
    keys = [f"config.json: {key} {said[key]}, not {size}" for key, size in meant.items() if said[key] != size]
    return Finding("names on disk", name, why="; ".join([*keys, *differences(counted, there)][:SHOWN]))


def defaults(family: Family, model_type: str) -> Iterator[Finding]:
    """Each default of the table against what transformers fills in, in configs that leave out all that has one.

    In one of them all flags are on: some defaults count only then.
    """
    own = parsed({"model_type": model_type}).to_dict()
    required = {"hidden_size", "num_hidden_layers", "num_attention_heads"} - family.defaults.keys()
    names = (family.names.get(key, key) for key in sorted(required))
    bare = {"model_type": model_type, **{key: own[key] for key in names if key in own}}
    for config in (bare, {**bare, **dict.fromkeys(flags(family), True)}):
        filled = parsed(config).to_dict()
        for key in family.defaults.keys() - config.keys():
            counted, there = family.setting(config, key), filled.get(key)
            wrong = there is not None and counted != there
            yield Finding("defaults", key, why=f"{counted} in the table, {there} in transformers" if wrong else "")


def _sizes(family: Family, config: Mapping[str, Any], model: Any) -> Iterator[str]:
    sizes = shape_of(family, config).axes
    rows = list(family.named(config))
    counted = {row.at(layer): row.shape(sizes) for row, layer in rows}
    yield from differences(counted, {name: tuple(p.shape) for name, p in model.named_parameters()})
    if len(counted) < len(rows):
        yield "a name stands twice"


def _ties(family: Family, config: Mapping[str, Any], model: Any) -> Iterator[str]:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    present = family.present(config)
    for row in family.tensors:
        if row.tied and (parameters[row.name] is parameters[row.tied]) == (row in present):
            yield f"{row.name} {'does not share' if row not in present else 'shares'} {row.tied}'s storage"


def _epsilons(family: Family, config: Mapping[str, Any], model: Any) -> Iterator[str]:
    for row, layer in family.named(config):
        if row.role in ("norm", "post") and not row.is_bias:
            how = family.normalisation(row)
            module = model.get_submodule(row.at(layer).rpartition(".")[0])
            eps = getattr(module, how.eps_attribute, None)
            if eps != family.value(config, how.eps_key):
                yield f"{row.at(layer)}: {how.eps_attribute} {eps}"


def differences(counted: Mapping[str, tuple[int, ...]], there: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """Sizes by name that aren't the same in the table and there."""
    for name in sorted(counted.keys() | there.keys()):
        if counted.get(name) != there.get(name):
            table, model = (list(found[name]) if name in found else "nothing" for found in (counted, there))
            yield f"{name}: {table} in the table, {model} there"
