"""A model's sizes in Hugging Face's terms."""

from collections.abc import Iterator, Mapping
from typing import Any

from shearling.axes.axis import FOLLOWS, Dim
from shearling.axes.rotary import ways
from shearling.axes.spec import Family
from shearling.errors import UserError

# Each size of a config is a product of axes. A family has the sizes whose axes its table has; one without groups has as
# many kv heads as heads, and one size for both.
KEYS: dict[str, Dim] = {
    "hidden_size": Dim.parse("hidden"),
    "num_hidden_layers": Dim.parse("layer"),
    "num_attention_heads": Dim.parse("kv_head*group"),
    "num_key_value_heads": Dim.parse("kv_head"),
    "head_dim": Dim.parse("head_dim"),
    "intermediate_size": Dim.parse("intermediate"),
    "num_experts": Dim.parse("expert"),
    "moe_intermediate_size": Dim.parse("moe_intermediate"),
    "shared_expert_intermediate_size": Dim.parse("shared_intermediate"),
    "vocab_size": Dim.parse("vocab"),
}
UNGROUPED = {**KEYS, "num_attention_heads": Dim.parse("kv_head")}
del UNGROUPED["num_key_value_heads"]


class Shape(Mapping[str, int]):
    """Sizes by their standard names, in the order of KEYS, those that the model has; immutable.

    `fixed` are the family's sizes that are never cut, by the words that dims have for them; `rotary` how entries of the
    axis of that name may be chosen (axes/rotary.py), empty where there is none; `kinds` what each layer is, where they
    differ.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        fixed: Mapping[str, int] | None = None,
        *,
        rotary: tuple[str, ...] = (),
        kinds: tuple[frozenset[str], ...] = (),
    ):
        self._sizes = {key: int(sizes[key]) for key in KEYS if key in sizes}
        self.fixed, self.rotary, self.kinds = dict(fixed or {}), rotary, kinds

    def __getitem__(self, key: str) -> int:
        return self._sizes[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sizes)

    def __len__(self) -> int:
        return len(self._sizes)

    def __hash__(self) -> int:
        return hash(tuple(self._sizes.items()))

    def __str__(self) -> str:
        return ",".join(f"{key}={value}" for key, value in self._sizes.items())

    @property
    def dims(self) -> dict[str, Dim]:
        """Of which axes each size is a product."""
        of_each = KEYS if "num_key_value_heads" in self else UNGROUPED
        return {key: of_each[key] for key in self}

    @property
    def axes(self) -> dict[str, int]:
        """Entries of each axis, products divided out, and of each fixed word."""
        sizes = {dim.axes()[0]: self[key] for key, dim in self.dims.items() if len(dim.axes()) == 1}
        for key, dim in self.dims.items():
            *known, last = dim.axes()
            if last not in sizes:
                sizes[last] = self[key] // Dim((tuple(known),)).size(sizes)
        if self.rotary:
            sizes |= {axis: sizes[other] for axis, other in FOLLOWS.items()}
        return {**sizes, **self.fixed}

    def at(self, sizes: Mapping[str, int]) -> "Shape":
        """The same kind of model with these entries per axis."""
        return self.of({key: dim.size(sizes) for key, dim in self.dims.items()})

    def of(self, sizes: Mapping[str, int]) -> "Shape":
        """The same kind of model with these sizes."""
        return Shape(sizes, self.fixed, rotary=self.rotary, kinds=self.kinds)


def keys_of(family: Family, config: Mapping[str, Any]) -> tuple[str, ...]:
    """The sizes that a model with this config has, by their standard names."""
    axes = {"layer"}.union(*(dim.axes() for row in family.present(config) for dim in row.dims))
    return tuple(key for key, dim in (KEYS if "group" in axes else UNGROUPED).items() if axes.issuperset(dim.axes()))


def shape_of(family: Family, config: Mapping[str, Any]) -> Shape:
    """The shape of a Hugging Face config. Raises UserError for a size that is missing or doesn't fit."""
    sizes = {"num_hidden_layers": _size(family, config, "num_hidden_layers")}  # whatever else is asked needs it
    sizes |= {key: _size(family, config, key) for key in keys_of(family, config)}
    heads, kv_heads = sizes.get("num_attention_heads", 0), sizes.get("num_key_value_heads", 1)
    if heads % kv_heads:
        raise UserError(
            "config.json: num_attention_heads",
            found=f"{heads}, not a multiple of num_key_value_heads={kv_heads}",
            expected="a multiple",
            change="mend config.json",
        )
    experts, top_k = sizes.get("num_experts"), family.fixed.get("top_k", "")
    if experts is not None and family.setting(config, top_k) > experts:
        raise UserError(
            f"config.json: {top_k}",
            found=f"{family.setting(config, top_k)} of {experts} experts",
            expected="at most as many as there are experts",
            change="mend config.json",
        )
    fixed = {word: int(family.value(config, expression)) for word, expression in family.fixed.items()}
    rotary = ways(config) if "rotary" in family.axes else ()
    return Shape(sizes, fixed, rotary=rotary, kinds=tuple(family.kinds(config)) if family.layer_rules else ())


def _size(family: Family, config: Mapping[str, Any], key: str) -> int:
    try:
        value = family.setting(config, key)
    except (KeyError, TypeError, ZeroDivisionError):
        value = None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        expected, change = "a whole number above 0", "mend config.json"
        raise UserError(f"config.json: {family.key(config, key)}", found=repr(value), expected=expected, change=change)
    return value
