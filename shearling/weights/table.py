"""A checkpoint held against its family's table, before anything is made of it."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from shearling.axes.disk import placed
from shearling.axes.shape import Shape
from shearling.axes.spec import Family
from shearling.errors import UserError, raise_all
from shearling.weights.checkpoint import Checkpoint

SHOWN = 5

APART = re.compile(r"\bdisk=\S*#\S*")  # of a table's line: names with an expert's number in them

# Buffers that older transformers saved beside the parameters.
OLD_BUFFERS = ("rotary_emb.inv_freq",)


def as_stored(checkpoint: Checkpoint, family: Family, config: Mapping[str, Any]) -> Family:
    """The family as these files have its stacks of experts: apart, as its table says, or each under its own name.

    transformers reads both; what is made of the model is written as the model was.
    """
    stacked = replace(family, table=APART.sub("", family.table))
    names = {row.at_disk(layer) for row, layer in stacked.named(config) if row.stacked}
    return stacked if names & checkpoint.tensors.keys() else family


@dataclass(frozen=True)
class Parts:
    """A checkpoint's tensors: those that the family has rows for, others' that come along, and what has no place."""

    sheared: Checkpoint
    carried: Checkpoint
    dropped: Checkpoint


def parts_of(checkpoint: Checkpoint, family: Family, config: Mapping[str, Any], shape: Shape) -> Parts:
    """The parts. `config` is the one that the table is about: of a whole with other parts, the text model's."""
    rows, inside = placed(family.written(config), shape.axes), family.inside
    carried, dropped = ((), ()) if inside is None else (inside.carried, inside.dropped)
    others = [name for name in checkpoint.names if name not in rows]
    return Parts(
        checkpoint.only(rows),
        checkpoint.only({name for name in others if name.startswith(carried)}),
        checkpoint.only({name for name in others if name.startswith(dropped)}),
    )


def check_table(checkpoint: Checkpoint, family: Family, config: Mapping[str, Any], shape: Shape) -> None:
    """Raises UserError, naming the first few, for tensors that are missing, of another shape, or in no table and part,
    and for a head that isn't the table that config.json ties it to.

    `config` is as in `parts_of`. Headers tell all of that, but where there is such a head the two are read.
    """
    expected = {name: piece.shape for name, (piece, _, _) in placed(family.written(config), shape.axes).items()}
    found = {name: tuple(info.shape) for name, info in checkpoint.tensors.items()}
    parts = parts_of(checkpoint, family, config, shape)
    known = {row.at_disk(None) for row in family.tensors if row.tied}.union(
        parts.sheared.tensors, parts.carried.tensors, parts.dropped.tensors
    )
    extra = [name for name in found if name not in known and not name.endswith(OLD_BUFFERS)]
    what = f"weights of {checkpoint.folder}"
    errors = []
    for names, problem in ((sorted(expected.keys() - found.keys()), "not there"), (sorted(extra), "unknown")):
        if names:
            errors.append(
                UserError(
                    what,
                    found=f"{len(names)} tensors {problem}: {', '.join(names[:SHOWN])}",
                    expected=f"the {len(expected)} tensors of a {family.name} of this config",
                    change="get config and weights that belong together",
                )
            )
    errors.extend(_wrong_sizes(what, expected, found))
    errors.extend(_no_part(what, family, found))
    errors.extend(_not_tied(what, checkpoint, family, config))
    raise_all(errors)


def _wrong_sizes(
    what: str, expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]
) -> Iterator[UserError]:
    wrong = [name for name in expected if name in found and found[name] != expected[name]]
    for name in wrong[:SHOWN]:
        yield UserError(
            f"{what}, tensor {name!r}",
            found=f"shape {list(found[name])}",
            expected=f"{list(expected[name])}, by config.json",
            change="get config and weights that belong together",
        )


def _not_tied(what: str, checkpoint: Checkpoint, family: Family, config: Mapping[str, Any]) -> Iterator[UserError]:
    """Heads with values of their own: transformers takes them as they are, whatever the config says of ties."""
    if not family.setting(config, "tie_word_embeddings"):
        return
    rows = {row.name: row for row in family.tensors}
    for head, table in ((row.at_disk(None), rows[row.tied].at_disk(None)) for row in rows.values() if row.tied):
        if {head, table} <= checkpoint.tensors.keys() and not checkpoint.alike(head, table):
            yield UserError(
                f"{what}, tensor {head!r}",
                found=f"other values than {table!r} has",
                expected="the same ones, as config.json ties the two",
                change="set tie_word_embeddings to false in config.json",
            )


def _no_part(what: str, family: Family, found: Mapping[str, object]) -> Iterator[UserError]:
    """Of parts beside the text model, those of which nothing is there: the whole could not be loaded again."""
    for start in () if family.inside is None else family.inside.carried:
        if not any(name.startswith(start) for name in found):
            change = "get the whole checkpoint, or its text model alone with a config of its own"
            yield UserError(what, found=f"no tensor {start}*", expected=f"all parts of a {family.name}", change=change)
