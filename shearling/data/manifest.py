"""manifest.json: what a token store holds, shard by shard, and the sha256 of every file."""

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from shearling.errors import UserError, raise_all

FORMAT, VERSION = "shearling-store", 2
MANIFEST = "manifest.json"
SPLITS = ("train", "eval")
AGAIN = "prepare the data again"
KINDS = {"tokens", "offsets", "loss"}

Dtype = Literal["uint16", "uint32"]


class Strict(BaseModel):
    """No unknown keys, no conversions."""

    model_config = ConfigDict(extra="forbid", strict=True)


class ShardEntry(Strict):
    """One shard of a split: its counts, and the sha256 of its files NAME.tokens, NAME.offsets and maybe NAME.loss."""

    name: Annotated[str, Field(pattern=r"^(train|eval)-[0-9]{5,}$")]
    documents: PositiveInt
    tokens: PositiveInt
    text_bytes: NonNegativeInt
    sums: dict[str, str]

    @model_validator(mode="after")
    def _whole(self) -> "ShardEntry":
        if not KINDS - {"loss"} <= self.sums.keys() <= KINDS:
            raise ValueError("sums must be of tokens, offsets and at most loss")
        return self

    @property
    def number(self) -> int:
        """Where in its domain the shard was made, from 0."""
        return int(self.name.partition("-")[2])

    def sizes(self, dtype: Dtype) -> dict[str, int]:
        """The bytes of each of its files, by file name."""
        lengths = {"tokens": self.tokens, "offsets": self.documents + 1, "loss": self.tokens}
        return {f"{self.name}.{kind}": lengths[kind] * dtype_of(kind, dtype).itemsize for kind in self.sums}


class SplitEntry(Strict):
    """The shards of one split in the order of its stream; `skipped` documents had no text, `broken` records none."""

    shards: Annotated[list[ShardEntry], Field(min_length=1)]
    skipped: NonNegativeInt
    broken: NonNegativeInt = 0

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def text_bytes(self) -> int:
        return sum(shard.text_bytes for shard in self.shards)


class DomainEntry(Strict):
    """The two splits of a domain, and a fingerprint of every file that its documents came from."""

    train: SplitEntry
    eval: SplitEntry
    sources: list[str]

    @property
    def shards(self) -> list[ShardEntry]:
        """Of both splits."""
        return [*self.train.shards, *self.eval.shards]


class TokenizerEntry(Strict):
    """The tokenizer that the ids belong to: the fingerprint decides, `source` is the model as it was given."""

    fingerprint: str
    source: str

    @property
    def name(self) -> str:
        """For people."""
        return Path(self.source).name


class Manifest(Strict):
    """What manifest.json holds."""

    format: Literal["shearling-store"] = FORMAT
    version: Literal[2] = VERSION
    dtype: Dtype
    vocab_size: PositiveInt
    eos_id: NonNegativeInt
    tokenizer: TokenizerEntry
    seed: int
    held_out: float
    domains: dict[str, DomainEntry] = Field(min_length=1)

    @model_validator(mode="after")
    def _ids_fit(self) -> "Manifest":
        if self.vocab_size > np.iinfo(self.dtype).max + 1 or self.eos_id >= self.vocab_size:
            raise ValueError("eos_id must be below vocab_size, and vocab_size within dtype")
        return self

    def write(self, folder: Path) -> None:
        """Writes manifest.json into `folder`; one that is there is replaced by one rename."""
        new = folder / f"{MANIFEST}.new"
        with open(new, "w", encoding="utf-8") as file:
            file.write(self.model_dump_json(indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, folder / MANIFEST)


def dtype_for(vocab_size: int) -> Dtype:
    """The narrowest dtype of the format that holds every id below `vocab_size`."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def dtype_of(kind: str, ids: Dtype) -> np.dtype:
    """The dtype of one kind of file, in a store whose ids are of dtype `ids`."""
    return np.dtype({"tokens": ids, "offsets": "u8", "loss": "u1"}[kind]).newbyteorder("<")


def name_error(name: str, *, where: str) -> UserError | None:
    """What keeps `name` from naming a domain, which is also a folder of the store; None if nothing does."""
    escapes = name.startswith(".") or ".." in name or "/" in name or "\\" in name
    if name and not escapes and name != MANIFEST and name.isprintable():
        return None
    return UserError(
        where,
        found=f"the domain name {name!r}",
        expected="a printable name without slashes or '..' that doesn't start with a dot",
        change="rename it",
    )


def parse_manifest(raw: bytes, *, where: str) -> Manifest:
    """The manifest in the bytes of `where`. Raises UserError for what is none, or is of another version."""
    change = f"{AGAIN}, or point at a token store"
    try:
        values: Any = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise UserError(where, found=f"broken JSON ({error})", expected="a manifest", change=change) from error
    is_object = isinstance(values, dict)
    found = (values.get("format"), values.get("version")) if is_object else (type(values).__name__, None)
    if found != (FORMAT, VERSION):
        expected = f"{FORMAT} version {VERSION}"
        raise UserError(where, found=f"{found[0]} version {found[1]}", expected=expected, change=change)
    try:
        manifest = Manifest.model_validate(values)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise UserError(where, found=faults, expected="a manifest as prepared", change=AGAIN) from error
    errors = [name_error(name, where=where) for name in manifest.domains]
    raise_all([error for error in errors if error])
    return manifest
