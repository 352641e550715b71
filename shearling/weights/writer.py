"""Writes safetensors tensor by tensor, so that a model of any size takes the memory of its largest tensor."""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shearling.errors import FULL_DISK, UserError
from shearling.weights.checkpoint import SINGLE_FILE
from shearling.weights.config import INDEX_FILE
from shearling.weights.header import DTYPES

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 5_000_000_000


class DiskFull(UserError):
    """No room for what was to be written: whoever has it written may know better what that is."""


@dataclass(frozen=True)
class Entry:
    """A tensor to write: its name, safetensors' dtype ("F32", "BF16", ...) and its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * DTYPES[self.dtype][0]


def write(
    folder: Path,
    entries: Sequence[Entry],
    produce: Callable[[str], "torch.Tensor"],
    *,
    shard_bytes: int = SHARD_BYTES,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes model.safetensors, or numbered shards and their index, and fsyncs them; never over a file that exists.

    Shards are filled in the entries' order up to `shard_bytes` of tensors each; a larger tensor gets one of its own.
    `produce(name)` is called once a tensor, shard by shard, within a shard the widest dtypes first, and gives the dtype
    and shape of the entry. `metadata` defaults to {"format": "pt"}, which transformers asks for. Raises DiskFull, with
    the bytes needed, where the disk is too full; what was written until then is left for the stage to discard.
    """
    assert len({entry.name for entry in entries}) == len(entries), "a tensor can't be written twice"
    total = sum(entry.nbytes for entry in entries)
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if total > free:
        raise _disk_full(folder, f"{total} bytes of weights", f"{free} bytes free")
    shards = _plan(entries, shard_bytes)
    names = [SINGLE_FILE]
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    try:
        for name, shard in zip(names, shards, strict=True):
            _write_shard(folder / name, shard, produce, metadata or {"format": "pt"})
        if len(shards) > 1:
            shard_of = {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard}
            _write_index(folder / INDEX_FILE, shard_of, total)
        _sync_folder(folder)
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        found = f"{error.strerror} ({free} bytes free at the start)"
        raise _disk_full(folder, f"{total} bytes of weights", found) from error


@contextmanager
def room_for(folder: Path, what: str) -> Iterator[None]:
    """Where `what` goes into a model's folder beside the weights. Raises DiskFull if the disk is too full for it."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        raise _disk_full(folder, what, error.strerror) from error


def in_order(entries: Sequence[Entry], *, shard_bytes: int = SHARD_BYTES) -> list[Entry]:
    """The order in which `write` asks for them."""
    return [entry for shard in _plan(entries, shard_bytes) for entry in shard]


def _plan(entries: Sequence[Entry], shard_bytes: int) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        if shards[-1] and filled + entry.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.nbytes
    # Widest first keeps every tensor aligned to its element, without which torch can't view it in a mapped file.
    return [sorted(shard, key=lambda entry: -DTYPES[entry.dtype][0]) for shard in shards]


def _write_shard(
    path: Path, entries: Sequence[Entry], produce: Callable[[str], "torch.Tensor"], metadata: Mapping[str, str]
) -> None:
    with open(path, "xb", buffering=0) as file:
        _write_all(file, _header(entries, metadata))
        for entry in entries:
            _write_all(file, _payload(entry, produce(entry.name)))
        os.fsync(file.fileno())


def _header(entries: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    content: dict[str, object] = {"__metadata__": dict(metadata)}
    start = 0
    for entry in entries:
        end = start + entry.nbytes
        content[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [start, end]}
        start = end
    header = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def _payload(entry: Entry, tensor: "torch.Tensor") -> memoryview:
    import torch

    dtype = getattr(torch, DTYPES[entry.dtype][1])
    assert tensor.dtype == dtype, f"{entry.name}: {tensor.dtype}, and not {dtype}"
    assert tuple(tensor.shape) == entry.shape, f"{entry.name}: {tuple(tensor.shape)}, and not {entry.shape}"
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _write_all(file, content: bytes | memoryview) -> None:
    # One write takes 2 GiB at most, whatever it's given.
    rest = memoryview(content)
    while len(rest):
        rest = rest[file.write(rest) :]


def _write_index(path: Path, shard_of: Mapping[str, str], total_bytes: int) -> None:
    content = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(shard_of.items()))}
    with open(path, "x", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _disk_full(folder: Path, what: str, found: str | None) -> DiskFull:
    return DiskFull(
        f"output folder {folder}",
        found=found,
        expected=f"room for {what}",
        change="free space on this disk or choose an --out on another",
    )
