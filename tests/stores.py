"""Stores made by hand, and what is told of a mistake."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from shearling.data.manifest import DomainEntry, Manifest, SplitEntry, TokenizerEntry, dtype_for
from shearling.data.shard import ShardWriter
from shearling.data.store import Store
from shearling.data.tokenise import Encoder, Pipeline
from shearling.errors import UserError

Shards = Sequence[Sequence[Sequence[int]]]  # of documents of ids


def ten(ids: Sequence[int]) -> int:
    """As many bytes of text for any document."""
    return 10


def write_split(folder: Path, split: str, shards: Shards, *, dtype="uint16", losses=None, bytes_of=ten) -> SplitEntry:
    folder.mkdir(exist_ok=True, parents=True)
    entries = []
    for number, documents in enumerate(shards):
        with ShardWriter(folder, f"{split}-{number:05}", dtype=dtype) as writer:
            for index, ids in enumerate(documents):
                loss = losses.get((number, index)) if losses else None
                writer.add(np.array(ids), text_bytes=bytes_of(ids), loss=None if loss is None else np.array(loss, "u1"))
            entries.append(writer.finish())
    return SplitEntry(shards=entries, skipped=0)


def write_store(
    folder: Path, domains: Mapping[str, Mapping[str, Shards]], *, vocab_size=300, losses=None, bytes_of=ten
) -> Path:
    dtype = dtype_for(vocab_size)
    entries = {
        domain: DomainEntry(
            **{
                s: write_split(folder / domain, s, shards, dtype=dtype, losses=losses, bytes_of=bytes_of)
                for s, shards in splits.items()
            },
            sources=["0" * 16],
        )
        for domain, splits in domains.items()
    }
    tokenizer = TokenizerEntry(fingerprint="f" * 64, source="models/tiny")
    Manifest(
        dtype=dtype, vocab_size=vocab_size, eos_id=0, tokenizer=tokenizer, seed=0, held_out=0.01, domains=entries
    ).write(folder)
    return folder


def encoder_of(tokenizer, folder: Path) -> Encoder:
    """An encoder with a tokenizer that is loaded already."""
    encoder = Encoder(Pipeline.of(tokenizer, folder=folder))
    encoder.tokenizer = tokenizer
    return encoder


def documents(store: Store, domain: str, split: str) -> list[list[int]]:
    """The ids of each document, read back."""
    ids = store.slice(domain, split)
    return [ids[start:end].tolist() for start, end in pairwise(store.offsets(domain, split).tolist())]


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def message(function, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    return str(caught.value)
