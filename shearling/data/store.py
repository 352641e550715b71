"""The token store: a flat stream of ids for each domain and split, document offsets, a manifest with sums.

manifest.json          format, version, tokenizer, counts, the sha256 of every file
DOMAIN/train.tokens    little-endian ids, one after the other
DOMAIN/train.offsets   little-endian uint64 [documents + 1]: where documents start, and the end
DOMAIN/train.loss      uint8 [tokens], only where the manifest lists it: 1 where a token's loss counts
DOMAIN/eval....        the same for the held-out documents
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from shearling.errors import UserError, nearest, raise_all

FORMAT, VERSION = "shearling-store", 1
MANIFEST = "manifest.json"
SPLITS = ("train", "eval")
AGAIN = "prepare the data again"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class SplitEntry(_Strict):
    """Counts of one split and the sha256 of each of its files; `skipped` documents held no text."""

    documents: PositiveInt
    tokens: PositiveInt
    text_bytes: NonNegativeInt
    skipped: NonNegativeInt
    files: dict[str, str]


class DomainEntry(_Strict):
    """The two splits of a domain."""

    train: SplitEntry
    eval: SplitEntry


class TokenizerEntry(_Strict):
    """The tokenizer that the ids belong to; the fingerprint decides, the name is for people."""

    fingerprint: str
    name: str


class Manifest(_Strict):
    """What manifest.json holds."""

    format: Literal["shearling-store"] = FORMAT
    version: Literal[1] = VERSION
    dtype: Literal["uint16", "uint32"]
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
        """Writes manifest.json into `folder`."""
        (folder / MANIFEST).write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")


def dtype_for(vocab_size: int) -> Literal["uint16", "uint32"]:
    """The narrowest dtype of the format that holds every id below `vocab_size`."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


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


class SplitWriter:
    """Writes one split's token stream and offsets, hashing as it goes; a context manager."""

    def __init__(self, folder: Path, *, domain: str, split: str, dtype: str):
        (folder / domain).mkdir(exist_ok=True)
        self.documents = self.tokens = self.text_bytes = self.skipped = 0
        self._dtype = np.dtype(dtype).newbyteorder("<")
        names = (f"{split}.tokens", f"{split}.offsets")
        self._files = {name: (open(folder / domain / name, "wb"), hashlib.sha256()) for name in names}  # noqa: SIM115 (__exit__ closes)
        self._tokens, self._offsets = names
        self._write(self._offsets, np.zeros(1, "<u8"))

    def __enter__(self) -> "SplitWriter":
        return self

    def __exit__(self, *_: object) -> None:
        for file, _sum in self._files.values():
            file.close()

    def add(self, ids: np.ndarray, *, text_bytes: int) -> None:
        """Appends one document: ids [tokens] of any integer dtype, and its text's length in UTF-8 bytes."""
        self.documents += 1
        self.tokens += len(ids)
        self.text_bytes += text_bytes
        self._write(self._tokens, ids.astype(self._dtype))
        self._write(self._offsets, np.array([self.tokens], "<u8"))

    def entry(self) -> SplitEntry:
        """This split's part of the manifest, once everything is added."""
        counts = {name: getattr(self, name) for name in ("documents", "tokens", "text_bytes", "skipped")}
        return SplitEntry(**counts, files={name: hashed.hexdigest() for name, (_, hashed) in self._files.items()})

    def _write(self, name: str, values: np.ndarray) -> None:
        file, hashed = self._files[name]
        raw = values.tobytes()
        file.write(raw)
        hashed.update(raw)


def span(index: int, seq_len: int) -> slice:
    """The tokens of window `index`: seq_len + 1 of them at stride seq_len, so that each is predicted once."""
    return slice(index * seq_len, index * seq_len + seq_len + 1)


