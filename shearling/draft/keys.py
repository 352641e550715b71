"""Which keys of a config are its sizes, and a small config of the same kind: everything else as it is.

The small sizes are such that no two dims of a model are equal by chance, where the type allows it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from shearling.draft.build import check_known, make_config, on_meta, quiet
from shearling.draft.refused import Refused

# What model types call their sizes, beside the standard names and what their config class says itself.
SPELLINGS: dict[str, tuple[str, ...]] = {
    "hidden_size": ("n_embd", "d_model", "model_dim", "dim"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads", "attention_heads"),
    "num_key_value_heads": ("num_kv_heads", "n_head_kv", "n_kv_heads"),
    "head_dim": ("attention_head_dim", "kv_channels"),
    "intermediate_size": ("n_inner", "ffn_dim", "ffn_hidden_size", "d_ff", "ffn_intermediate_size"),
    "num_experts": ("num_local_experts", "n_routed_experts"),
    "moe_intermediate_size": ("expert_ffn_hidden_size",),
    "vocab_size": (),
}
SMALL = {"kv_head": 2, "group": 3, "head_dim": 8, "hidden": 36, "intermediate": 20, "vocab": 43, "expert": 5, "moe": 12}
WINDOW = 8  # tokens: shorter than the texts tried, so that it matters which layers have one
TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts", "moe_k")


@dataclass(frozen=True)
class Keys:
    """A raw config and what its sizes are called. `names` has the standard names that the type has a key for."""

    raw: Mapping[str, Any]  # as the user gave it
    config: Mapping[str, Any]  # with what the class fills in
    names: Mapping[str, str]
    layer_lists: tuple[str, ...]  # keys that hold an entry per layer
    own_head_dim: bool  # whether the type has a head_dim apart from hidden_size / num_attention_heads
    grouped: bool  # whether it has key/value heads of their own
    coupled: bool = False  # whether hidden = heads * head_dim in the code itself
    divides: bool = False  # whether the class insists that heads divide hidden
    overrides: Mapping[str, Any] = field(default_factory=dict)  # what else a small model needs changed, to run at all

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> "Keys":
        """Raises Refused for a type without a causal decoder in transformers, or without a size that all have."""
        check_known(config)
        with quiet():
            try:
                made = make_config(config)
            except Exception as error:  # whatever the class checks
                raise Refused(f"transformers refuses the config: {_first_line(error)}") from error
        known = {**made.to_dict(), **config}
        names = {size: key for size in SPELLINGS if (key := _key(size, made, known)) is not None}
        for size in ("hidden_size", "num_hidden_layers", "vocab_size"):
            if size not in names:
                raise Refused(f"no key of the config was found to be {size}")
        layers = known[names["num_hidden_layers"]]
        lists = tuple(k for k, v in known.items() if isinstance(v, (list, tuple)) and len(v) == layers > 1)
        whole = {**known, "model_type": config["model_type"]}
        return cls(config, whole, names, lists, own_head_dim=False, grouped=False)._with_heads()._heeded()

    @property
    def layers(self) -> int:
        return self.config[self.names["num_hidden_layers"]]

    def small(self, *, layers: int | None = None, **axes: int) -> dict[str, Any]:
        """A raw config of these entries per axis, SMALL's where none are given; its first `layers` layers, or all."""
        sizes = {**SMALL, **axes}
        group = sizes["group"] if self.grouped else 1
        heads = sizes["kv_head"] * group
        hidden = heads * sizes["head_dim"] if self.coupled else sizes["hidden"]
        values = {
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "num_key_value_heads": sizes["kv_head"],
            "head_dim": sizes["head_dim"],
            "intermediate_size": sizes["intermediate"],
            "vocab_size": sizes["vocab"],
            "num_experts": sizes["expert"],
            "moe_intermediate_size": sizes["moe"],
        }
        config = dict(self.config)
        count = self.layers if layers is None else min(layers, self.layers)
        config[self.names["num_hidden_layers"]] = count
        for key in self.layer_lists:
            config[key] = list(config[key])[:count]
        for size, value in values.items():
            if size in self.names and (size != "head_dim" or self.own_head_dim):
                config[self.names[size]] = value
        for key, value in config.items():
            if key.endswith("_token_id") and isinstance(value, int) and value >= sizes["vocab"]:
                config[key] = 1
            elif key.endswith(("dropout", "pdrop")) and isinstance(value, float):
                config[key] = 0.0
            elif ("window" in key or "chunk" in key) and type(value) is int and value > WINDOW and "layers" not in key:
                config[key] = WINDOW
        for key in TOP_K:
            if key in config and isinstance(config[key], int):
                config[key] = min(config[key], 2)
        return {**config, **self.overrides, "dtype": "float32", "torch_dtype": None}

    def changed(self, **overrides: Any) -> "Keys":
        return replace(self, overrides={**self.overrides, **overrides})

    def refuses(self, **axes: int) -> bool:
        """Whether the class can't be built at these sizes."""
        try:
            on_meta(self.small(layers=2, **axes))
        except Exception:  # whatever it says of them
            return True
        return False

    def _with_heads(self) -> "Keys":
        """Finds out by building: does head_dim have a key that is heeded, do key/value heads?"""
        if "num_attention_heads" not in self.names:
            return self
        names = {**self.names, "head_dim": self.names.get("head_dim", "head_dim")}
        heeding = replace(self, names=names, own_head_dim=True)
        without = replace(self, names={k: v for k, v in names.items() if k != "head_dim"}, coupled=True)
        found = heeding if _moves(heeding, "head_dim", 16) else without
        grouping = replace(found, grouped=True)
        if "num_key_value_heads" in self.names and _moves(grouping, "group", 1):
            return grouping
        return found

    def _heeded(self) -> "Keys":
        """Without the sizes that the class derives from others, whatever their key says."""
        axes = {"intermediate_size": "intermediate", "num_experts": "expert", "moe_intermediate_size": "moe"}
        dead = [size for size, axis in axes.items() if size in self.names and not _moves(self, axis, SMALL[axis] + 2)]
        return replace(self, names={size: key for size, key in self.names.items() if size not in dead})


def _moves(keys: Keys, axis: str, value: int) -> bool:
    """Whether another number of entries along `axis` makes another model, all else alike."""
    first, second = keys.small(layers=2), keys.small(layers=2, **{axis: value})
    if axis == "group":  # the same heads, shared by fewer key/value heads
        second = {**first, keys.names["num_key_value_heads"]: SMALL["kv_head"] * SMALL["group"]}
    try:
        return _extents(first) != _extents(second)
    except Exception:  # what the class says of it doesn't matter: it isn't heeded
        return False


def _extents(config: Mapping[str, Any]) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(p.shape)) for name, p in on_meta(config).named_parameters()]


def _key(size: str, made: Any, known: Mapping[str, Any]) -> str | None:
    options: Iterator[str] = iter((size, type(made).attribute_map.get(size, ""), *SPELLINGS[size]))
    return next((key for key in options if key in known and not isinstance(known[key], (list, dict, str))), None)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
