"""The token store: a flat stream of ids for each domain and split, cut into shards, and a manifest with sums.

manifest.json                format, version, tokenizer, the shards with their counts, the sha256 of every file
DOMAIN/train-00000.tokens    little-endian ids, one after the other
DOMAIN/train-00000.offsets   little-endian uint64 [documents + 1]: where the shard's documents start, and its end
DOMAIN/train-00000.loss      uint8 [tokens], only where the manifest lists it: 1 where a token's loss counts
DOMAIN/eval-00000....        the same for held-out documents

A split's stream is its shards' streams in the manifest's order. Documents never cross shards, windows do.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import numpy as np

from shearling.data.manifest import (
    AGAIN,
    MANIFEST,
    SPLITS,
    Dtype,
    Manifest,
    ShardEntry,
    SplitEntry,
    dtype_of,
    parse_manifest,
)
from shearling.data.manifest import name_error as name_error
from shearling.data.store_files import Files, files_at
from shearling.errors import UserError, nearest, raise_all


def span(index: int, seq_len: int) -> slice:
    """The tokens of window `index`: seq_len + 1 of them at stride seq_len, so that each is predicted once."""
    return slice(index * seq_len, index * seq_len + seq_len + 1)


class Store:
    """A token store, on this machine or at an address of fsspec's, for any number of threads.

    `Store.open` checks sizes, `verify` checks sums. `digest` is the sha256 of the manifest, which holds every file's.
    """

    def __init__(self, folder: Path | str, files: Files, manifest: Manifest, *, digest: str):
        self.folder, self.manifest, self.digest = folder, manifest, digest
        self.domains: tuple[str, ...] = tuple(manifest.domains)
        self.dtype: Dtype = manifest.dtype
        self.vocab_size, self.eos_id = manifest.vocab_size, manifest.eos_id
        self.fingerprint = manifest.tokenizer.fingerprint
        self._files = files
        self._offsets: dict[tuple[str, str], np.ndarray] = {}
        self._starts = {
            (domain, split): list(accumulate((shard.tokens for shard in entry.shards), initial=0))
            for domain, split, entry in self._splits()
        }

    @classmethod
    def open(cls, folder: Path | str) -> "Store":
        """Opens a store; UserError for a broken manifest, another version, or files whose sizes disagree with it."""
        files = files_at(folder)
        where = files.address(MANIFEST)
        try:
            raw = files.read(MANIFEST)
        except FileNotFoundError as error:
            change = f"{AGAIN}, or point at a token store"
            raise UserError(where, found="no such file", expected="a token store", change=change) from error
        manifest = parse_manifest(raw, where=where)
        store = cls(folder, files, manifest, digest=hashlib.sha256(raw).hexdigest())
        raise_all(store._size_errors())
        return store

    def num_tokens(self, domain: str, split: str) -> int:
        """The length of a split's stream."""
        self._entry(domain, split)
        return self._starts[domain, split][-1]

    def num_documents(self, domain: str, split: str) -> int:
        """The documents of a split, those without text left out."""
        return self._entry(domain, split).documents

    def text_bytes(self, domain: str, split: str) -> int:
        """UTF-8 bytes of the split's text, for losses in nats per byte."""
        return self._entry(domain, split).text_bytes

    def slice(self, domain: str, split: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The ids `start` to `stop` of a split's stream, in the store's dtype; a view where one shard has them."""
        places = self._at(domain, split, start, stop)
        found = [self._values(domain, shard, "tokens", first, last) for shard, first, last in places]
        return _joined(found) if found else np.empty(0, dtype_of("tokens", self.dtype))

    def loss_mask(self, domain: str, split: str, start: int = 0, stop: int | None = None) -> np.ndarray | None:
        """For the ids that `slice` gives: uint8, 1 where a token's loss counts; None where all of the split's do."""
        if not any("loss" in shard.sums for shard in self._entry(domain, split).shards):
            return None
        found = [
            self._values(domain, shard, "loss", first, last) if "loss" in shard.sums else np.ones(last - first, "u1")
            for shard, first, last in self._at(domain, split, start, stop)
        ]
        return _joined(found) if found else np.empty(0, "u1")

    def offsets(self, domain: str, split: str) -> np.ndarray:
        """Where documents start in the split's stream, and its end: uint64 [documents + 1], in memory from then on."""
        shards = self._entry(domain, split).shards
        if (domain, split) not in self._offsets:
            self._offsets[domain, split] = self._read_offsets(domain, shards, self._starts[domain, split])
        return self._offsets[domain, split]

    def _read_offsets(self, domain: str, shards: list[ShardEntry], starts: list[int]) -> np.ndarray:
        found = [
            self._values(domain, shard, "offsets", 0, shard.documents) + np.uint64(start)
            for shard, start in zip(shards, starts, strict=False)
        ]
        return _joined([*found, np.array([starts[-1]], np.uint64)])

    def window_count(self, domain: str, split: str, seq_len: int) -> int:
        """Whole windows of seq_len + 1 tokens at stride seq_len; what is left at the end is no window."""
        assert seq_len >= 1
        return (self.num_tokens(domain, split) - 1) // seq_len

    def window(self, domain: str, split: str, index: int, seq_len: int) -> np.ndarray:
        """The ids of one window, int64 [seq_len + 1]."""
        assert 0 <= index < self.window_count(domain, split, seq_len)
        place = span(index, seq_len)
        return self.slice(domain, split, place.start, place.stop).astype(np.int64)

    def check_tokenizer(self, fingerprint: str, what: str) -> None:
        """Raises UserError unless the store was made with the tokenizer of that fingerprint, which is `what`'s."""
        if fingerprint != self.fingerprint:
            made_with = f"{self.manifest.tokenizer.name!r} ({self.fingerprint[:12]})"
            raise UserError(
                f"token store {self.folder}",
                found=f"tokens made with the tokenizer {made_with}",
                expected=f"the tokenizer of {what} ({fingerprint[:12]})",
                change=f"{AGAIN} with that tokenizer",
            )

    def verify(self, *, rank: int = 0, ranks: int = 1) -> int:
        """Reads every file and gives their number; UserError naming all whose sha256 isn't the manifest's.

        Of several `ranks` one reads its share of the files.
        """
        sums = [
            (f"{domain}/{shard.name}.{kind}", expected)
            for domain, _split, entry in self._splits()
            for shard in entry.shards
            for kind, expected in shard.sums.items()
        ]
        errors, mine = [], sums[rank::ranks]
        for name, expected in mine:
            if (found := self._files.digest(name)) != expected:
                what = self._files.address(name)
                errors.append(UserError(what, found=f"sha256 {found}", expected=expected, change=AGAIN))
        raise_all(errors)
        return len(mine)

    def _entry(self, domain: str, split: str) -> SplitEntry:
        assert split in SPLITS
        if domain not in self.manifest.domains:
            hint = nearest(domain, self.domains)
            raise UserError("domain", found=repr(domain), expected=f"one of {self.folder}", change=hint)
        return getattr(self.manifest.domains[domain], split)

    def _splits(self) -> Iterator[tuple[str, str, SplitEntry]]:
        return ((domain, split, self._entry(domain, split)) for domain in self.domains for split in SPLITS)

    def _at(self, domain: str, split: str, start: int, stop: int | None) -> Iterator[tuple[ShardEntry, int, int]]:
        """The shards that hold the ids `start` to `stop` of the stream, each with the place in its own."""
        shards, starts = self._entry(domain, split).shards, self._starts[domain, split]
        stop = starts[-1] if stop is None else stop
        assert 0 <= start <= stop <= starts[-1]
        number = max(0, bisect_right(starts, start) - 1)
        while number < len(shards) and starts[number] < stop:
            yield shards[number], max(start - starts[number], 0), min(stop, starts[number + 1]) - starts[number]
            number += 1

    def _values(self, domain: str, shard: ShardEntry, kind: str, start: int, stop: int) -> np.ndarray:
        return self._files.array(f"{domain}/{shard.name}.{kind}", dtype_of(kind, self.dtype), start, stop)

    def _size_errors(self) -> list[UserError]:
        errors = []
        for domain, entry in self.manifest.domains.items():
            there = self._files.sizes(domain)
            for name, size in (item for shard in entry.shards for item in shard.sizes(self.dtype).items()):
                found = f"{there[name]} bytes" if name in there else "no such file"
                if there.get(name) != size:
                    what = self._files.address(f"{domain}/{name}")
                    errors.append(UserError(what, found=found, expected=f"{size} bytes", change=AGAIN))
        return errors


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