class Store:
    """A token store on disk, read through memory maps. `Store.open` checks sizes, `verify` checks sums."""

    def __init__(self, folder: Path, manifest: Manifest):
        self.folder = folder
        self.domains: tuple[str, ...] = tuple(manifest.domains)
        self.dtype, self.vocab_size, self.eos_id = manifest.dtype, manifest.vocab_size, manifest.eos_id
        self.fingerprint = manifest.tokenizer.fingerprint
        self.manifest: dict[str, Any] = manifest.model_dump()
        self._entries = manifest.domains
        self._maps: dict[Path, np.ndarray] = {}

    def __reduce__(self):
        return Store.open, (self.folder,)  # a pickled memory map would carry the whole corpus to every worker

    @classmethod
    def open(cls, folder: Path) -> "Store":
        """Opens a store; UserError for a broken manifest, another version, or files whose sizes disagree with it."""
        folder = Path(folder)
        manifest = _read_manifest(folder / MANIFEST)
        errors = [name_error(name, where=str(folder / MANIFEST)) for name in manifest.domains]
        raise_all([error for error in errors if error])
        store = cls(folder, manifest)
        raise_all(store._size_errors())
        return store

    @property
    def digest(self) -> str:
        """The sha256 of the manifest, which holds every file's."""
        return hashlib.sha256((self.folder / MANIFEST).read_bytes()).hexdigest()

    def tokens(self, domain: str, split: str) -> np.ndarray:
        """The ids [tokens] of a split, memory-mapped, in the store's dtype."""
        return self._map(domain, f"{split}.tokens", self._entry(domain, split).tokens)

    def offsets(self, domain: str, split: str) -> np.ndarray:
        """Where documents start in the stream, and its end: uint64 [documents + 1], memory-mapped."""
        return self._map(domain, f"{split}.offsets", self._entry(domain, split).documents + 1)

    def loss_mask(self, domain: str, split: str) -> np.ndarray | None:
        """uint8 [tokens], 1 where a token's loss counts (index it with `span`); None where all of them count."""
        entry, name = self._entry(domain, split), f"{split}.loss"
        return self._map(domain, name, entry.tokens) if name in entry.files else None

    def text_bytes(self, domain: str, split: str) -> int:
        """UTF-8 bytes of the split's text, for losses in nats per byte."""
        return self._entry(domain, split).text_bytes

    def window_count(self, domain: str, split: str, seq_len: int) -> int:
        """Whole windows of seq_len + 1 tokens at stride seq_len; what is left at the end is no window."""
        assert seq_len >= 1
        return (self._entry(domain, split).tokens - 1) // seq_len

    def window(self, domain: str, split: str, index: int, seq_len: int) -> np.ndarray:
        """The ids of one window, int64 [seq_len + 1]."""
        assert 0 <= index < self.window_count(domain, split, seq_len)
        return self.tokens(domain, split)[span(index, seq_len)].astype(np.int64)

    def check_tokenizer(self, fingerprint: str, what: str) -> None:
        """Raises UserError unless the store was made with the tokenizer of that fingerprint, which is `what`'s."""
        if fingerprint != self.fingerprint:
            made_with = f"{self.manifest['tokenizer']['name']!r} ({self.fingerprint[:12]})"
            raise UserError(
                f"token store {self.folder}",
                found=f"tokens made with the tokenizer {made_with}",
                expected=f"the tokenizer of {what} ({fingerprint[:12]})",
                change=f"{AGAIN} with that tokenizer",
            )

    def verify(self) -> None:
        """Reads every file; UserError naming all whose sha256 isn't the manifest's."""
        errors = []
        for domain, _split, entry in self._splits():
            for name, expected in entry.files.items():
                with open(self.folder / domain / name, "rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
                if found != expected:
                    what = str(self.folder / domain / name)
                    errors.append(UserError(what, found=f"sha256 {found}", expected=expected, change=AGAIN))
        raise_all(errors)

    def _entry(self, domain: str, split: str) -> SplitEntry:
        assert split in SPLITS
        if domain not in self._entries:
            hint = nearest(domain, self.domains)
            raise UserError("domain", found=repr(domain), expected=f"one of {self.folder}", change=hint)
        return getattr(self._entries[domain], split)

    def _splits(self):
        return [(domain, split, self._entry(domain, split)) for domain in self.domains for split in SPLITS]

    def _dtype_of(self, name: str) -> np.dtype:
        return np.dtype({"tokens": self.dtype, "offsets": "u8", "loss": "u1"}[name.partition(".")[2]]).newbyteorder("<")

    def _map(self, domain: str, name: str, length: int) -> np.ndarray:
        path = self.folder / domain / name
        if path not in self._maps:
            self._maps[path] = np.memmap(path, dtype=self._dtype_of(name), mode="r", shape=(length,))
        return self._maps[path]

    def _size_errors(self) -> list[UserError]:
        errors = []
        for domain, split, entry in self._splits():
            lengths = {f"{split}.tokens": entry.tokens, f"{split}.offsets": entry.documents + 1}
            optional = {f"{split}.loss": entry.tokens}
            if not lengths.keys() <= entry.files.keys() <= (lengths | optional).keys():
                found, known = ", ".join(entry.files), ", ".join(lengths)
                what = f"{self.folder / MANIFEST}, domain {domain!r}, {split}"
                errors.append(UserError(what, found=f"the files {found}", expected=known, change=AGAIN))
                continue
            for name in entry.files:
                path, size = self.folder / domain / name, (lengths | optional)[name] * self._dtype_of(name).itemsize
                found = f"{path.stat().st_size} bytes" if path.is_file() else "no such file"
                if found != f"{size} bytes":
                    errors.append(UserError(str(path), found=found, expected=f"{size} bytes", change=AGAIN))
        return errors


def _read_manifest(path: Path) -> Manifest:
    change = f"{AGAIN}, or point at a token store"
    try:
        raw = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(str(path), found="no such file", expected="a token store", change=change) from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(str(path), found=f"broken JSON ({error})", expected="a manifest", change=change) from error
    found = (raw.get("format"), raw.get("version")) if isinstance(raw, dict) else (type(raw).__name__, None)
    if found != (FORMAT, VERSION):
        expected = f"{FORMAT} version {VERSION}"
        raise UserError(str(path), found=f"{found[0]} version {found[1]}", expected=expected, change=change)
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise UserError(str(path), found=faults, expected="a manifest as prepared", change=AGAIN) from error
