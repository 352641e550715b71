"""From a source's Hugging Face config to its cut's: the same, at the new sizes."""

from collections.abc import Mapping, Sequence
from typing import Any

from shearling.arch.whole import DTYPES
from shearling.axes.rotary import config_keeping
from shearling.axes.shape import Shape
from shearling.axes.spec import Family


def config_at(
    family: Family,
    config: Mapping[str, Any],
    shape: Shape,
    *,
    layers: tuple[int, ...],
    dtype: str,
    rotary: Sequence[int] | None = None,
) -> dict[str, Any]:
    """The config of the cut: `layers` are the source's layers that stay, `dtype` the weights' (torch's name), `rotary`
    the entries of q and k that stay, if not all.

    What depends on no size is carried as it is. Sizes are written where they differ from what the config class would
    derive; lists with an entry per layer follow the kept layers.
    """
    result = dict(config)
    for rule in family.layer_rules:
        words = rule.words(config, lambda key: family.setting(config, key))
        if words is not None and list(layers) != list(range(len(words))):
            result |= rule.written(words, layers)
    for name, size in shape.items():
        key = family.key(config, name)
        if key in config or family.setting(result, name) != size:
            result[key] = size
    # A head_dim that was hidden_size / num_attention_heads need not be so any more.
    if "head_dim" in shape and family.setting({**result, "head_dim": None}, "head_dim") != shape["head_dim"]:
        result["head_dim"] = shape["head_dim"]
    if rotary is not None:
        result |= config_keeping(result, rotary, family.setting(config, "head_dim"))
    if "num_experts" in shape and family.setting(config, family.fixed["top_k"]) > shape["num_experts"]:
        result[family.key(config, family.fixed["top_k"])] = shape["num_experts"]
    named = [key for key in DTYPES if key in config]  # some configs have both, and readers differ in which they go by
    if not named and dtype != "float32":
        named = ["dtype"]
    return result | dict.fromkeys(named, dtype)


def max_positions(family: Family, config: Mapping[str, Any]) -> int:
    """The longest sequence, in tokens, that a model was made for; 2,048 where its config doesn't say."""
    try:
        return int(family.setting(config, "max_position_embeddings") or 2048)
    except KeyError:
        return 2048
