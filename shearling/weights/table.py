"""A checkpoint held against its family's table, before anything is read from it."""

from collections.abc import Iterator

from shearling.axes.disk import pieces
from shearling.axes.shape import Shape
from shearling.axes.spec import Family
from shearling.errors import UserError, raise_all
from shearling.weights.checkpoint import Checkpoint

SHOWN = 5

# Buffers that older transformers saved beside the parameters.
OLD_BUFFERS = ("rotary_emb.inv_freq",)


def check_table(checkpoint: Checkpoint, family: Family, shape: Shape) -> None:
    """Raises UserError, naming the first few, for tensors that are missing, of another shape, or not in the table."""
    sizes = shape.axes
    rows = family.named(checkpoint.config)
    expected = {piece.name: piece.shape for row, layer in rows for piece in pieces(row, layer, sizes)}
    found = {name: tuple(info.shape) for name, info in checkpoint.tensors.items()}
    tied = {row.at_disk(None) for row in family.tensors if row.tied}
    extra = [n for n in found if n not in expected and n not in tied and not n.endswith(OLD_BUFFERS)]
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
