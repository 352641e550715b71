"""`inspect`: what a config says of a model. Loads neither torch nor transformers."""

from pathlib import Path
from typing import Any

from shearling.arch import family_of
from shearling.arch.config import max_positions
from shearling.arch.file import given
from shearling.axes.axis import AXES, FOLLOWS
from shearling.axes.cost import memory_bytes
from shearling.axes.count import (
    active_parameters,
    cache_bytes_per_token,
    flops_per_token,
    parameters,
    parameters_by_group,
)
from shearling.axes.shape import shape_of
from shearling.axes.target import uncut
from shearling.weights.config import read_config


def inspect(model: str, *, arch: str | None = None) -> dict[str, Any]:
    """Family, shape, axes, parameters per group and memory of a model folder, a config file or a Hub id.

    `cut_along` are the axes that it can be cut along, `left_whole` the others, each with the reason. `arch` is the file
    of its family, where that has no table.
    """
    path = Path(model).expanduser()
    if not path.exists() or path.suffix == ".gguf":
        from shearling.weights.folder import resolve

        path = resolve(model)
    config = read_config(path)
    family = family_of(config, given(path, arch))
    shape = shape_of(family, config)
    context = max_positions(config)
    axes = {axis: size for axis, size in shape.axes.items() if axis in AXES and axis not in FOLLOWS}
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
        "context_tokens": context,
        "kv_cache_bytes_per_token": cache_bytes_per_token(family, config),
        "flops_per_token": flops_per_token(family, config, context=context // 2),
        **memory_bytes(family, config, context=context),
    }
