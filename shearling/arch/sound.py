"""What a family out of a file may get wrong that reading its fields doesn't show: tried once, before it is relied on."""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from shearling.axes.axis import AXES, Dim
from shearling.axes.shape import KEYS, UNGROUPED
from shearling.axes.spec import Family, Normalisation
from shearling.axes.table import Tensor
from shearling.errors import UserError

Wrong = Iterator[tuple[str, str, str]]  # field, found, expected
LOGITS = ("times", "over", "cap")
RULES = {
    "coupled": (re.compile(r"(\w+)\s*==\s*(\w+)\s*\*\s*(\w+)"), "SIZE == SIZE * SIZE"),
    "divides": (re.compile(r"(\w+)\s*%\s*(\w+)"), "SIZE % SIZE"),
}


def errors_in(family: Family, where: str) -> list[UserError]:
    """What is wrong with a family whatever the config, by field; `where` it is from."""
    found = [*_of_table(family), *_of_dims(family), *_of_axes(family), *_of_sizes(family)]
    return [_error(f"{where}, {field}", found, expected) for field, found, expected in found]


def errors_with(family: Family, config: Mapping[str, Any]) -> list[UserError]:
    """What its expressions and keys lack in a config that it is for, by field."""
    errors = []
    for field, said, evaluate in _evaluated(family, config):
        try:
            evaluate()
        except UserError as error:
            errors.append(error)
        except KeyError as missing:
            found, expected = f"{said!r}, of which no {missing} is known", "keys of config.json, or of defaults"
            errors.append(_error(f"family {family.name}, {field}", found, expected))
        except (TypeError, ValueError, ZeroDivisionError) as error:
            found, expected = f"{said!r} ({error})", "a number, a flag, a key, or keys and numbers with * and /"
            errors.append(_error(f"family {family.name}, {field}", found, expected))
    return errors


def _error(what: str, found: str, expected: str) -> UserError:
    return UserError(what, found=found, expected=expected, change="mend it: see docs/add-a-family.md")


def _of_table(family: Family) -> Wrong:
    rows = {row.name: row for row in family.tensors}
    kinds = () if isinstance(family.norms, Normalisation) else tuple(family.norms)
    if not any(row.per_layer for row in family.tensors):
        yield "table", "no row of a layer", "rows with * in their names"
    if not isinstance(family.norms, Normalisation) and not kinds:
        yield "norms", "none", "one, or several by name"
    for row in family.tensors:
        if row.normalisation and row.normalisation not in kinds:
            yield "table", f"norm={row.normalisation}", f"one of norms, by name: {', '.join(kinds) or 'it has one'}"
        if row.tied and not _alike(row, rows.get(row.tied)):
            yield "table", f"tied={row.tied}", f"the name of another row with the dims of {row.name}"
        if row.norm and row.norm not in rows:
            yield "table", f"reads={row.norm}", "the name of a row that is a norm, or -"
        if row.scaled and row.scaled not in AXES:
            yield "table", f"scaled={row.scaled}", f"an axis: {', '.join(AXES)}"


def _alike(row: Tensor, other: Tensor | None) -> bool:
    return other is not None and other is not row and other.dims == row.dims


def _of_dims(family: Family) -> Wrong:
    for field, text in (("cache", family.cache), ("scores", family.scores)):
        try:
            axes = Dim.parse(text, family.fixed).axes()
        except ValueError as error:
            yield field, str(error), "a dim"
            continue
        if stray := [axis for axis in axes if axis not in family.axes]:
            yield field, f"{', '.join(stray)}, along which no row of the table lies", "a dim of the table's axes"


def _of_axes(family: Family) -> Wrong:
    for words in family.uncut:
        if words.partition(" if ")[0] not in AXES:
            yield "uncut", repr(words), f"an axis, or an axis if FLAG: {', '.join(AXES)}"
    for word in family.logits:
        if word not in LOGITS:
            yield "logits", repr(word), f"one of {', '.join(LOGITS)}"


def _of_sizes(family: Family) -> Wrong:
    known = KEYS if "group" in family.axes else UNGROUPED
    sizes = {key for key, dim in known.items() if family.axes.issuperset(dim.axes())}
    for field, (form, spelled) in RULES.items():
        for rule in getattr(family, field):
            if not (match := form.fullmatch(rule)):
                yield field, repr(rule), spelled
            elif stray := [size for size in match.groups() if size not in sizes]:
                yield field, f"{', '.join(stray)} in {rule!r}", f"sizes of the table: {', '.join(sorted(sizes))}"


def _evaluated(family: Family, config: Mapping[str, Any]) -> Iterator[tuple[str, Any, Callable[[], Any]]]:
    """Each thing that is asked of a config: its field, how it is spelled, what asks it."""
    value, setting = partial(family.value, config), partial(family.setting, config)
    yield "defaults", "tie_word_embeddings", partial(setting, "tie_word_embeddings")
    for word, said in family.fixed.items():
        yield f"fixed.{word}", said, lambda said=said: int(value(said))
    for flag in dict.fromkeys(flag for row in family.tensors for flag in row.when):
        yield "table", flag, partial(setting, flag)
    for words in family.uncut:
        if flag := words.partition(" if ")[2]:
            yield "uncut", words, partial(setting, flag)
    for number, rule in enumerate(family.layer_rules):
        yield f"layer_rules, entry {number}", rule.at or rule.key, partial(rule.words, config, setting)
