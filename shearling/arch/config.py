"""From a source's Hugging Face config to its cut's: the same, at the new sizes."""

from collections.abc import Mapping
from typing import Any

from shearling.axes.shape import KEYS, Shape
from shearling.axes.spec import Family, LayerRule
from shearling.errors import UserError


def config_at(
    family: Family, config: Mapping[str, Any], shape: Shape, *, layers: tuple[int, ...], dtype: str
) -> dict[str, Any]:
    """The config of the cut: `layers` are the source's layers that stay, `dtype` the weights' (torch's name).

    What depends on no size is carried as it is. Sizes are written where they differ from what the config class would
    derive; lists with an entry per layer follow the kept layers.
    """
    result = dict(config)
    for rule in family.layer_rules:
        spelled = layer_list(family, config, rule)
        if spelled is not None and list(layers) != list(range(len(spelled))):
            result[rule.key] = [spelled[layer] for layer in layers]
    for key in KEYS:
        if key in config or family.setting(result, key) != shape[key]:
            result[key] = shape[key]
    # A head_dim that was hidden_size / num_attention_heads need not be so any more.
    if family.setting({**result, "head_dim": None}, "head_dim") != shape["head_dim"]:
        result["head_dim"] = shape["head_dim"]
    dtype_key = "torch_dtype" if "torch_dtype" in config else "dtype"
    if dtype_key in config or dtype != "float32":
        result[dtype_key] = dtype
    return result


def layer_list(family: Family, config: Mapping[str, Any], rule: LayerRule) -> list[Any] | None:
    """A per-layer list of the config, spelled out; None where all layers are alike anyway.

    Raises UserError for a list that is not one entry a layer.
    """
    if config.get(rule.key) is not None:
        found, layers = list(config[rule.key]), config["num_hidden_layers"]
        if len(found) != layers:
            change = "mend config.json"
            raise UserError(rule.key, found=f"{len(found)} entries", expected=f"{layers}, one a layer", change=change)
        return found
    no_window = config.get(rule.window, ...) is None
    if no_window or not family.setting(config, rule.flag):
        return None
    start = family.setting(config, rule.start)
    return [rule.above if layer >= start else rule.below for layer in range(config["num_hidden_layers"])]


def max_positions(config: Mapping[str, Any]) -> int:
    """The longest sequence, in tokens, that a model was made for; 2,048 where its config doesn't say."""
    return int(config.get("max_position_embeddings") or 2048)
