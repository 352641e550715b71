"""What a target shape may be: what was asked for, filled in, and held against the rules of family and config."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shearling.axes.index import cover
from shearling.axes.rotary import selections, unturnable
from shearling.axes.shape import Shape
from shearling.axes.spec import Family
from shearling.errors import UserError, nearest, raise_all

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
EXPERTS_ROW_BYTES = 16  # of torch's grouped_mm

UNCUT = {  # axes that nothing here can cut yet, and what to say of them
    "vocab": "cutting the vocabulary is not supported yet: leave it out",
}


def parse_target(text: str) -> dict[str, int]:
    """`hidden_size=384,num_hidden_layers=20` as a dict. Raises UserError for repeated or unreadable sizes."""
    wanted: dict[str, int] = {}
    errors: list[UserError] = []
    for part in filter(None, (word.strip() for word in text.split(","))):
        key, sign, value = (word.strip() for word in part.partition("="))
        if not sign:
            found, change = repr(part), "write it as hidden_size=384, with = between"
            errors.append(UserError("target", found=found, expected="sizes by name", change=change))
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


def resolve_target(
    family: Family,
    source: Shape,
    wanted: Mapping[str, int],
    config: Mapping[str, Any] | None = None,
    *,
    dtype: str = "float32",
) -> tuple[Shape, list[str]]:
    """The whole target shape, and notes on what was filled in. What `wanted` leaves out stays as it is.

    Sizes go by their standard names or by the family's own. Raises UserError, naming the nearest valid values, for
    sizes that can't be cut to: all of them at once. `config`, the source's, has the flags on which some of that hangs;
    `dtype` is the result's.
    """
    wanted = _standard(family, source, wanted)
    reasons = uncut(family, config or {})
    raise_all([error for key in wanted for error in _out_of_range(key, wanted[key], source, reasons)])
    sizes = _filled(family, source, wanted)
    rules = list(_rules(family, source))
    raise_all([_broken(rule, rules, family, source, wanted) for rule in rules if not rule.holds(sizes)])
    target = source.of(sizes)
    raise_all([_bound(axis, reasons[axis], source) for axis in reasons if _moves(axis, source, target)])
    found = (*_misaligned(family, source, target, dtype), *_unturned(source, target), *_without_a_kind(target))
    raise_all(list(found))
    followers = (key for key in source if sizes[key] != {**source, **wanted}[key])
    notes = [f"{key} follows {_leader(key, wanted)}: {sizes[key]}" for key in followers]
    if sizes.get("num_experts", source.fixed.get("top_k", 0)) < source.fixed.get("top_k", 0):
        notes.append(f"{family.fixed['top_k']} is lowered to {sizes['num_experts']}: no more experts are left")
    return target, notes


def _misaligned(family: Family, source: Shape, target: Shape, dtype: str) -> Iterator[UserError]:
    """Sizes that transformers' default code for experts can't multiply: rows that aren't a multiple of 16 bytes."""
    step = EXPERTS_ROW_BYTES // BYTES[dtype]
    inside = {axis for row in family.tensors if row.stacked for dim in row.dims[1:] for axis in dim.axes()}
    for key, dim in target.dims.items():
        size = target[key]
        if inside.issuperset(dim.axes()) and size != source[key] and size % step:
            expected = f"a multiple of {step} ({EXPERTS_ROW_BYTES} bytes of {dtype}), for transformers' experts code"
            valid = list(range(step, source[key] + 1, step))
            yield UserError(
                f"target {key}", found=size, expected=expected, change=f"choose {key}={_closest(size, valid)}"
            )


def _unturned(source: Shape, target: Shape) -> Iterator[UserError]:
    """A head_dim of which no choice of q's and k's entries has frequencies that a config can say."""

    def turns(size: int) -> bool:
        return any(selections(source.rotary, source["head_dim"], size))

    if source.rotary and target["head_dim"] != source["head_dim"] and not turns(target["head_dim"]):
        size = source["head_dim"]
        valid = [n for n in range(1, size + 1) if n == size or turns(n)]
        expected = (
            "an even number" if "prefix" in source.rotary else f"an even divisor of {size}: no rope_theta in config"
        )
        change = f"choose head_dim={_closest(target['head_dim'], valid)}"
        yield UserError("target head_dim", found=target["head_dim"], expected=expected, change=change)


def _without_a_kind(target: Shape) -> Iterator[UserError]:
    """Fewer layers than there are kinds of them: each is there for something, and some classes want one of each."""
    least = len(cover(target.kinds, range(len(target.kinds))))
    layers = target["num_hidden_layers"]
    if layers < least:
        kinds = ", ".join(sorted(frozenset().union(*target.kinds)))
        expected, change = f"at least {least}, one layer of each kind: {kinds}", f"choose num_hidden_layers={least}"
        yield UserError("target num_hidden_layers", found=layers, expected=expected, change=change)


def _standard(family: Family, source: Shape, wanted: Mapping[str, int]) -> dict[str, int]:
    """Sizes by their standard names. Raises UserError for what isn't a size of the model, and for one told twice."""
    own = {family.names[key]: key for key in source if key in family.names}
    found: dict[str, int] = {}
    errors: list[UserError] = []
    for name, value in wanted.items():
        key = name if name in source else own.get(name)
        if key is None:
            expected = f"a size of a {family.name}: {', '.join(source)}"
            errors.append(
                UserError("target", found=repr(name), expected=expected, change=nearest(name, [*source, *own]))
            )
        elif key in found:
            found_as = f"{key} twice, once as {family.names[key]}"
            errors.append(UserError("target", found=found_as, expected="each size once", change="leave one out"))
        else:
            found[key] = value
    raise_all(errors)
    return found


