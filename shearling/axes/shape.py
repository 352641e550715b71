"""A model's sizes in Hugging Face's terms, and what a target shape may be."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shearling.axes.axis import Dim
from shearling.axes.spec import Family
from shearling.errors import UserError, nearest, raise_all

# Each size of a config is a product of axes.
KEYS: dict[str, Dim] = {
    "hidden_size": Dim.parse("hidden"),
    "num_hidden_layers": Dim.parse("layer"),
    "num_attention_heads": Dim.parse("kv_head*group"),
    "num_key_value_heads": Dim.parse("kv_head"),
    "head_dim": Dim.parse("head_dim"),
    "intermediate_size": Dim.parse("intermediate"),
    "vocab_size": Dim.parse("vocab"),
}

UNCUT = {  # sizes that nothing here can cut yet, and what to say of them
    "head_dim": "cutting head_dim is not supported yet: leave it out",
    "vocab_size": "cutting the vocabulary is not supported yet: leave it out",
}


class Shape(Mapping[str, int]):
    """Sizes by their Hugging Face names (KEYS), in KEYS' order; immutable."""

    def __init__(self, sizes: Mapping[str, int]):
        self._sizes = {key: int(sizes[key]) for key in KEYS}

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
    def axes(self) -> dict[str, int]:
        """Entries of each axis: the sizes that are one axis as they are, those that are products divided out."""
        sizes = {dim.axes()[0]: self[key] for key, dim in KEYS.items() if len(dim.axes()) == 1}
        for key, dim in KEYS.items():
            *known, last = dim.axes()
            if last not in sizes:
                sizes[last] = self[key] // Dim((tuple(known),)).size(sizes)
        return sizes


def shape_of(family: Family, config: Mapping[str, Any]) -> Shape:
    """The shape of a Hugging Face config. Raises UserError for a size that is missing or doesn't fit."""
    sizes: dict[str, int] = {}
    for key in KEYS:
        try:
            value = family.setting(config, key)
        except KeyError:
            value = None
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(
                f"config.json: {key}", found=repr(value), expected="a whole number above 0", change="mend config.json"
            )
        sizes[key] = value
    heads, kv_heads = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    if heads % kv_heads:
        raise UserError(
            "config.json: num_attention_heads",
            found=f"{heads}, not a multiple of num_key_value_heads={kv_heads}",
            expected="a multiple",
            change="mend config.json",
        )
    return Shape(sizes)


def parse_target(text: str) -> dict[str, int]:
    """`hidden_size=384,num_hidden_layers=20` as a dict. Raises UserError for unknown, repeated or unreadable sizes."""
    wanted: dict[str, int] = {}
    errors: list[UserError] = []
    for part in filter(None, (word.strip() for word in text.split(","))):
        key, _, value = (word.strip() for word in part.partition("="))
        if key not in KEYS:
            errors.append(
                UserError("target", found=repr(key), expected="a size of the model", change=nearest(key, list(KEYS)))
            )
        elif key in wanted:
            errors.append(UserError("target", found=f"{key} twice", expected="each size once", change="leave one out"))
        elif not re.fullmatch(r"[+-]?[0-9]{1,18}", value):
            errors.append(
                UserError(f"target {key}", found=repr(value), expected="a whole number", change=f"write {key}=N")
            )
        else:
            wanted[key] = int(value)
    if not wanted and not errors:
        errors.append(
            UserError("target", found="nothing", expected="sizes", change="name what to cut, as hidden_size=N,...")
        )
    raise_all(errors)
    return wanted


def resolve_target(family: Family, source: Shape, wanted: Mapping[str, int]) -> tuple[Shape, list[str]]:
    """The whole target shape, and notes on what was filled in. What `wanted` leaves out stays as it is.

    Raises UserError, naming the nearest valid values, for sizes that can't be cut to: all of them at once.
    """
    raise_all([error for key in wanted for error in _out_of_range(key, wanted[key], source[key])])
    sizes = _filled(source, wanted)
    rules = list(_rules(family, source))
    raise_all([_broken(rule, rules, source, wanted) for rule in rules if not rule.holds(sizes)])
    follows = sizes["num_key_value_heads"] != {**source, **wanted}["num_key_value_heads"]
    notes = [f"num_key_value_heads follows num_attention_heads: {sizes['num_attention_heads']}"] if follows else []
    return Shape(sizes), notes


def _filled(source: Shape, wanted: Mapping[str, int]) -> dict[str, int]:
    """All sizes. Where each head has a kv head of its own, and nothing is said of them, kv heads follow the heads."""
    sizes = {**source, **wanted}
    if source.axes["group"] == 1 and "num_key_value_heads" not in wanted:
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    return sizes


def _out_of_range(key: str, value: int, size: int) -> Iterator[UserError]:
    if not 1 <= value <= size:
        yield UserError(
            f"target {key}", found=value, expected=f"1 to {size}, the source's", change=f"choose {key} in that range"
        )
    elif key in UNCUT and value != size:
        yield UserError(f"target {key}", found=value, expected=f"{size}, the source's", change=UNCUT[key])


@dataclass(frozen=True)
class _Rule:
    """What two of a target's sizes must satisfy together."""

    keys: tuple[str, str]
    joint: str
    expected: str
    holds: Callable[[Mapping[str, int]], bool]


def _rules(family: Family, source: Shape) -> Iterator[_Rule]:
    """Heads share kv heads evenly, no kv head gets more than it has; and what the family's config insists on."""
    most = source.axes["group"]

    def shared_evenly(sizes: Mapping[str, int]) -> bool:
        group, left_over = divmod(sizes["num_attention_heads"], sizes["num_key_value_heads"])
        return left_over == 0 and group <= most

    expected = f"1 to {most} heads for each kv head, the same for all"
    yield _Rule(("num_attention_heads", "num_key_value_heads"), "on", expected, shared_evenly)
    for rule in family.divides:
        yield _divides(*(word.strip() for word in rule.split("%")), source=source)


def _divides(above: str, below: str, *, source: Shape) -> _Rule:
    def holds(sizes: Mapping[str, int]) -> bool:
        return sizes[above] % sizes[below] == 0 or all(sizes[key] == source[key] for key in (above, below))

    return _Rule((above, below), "with", f"a multiple of {below}, which transformers' config insists on", holds)


def _broken(rule: _Rule, rules: Sequence[_Rule], source: Shape, wanted: Mapping[str, int]) -> UserError:
    """The error for a rule that doesn't hold, with the changes of one size that mend everything, or else this rule."""
    sizes = _filled(source, wanted)

    def mended(key: str, rules: Sequence[_Rule]) -> str:
        tried = ((value, _filled(source, {**wanted, key: value})) for value in range(1, source[key] + 1))
        valid = [value for value, found in tried if all(each.holds(found) for each in rules)]
        return f"{key}={_closest(sizes[key], valid)}" if valid else ""

    changes = [mended(key, rules) for key in rule.keys]
    if not any(changes):
        changes = [mended(key, [rule]) for key in rule.keys]
    above, below = rule.keys
    return UserError(
        f"target {above}",
        found=f"{sizes[above]} {rule.joint} {below}={sizes[below]}",
        expected=rule.expected,
        change="choose " + ", or ".join(filter(None, changes)),
    )


def _closest(value: int, valid: list[int]) -> str:
    """The valid values next to `value`, below and above."""
    below = [n for n in valid if n < value][-1:]
    above = [n for n in valid if n > value][:1]
    return " or ".join(map(str, below + above))
