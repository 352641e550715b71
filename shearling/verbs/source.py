"""A model that a verb works on: its folder, and what its config and headers say, checked before anything is read."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from shearling.arch import family_of
from shearling.arch.config import config_at, max_positions
from shearling.arch.file import FILE, digest, dump, given
from shearling.arch.whole import check_parts, text_config, whole_config
from shearling.axes.count import parameters
from shearling.axes.disk import pieces
from shearling.axes.shape import Shape, shape_of
from shearling.axes.spec import Family
from shearling.axes.table import Tensor as Row
from shearling.data.store import Store
from shearling.data.tokenise import fingerprint as tokenizer_fingerprint
from shearling.data.tokenise import load_tokenizer, vocab_size
from shearling.errors import UserError
from shearling.ranks.ranks import Ranks
from shearling.weights.checkpoint import Checkpoint, check_dtype, check_finite, fingerprint
from shearling.weights.config import read_json
from shearling.weights.folder import carry, resolve
from shearling.weights.header import DTYPES
from shearling.weights.model import Beside, assembled, reader, save_model
from shearling.weights.table import Parts, as_stored, check_table, parts_of
from shearling.weights.writer import room_for

ORIGIN = "shearling.json"


@dataclass(frozen=True)
class Source:
    """A sound model folder. `name` is what the user called it.

    Where the model is a whole with other parts, `config`, `family` and `shape` are its text model's.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    family: Family
    shape: Shape
    checkpoint: Checkpoint
    own_family: bool = False  # whether the family comes from a file and not from a table of this package

    @classmethod
    def open(
        cls, model: str, *, dtype: str | None = None, arch: str | None = None, like: "Source | None" = None
    ) -> "Source":
        """Reads config and headers. Raises UserError for all that can be told from them; `dtype` settles a quarrel.

        The family is the one in the file `arch`, else the one in the folder, else that of `like`, a model sheared from
        this one, where it has one of its own, else the table's.
        """
        folder = resolve(model)
        checkpoint = Checkpoint.open(folder)
        own = _own_family(folder, checkpoint.config, arch, like)
        family = family_of(checkpoint.config, own)
        config = text_config(family, checkpoint.config)
        family = as_stored(checkpoint, family, config)
        shape = shape_of(family, config)
        family.kinds(config)  # says what is wrong with a list of layers
        check_parts(family, config, shape)
        check_table(checkpoint, family, config, shape)
        source = cls(model, folder, config, family, shape, checkpoint, own_family=own is not None)
        if dtype is None:
            check_dtype(config, source.parts.sheared)
        source.origin()  # says what is wrong with it: it may be needed last
        return source

    @property
    def tied(self) -> bool:
        return bool(self.family.setting(self.config, "tie_word_embeddings"))

    @property
    def parameters(self) -> int:
        return parameters(self.family, self.config)

    @cached_property
    def parts(self) -> Parts:
        """Its tensors: those that the family has rows for, and those of other parts."""
        return parts_of(self.checkpoint, self.family, self.config, self.shape)

    def notes(self) -> tuple[str, ...]:
        """What a user should know of the parts that it has beside what is sheared."""
        parts, inside = self.parts, self.family.inside
        if inside is None:
            return ()
        said = f"sheared is the text model ({inside.text_type}); {len(parts.carried.names)} other tensors are carried"
        gone = parts.dropped.names
        return (said, *([f"left out, transformers has no place for them: {', '.join(gone[:5])}"] if gone else []))

    @property
    def dtype(self) -> torch.dtype:
        """What most of the weights are stored in, by bytes."""
        nbytes = self.parts.sheared.float_bytes()
        return getattr(torch, DTYPES[max(nbytes, key=lambda code: nbytes[code])][1])

    def dtype_name(self, asked: str | None = None) -> str:
        """What a model of this one's making is stored in: what is `asked` for, else the same."""
        return asked or str(self.dtype).removeprefix("torch.")

    def read(self, row: Row, layer: int | None) -> torch.Tensor:
        """One tensor of the table from disk, checked."""
        found = []
        for piece in pieces(row, layer, self.shape.axes):
            weight = self.checkpoint.read(piece.name)
            check_finite(piece.name, weight)
            found.append((piece, weight))
        return assembled(found, row.shape(self.shape.axes))

    def reads(self, ranks: Ranks) -> Callable[[Row, int | None], torch.Tensor]:
        """`read` for ranks that make the same rows of which the first writes them: for the others zeros will do."""
        if ranks.first:
            return self.read
        return lambda row, layer: torch.zeros(row.shape(self.shape.axes), dtype=self.dtype)

    def reader(self, model: Any) -> Callable[[Row, int | None], torch.Tensor]:
        """Reads rows from its model in memory; what is beside that, from disk."""
        held = reader(model)
        return lambda row, layer: self.read(row, layer) if row in self.family.connectors else held(row, layer)

    def check_finite(self, *, rank: int = 0, ranks: int = 1) -> None:
        """Reads every tensor, one at a time. Raises UserError for the first that holds NaN or an infinity.

        Of several `ranks` one reads its share of them.
        """
        for name in self.checkpoint.names[rank::ranks]:
            check_finite(name, self.checkpoint.read(name))

    def at(self, folder: Path) -> "Source":
        """What was made of it, in a folder."""
        return Source.open(str(folder), dtype="float32", like=self)  # in whatever dtype it says it is

    def shaped(self, shape: Shape) -> "Source":
        """What a cut to this shape will say of itself, before there is one: its files are still the source's."""
        layers = tuple(range(shape["num_hidden_layers"]))
        config = config_at(self.family, self.config, shape, layers=layers, dtype=self.dtype_name())
        return replace(self, config=config, shape=shape)

    def blocks(self) -> list[str]:
        """The paths of its layers."""
        return [self.family.block(layer) for layer in range(self.shape["num_hidden_layers"])]

    def origin(self) -> dict[str, Any]:
        """What shearling.json says of the folder, if Shearling made it. Raises UserError for a broken one."""
        path = self.folder / ORIGIN
        origin = read_json(path) if path.is_file() else {}
        if not isinstance(origin, dict):
            change = "get the model's folder again, or remove the file"
            raise UserError(f"file {path}", found=type(origin).__name__, expected="keys and values", change=change)
        return origin

    @cached_property
    def fingerprint(self) -> str:
        """Of config and weights. Reads every byte, once; among ranks `identify` comes before it."""
        return fingerprint(self.folder)

    def identify(self, ranks: Ranks) -> None:
        """Has every rank know the fingerprint, which the first alone finds: its sum goes through all bytes in order."""
        self.__dict__["fingerprint"] = ranks.told(lambda: self.fingerprint)

    def identity(self) -> dict[str, Any]:
        """What a stage that works on this model has of it in its identity."""
        own = {"family": digest(self.family)} if self.own_family else {}
        return {"model": self.fingerprint, **own}

    def seq_len(self, asked: int | None) -> int:
        """The window to read text in. Raises UserError for one that is `asked` for and that it has no positions for."""
        most = max_positions(self.family, self.config)
        if asked is not None and asked > most and self.family.learns_positions:
            expected = f"at most {most}, the positions that {self.name} has learned"
            raise UserError("seq_len", found=asked, expected=expected, change="choose a shorter --seq-len")
        return asked or min(2048, most)

    def save(
        self,
        folder: Path,
        *,
        shape: Shape,
        layers: tuple[int, ...],
        dtype: str | None,
        tensor: Callable[[Row, int | None], torch.Tensor],
        rotary: Sequence[int] | None = None,
        writes: bool = True,
    ) -> dict[str, Any]:
        """A model of this one's making as a model folder, in `dtype` or else the source's; gives its config.

        `layers` and `rotary` are the source's layers and entries of q and k that it has, `tensor` gives its rows. Other
        parts come along, byte for byte where no `dtype` is asked for. Of ranks that hold it together one `writes`.
        """
        name = self.dtype_name(dtype)
        chosen = getattr(torch, name)
        config = config_at(self.family, self.config, shape, layers=layers, dtype=name, rotary=rotary)
        if writes:
            self._carry(folder)  # first, so that the weights are held against the room that is left
        save_model(
            folder,
            family=self.family,
            config=config,
            shape=shape,
            dtype=chosen,
            tensor=tensor,
            beside=Beside(
                whole_config(self.family, self.checkpoint.config, config, shape),
                self.parts.carried,
                chosen if dtype else None,
            ),
            writes=writes,
        )
        return config

    def _carry(self, folder: Path) -> None:
        """Puts into a model's folder what goes along with the weights."""
        with room_for(folder, "tokenizer, templates and licences"):
            carry(self.folder, folder)
            if self.own_family:
                (folder / FILE).write_text(dump(self.family), encoding="utf-8")

    def check_store(self, store: Store) -> None:
        """Raises UserError unless the store's ids are this model's tokens, each with a row in the embedding."""
        tokenizer = load_tokenizer(self.folder)
        ids, rows = vocab_size(tokenizer), self.shape["vocab_size"]
        if ids > rows:
            raise UserError(
                f"tokenizer of {self.name}",
                found=f"ids up to {ids - 1}",
                expected=f"ids below {rows}, the rows of the embedding",
                change="take the tokenizer that belongs to the model, or resize the model's embeddings first",
            )
        store.check_tokenizer(tokenizer_fingerprint(tokenizer), self.name)


def _own_family(folder: Path, config: Mapping[str, Any], arch: str | None, like: Source | None) -> Family | None:
    """The family that comes with a model, if one does, and isn't looked up."""
    found = given(folder, arch)
    if found is None and like is not None and like.own_family and config.get("model_type") in like.family.model_types:
        return like.family
    return found


def write_origin(folder: Path, origin: Mapping[str, Any]) -> None:
    """shearling.json: where a model comes from, for teachers, references and reports."""
    with room_for(folder, ORIGIN):
        (folder / ORIGIN).write_text(json.dumps(origin, indent=1) + "\n", encoding="utf-8")


def figures(result: Any) -> dict[str, Any]:
    """What shearling.json keeps of a verb's result: all but where it is and that it was there."""
    kept = (field.name for field in fields(result) if field.name not in ("out", "done_before"))
    return {name: getattr(result, name) for name in kept}
