"""`inspect`: what a config says of a model. Loads neither torch nor transformers."""

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from shearling.arch import family_of
from shearling.arch.config import max_positions
from shearling.arch.file import given
from shearling.arch.whole import check_parts, text_config
from shearling.axes.axis import AXES, FOLLOWS
from shearling.axes.cost import memory_bytes
from shearling.axes.count import (
    active_parameters,
    cache_bytes_per_token,
    flops_per_token,
    parameters,
    parameters_by_group,
)
from shearling.axes.shape import Shape, shape_of
from shearling.axes.spec import Family
from shearling.axes.target import uncut
from shearling.weights.checkpoint import Checkpoint
from shearling.weights.config import read_config
from shearling.weights.table import as_stored, check_table, parts_of


def inspect(model: str, *, arch: str | None = None) -> dict[str, Any]:
    """Family, shape, axes, parameters per group and memory of a model folder, a config file or a Hub id.

    `cut_along` are the axes that it can be cut along, `left_whole` the others, each with the reason. Where the model is
    a whole with other parts, all of that is its text model's, and `beside` tells of the others. `arch` is the file of
    its family, where that has no table.
    """
    path = Path(model).expanduser()
    if not path.exists() or path.suffix == ".gguf":
        from shearling.weights.folder import resolve

        path = resolve(model)
    config = read_config(path)
    family = family_of(config, given(path, arch))
    config = text_config(family, config)
    shape = shape_of(family, config)
    context = max_positions(family, config)
    axes = {axis: size for axis, size in shape.axes.items() if axis in AXES and axis not in FOLLOWS}
    check_parts(family, config, shape)
    reasons = uncut(family, config)
    return {
        "model": model,
        "family": family.name,
        "tied_embeddings": bool(family.setting(config, "tie_word_embeddings")),
        "shape": dict(shape),
        "axes": axes,
        "cut_along": [axis for axis in axes if axis not in reasons and axes[axis] > 1],
        "left_whole": {axis: reasons[axis] for axis in axes if axis in reasons},
        "parameters": parameters(family, config),
        "active_parameters": active_parameters(family, config),
        "parameters_by_group": parameters_by_group(family, config),
        **({} if family.inside is None else {"beside": _beside(path, family, config, shape)}),
        "context_tokens": context,
        "kv_cache_bytes_per_token": cache_bytes_per_token(family, config),
        "flops_per_token": flops_per_token(family, config, context=context // 2),
        **memory_bytes(family, config, context=context),
    }


def _beside(path: Path, family: Family, config: Mapping[str, Any], shape: Shape) -> dict[str, Any]:
    """The parts beside the text model. How many parameters they have only the weights tell: None without them."""
    inside = family.inside
    assert inside is not None
    counts: dict[str, int | None] = {"connectors": sum(prod(row.shape(shape.axes)) for row in family.connectors)}
    counts["carried"] = None
    if path.is_dir() and any(path.glob("*.safetensors")):
        checkpoint = Checkpoint.open(path)
        family = as_stored(checkpoint, family, config)
        check_table(checkpoint, family, config, shape)
        parts = parts_of(checkpoint, family, config, shape)
        counts["carried"] = sum(prod(info.shape) for info in parts.carried.tensors.values())
        counts["dropped"] = sum(prod(info.shape) for info in parts.dropped.tensors.values())
    return {"text_model": inside.text_type, "carried": list(inside.carried), "parameters": counts}