def uncut(family: Family, config: Mapping[str, Any]) -> dict[str, str]:
    """Axes along which this model can't be cut, and why."""
    found = dict(UNCUT)
    if "rotary" not in family.axes:
        found["head_dim"] = f"the table of {family.name} doesn't keep entries of q and k apart from those of v"
    elif reason := unturnable(config):
        found |= {"head_dim": reason, "rotary": reason}
    for words, reason in family.uncut.items():
        axis, _, flag = words.partition(" if ")
        if not flag or family.setting(config, flag):
            found[axis] = reason
    return found


def _filled(family: Family, source: Shape, wanted: Mapping[str, int]) -> dict[str, int]:
    """All sizes. Where each head has a kv head of its own, and nothing is said of them, kv heads follow the heads.

    Of coupled sizes one that is named takes the other along, where that can be.
    """
    sizes = {**source, **wanted}
    for whole, per, each in _couplings(family):
        if whole in wanted and per not in wanted and sizes[whole] % sizes[each] == 0:
            sizes[per] = sizes[whole] // sizes[each]
        elif per in wanted and whole not in wanted:
            sizes[whole] = sizes[per] * sizes[each]
    if source.axes.get("group") == 1 and "num_key_value_heads" in source and "num_key_value_heads" not in wanted:
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    return sizes


def _leader(key: str, wanted: Mapping[str, int]) -> str:
    """Which of the sizes that were asked for one follows."""
    leaders = ("num_attention_heads", "hidden_size")
    return next((leader for leader in leaders if leader in wanted and leader != key), leaders[0])


def _couplings(family: Family) -> Iterator[tuple[str, str, str]]:
    """(a, b, c) of each "a == b * c"."""
    for rule in family.coupled:
        whole, _, product = rule.partition("==")
        per, each = product.split("*")
        yield whole.strip(), per.strip(), each.strip()


def _out_of_range(key: str, value: int, source: Shape, reasons: Mapping[str, str]) -> Iterator[UserError]:
    size, axes = source[key], source.dims[key].axes()
    if not 1 <= value <= size:
        yield UserError(
            f"target {key}", found=value, expected=f"1 to {size}, the source's", change=f"choose {key} in that range"
        )
    elif value != size and all(axis in reasons for axis in axes):
        yield UserError(f"target {key}", found=value, expected=f"{size}, the source's", change=reasons[axes[0]])


def _moves(axis: str, source: Shape, target: Shape) -> bool:
    return axis in source.axes and source.axes[axis] != target.axes[axis]


def _bound(axis: str, reason: str, source: Shape) -> UserError:
    """The error for sizes that leave fewer entries of an axis that can't be cut along."""
    keys = " and ".join(key for key, dim in source.dims.items() if axis in dim.axes())
    return UserError(f"target {keys}", found=f"fewer along {axis}", expected=f"{source.axes[axis]}", change=reason)


@dataclass(frozen=True)
class _Rule:
    """What some of a target's sizes must satisfy together."""

    keys: tuple[str, str]
    joint: str
    expected: str
    holds: Callable[[Mapping[str, int]], bool]


def _rules(family: Family, source: Shape) -> Iterator[_Rule]:
    """Heads share kv heads evenly, no kv head gets more than it has; and what the family's config insists on."""
    most = source.axes.get("group", 1)

    def shared_evenly(sizes: Mapping[str, int]) -> bool:
        group, left_over = divmod(sizes["num_attention_heads"], sizes["num_key_value_heads"])
        return left_over == 0 and group <= most

    expected = f"1 to {most} heads for each kv head, the same for all"
    if "num_key_value_heads" in source:
        yield _Rule(("num_attention_heads", "num_key_value_heads"), "on", expected, shared_evenly)
    for rule in family.divides:
        yield _divides(*(word.strip() for word in rule.split("%")), source=source)
    for whole, per, each in _couplings(family):
        yield _coupled(whole, per, each)


def _divides(above: str, below: str, *, source: Shape) -> _Rule:
    def holds(sizes: Mapping[str, int]) -> bool:
        return sizes[above] % sizes[below] == 0 or all(sizes[key] == source[key] for key in (above, below))

    return _Rule((above, below), "with", f"a multiple of {below}, which transformers' config insists on", holds)


def _coupled(whole: str, per: str, each: str) -> _Rule:
    def holds(sizes: Mapping[str, int]) -> bool:
        return sizes[whole] == sizes[per] * sizes[each]

    return _Rule((whole, per), "with", f"{per} * {each}, to which the model's code ties it", holds)


def _broken(rule: _Rule, rules: Sequence[_Rule], family: Family, source: Shape, wanted: Mapping[str, int]) -> UserError:
    """The error for a rule that doesn't hold, with the changes of one size that mend everything, or else this rule."""
    sizes = _filled(family, source, wanted)

    def mended(key: str, rules: Sequence[_Rule]) -> str:
        tried = ((value, _filled(family, source, {**wanted, key: value})) for value in range(1, source[key] + 1))
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
