"""A family as data: a table of tensors on named axes (axes/table.py), and the facts that the tensors don't tell."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from typing import Any

from shearling.axes.inside import Inside as Inside
from shearling.axes.layers import LayerRule as LayerRule
from shearling.axes.table import Tensor, rows
from shearling.errors import UserError


@dataclass(frozen=True)
class Normalisation:
    """How norms work: the module's attribute and the config's key (or a number) that hold their epsilon.

    `offset` is what the stored weight lacks of the effective one (Gemma: 1), `centred` is LayerNorm's mean.
    """

    eps_attribute: str
    eps_key: str | float
    offset: float = 0.0
    centred: bool = False

    def epsilon(self, module: Any) -> float:
        """Of a module that is such a norm. Raises UserError where it has none under that name."""
        found = getattr(module, self.eps_attribute, None)
        if found is None:
            kind, change = type(module).__name__, "mend it: see docs/add-a-family.md"
            known = ", ".join(name for name, value in vars(module).items() if isinstance(value, float)) or "none"
            what, said = "norms, eps_attribute", f"{self.eps_attribute}, which a {kind} has not"
            raise UserError(what, found=said, expected=f"its attribute with epsilon ({known})", change=change)
        return float(found)


@dataclass(frozen=True)
class Family:
    """Everything Shearling knows of a family. `table` is read by axes/table.py.

    Expressions are a number, a flag, a key of the config, or keys and numbers with * and / between them.
    """

    name: str
    model_types: tuple[str, ...]
    table: str
    norms: Normalisation | Mapping[str, Normalisation]  # one, or by the name that a row's `norm=` gives
    cache: str  # a dim: what one token adds to one layer's KV-cache
    scores: str  # a dim: multiply-adds per token, layer and position attended to
    attention_scale: str = ""  # the key of a constant that scores are scaled by; empty: 1 / sqrt(head_dim)
    attends: str = ""  # the kind of the layers that have a cache and scores; empty: all
    names: Mapping[str, str] = field(default_factory=dict)  # a size's standard name -> this config's key for it
    fixed: Mapping[str, Any] = field(default_factory=dict)  # words of dims that are never cut -> expressions
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of keys that a config leaves out: expressions
    nulls: Mapping[str, Any] = field(default_factory=dict)  # what a null means, where that isn't the default
    divides: tuple[str, ...] = ()  # "a % b": what transformers' config class insists on
    coupled: tuple[str, ...] = ()  # "a == b * c": sizes that the model's code ties to one another
    layer_rules: tuple[LayerRule, ...] = ()  # keys of the config that follow the kept layers
    logits: Mapping[str, str] = field(default_factory=dict)  # "times", "over", "cap" -> key: what is done to logits
    uncut: Mapping[str, str] = field(default_factory=dict)  # axis, or "axis if FLAG" -> why it can't be cut along
    requires: Mapping[str, Any] = field(default_factory=dict)  # of a draft: whatever else the config said, all of it
    # Where the text model is a part of its checkpoint. Not in the repr, by which proofs of text models are known.
    inside: Inside | None = field(default=None, repr=False)
    tensors: tuple[Tensor, ...] = field(init=False)
    connectors: tuple[Tensor, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        tensors, connectors = tuple(rows(self.table, self.fixed)), ()
        if self.inside is not None:
            tensors = tuple(replace(row, disk=self.inside.on_disk(row.disk or row.name)) for row in tensors)
            connectors = tuple(rows(self.inside.connectors, self.fixed))
        object.__setattr__(self, "tensors", tensors)
        object.__setattr__(self, "connectors", connectors)

    def key(self, config: Mapping[str, Any], name: str) -> str:
        """Under which key the config holds a size, or anything else, by its standard name or its own."""
        own = self.names.get(name, name)
        return name if own not in config and name in config else own

    def setting(self, config: Mapping[str, Any], name: str) -> Any:
        """The config's value, or the family's default for it. Raises KeyError where there is neither."""
        key = self.key(config, name)
        value = config.get(key)
        if value is not None:
            return value
        facts = self.nulls if key in config and key in self.nulls else self.defaults
        return self.value(config, facts[key])

    def value(self, config: Mapping[str, Any], expression: Any) -> Any:
        """Of an expression. A ratio that isn't whole is rounded down, as config classes do."""
        if not isinstance(expression, str):
            return expression
        first, *rest = expression.split()
        total = self._word(config, first)
        for sign, word in zip(rest[::2], rest[1::2], strict=True):
            other = self._word(config, word)
            total = Fraction(total) * other if sign == "*" else Fraction(total) / other
        return int(total) if isinstance(total, Fraction) else total

    def _word(self, config: Mapping[str, Any], word: str) -> Any:
        return int(word) if word.isdigit() else self.setting(config, word)

    def kinds(self, config: Mapping[str, Any]) -> list[frozenset[str]]:
        """For each layer the words that the config has for it: its kinds."""
        found = [rule.words(config, lambda key: self.setting(config, key)) for rule in self.layer_rules]
        spelled = [words for words in found if words is not None]
        return [
            frozenset(words[layer] for words in spelled if isinstance(words[layer], str))
            for layer in range(self.setting(config, "num_hidden_layers"))
        ]

    def present(self, config: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """The rows that a model with this config has: no absent biases, no head that is a tied embedding."""
        tied = self.setting(config, "tie_word_embeddings")
        by_kind = any(t.on for t in self.tensors)
        kinds = frozenset().union(*self.kinds(config)) if by_kind else frozenset()
        return tuple(
            t
            for t in self.tensors
            if all(self.setting(config, flag) for flag in t.when)
            and not (t.tied and tied)
            and (not t.on or not kinds.isdisjoint(t.on))
        )

    def named(
        self, config: Mapping[str, Any], layers: Sequence[int] | None = None
    ) -> Iterator[tuple[Tensor, int | None]]:
        """Each parameter with its layer: (row, None) or (row, layer), layer by layer in the table's order.

        With `layers`, those of the config's that stay, as they are numbered then.
        """
        present, by_kind = self.present(config), any(t.on for t in self.tensors)
        if layers is None:
            layers = range(self.setting(config, "num_hidden_layers"))
        kinds = self.kinds(config) if by_kind else None
        first = next((i for i, t in enumerate(present) if t.per_layer), len(present))
        yield from ((t, None) for t in present[:first])
        for number, layer in enumerate(layers):
            for t in present:
                if t.per_layer and (not t.on or (kinds is not None and not kinds[layer].isdisjoint(t.on))):
                    yield t, number
        yield from ((t, None) for t in present[first:] if not t.per_layer)

    def written(
        self, config: Mapping[str, Any], layers: Sequence[int] | None = None
    ) -> Iterator[tuple[Tensor, int | None]]:
        """Each parameter of the files that is cut: those that are `named`, then the connectors' of what is beside."""
        yield from self.named(config, layers)
        yield from ((row, None) for row in self.connectors)

    @cached_property
    def axes(self) -> frozenset[str]:
        """The axes that its tensors have, layers among them."""
        return frozenset({"layer"}).union(*(dim.axes() for t in self.tensors for dim in t.dims))

    @property
    def learns_positions(self) -> bool:
        """Whether each position is a row of a table, beyond whose end there is nothing."""
        return any("vocab" not in row.dims[0].axes() for row in self.role("embed"))

    def normalisation(self, norm: Tensor) -> Normalisation:
        """How a row that is a norm works."""
        if isinstance(self.norms, Normalisation):
            return self.norms
        return self.norms[norm.normalisation or next(iter(self.norms))]

    def readers(self, norm: str) -> tuple[Tensor, ...]:
        """The weights that read the residual stream through `norm`."""
        return tuple(t for t in self.tensors if t.norm == norm and len(t.dims) >= 2)

    def block(self, layer: int) -> str:
        """The path of one layer's module."""
        row = next(t for t in self.tensors if t.per_layer)
        return row.name.partition("*")[0] + str(layer)

    def role(self, role: str) -> tuple[Tensor, ...]:
        return tuple(t for t in self.tensors if t.role == role)
