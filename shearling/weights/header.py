"""The safetensors header, read and checked to the last byte without loading anything. No torch.

A file is: the header's length (8 bytes, little-endian), the header (JSON), then the tensors back to back.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from shearling.errors import UserError

# safetensors' spelling: bytes an element, and torch's name for it.
DTYPES: Mapping[str, tuple[int, str]] = {
    "F64": (8, "float64"),
    "F32": (4, "float32"),
    "F16": (2, "float16"),
    "BF16": (2, "bfloat16"),
    "I64": (8, "int64"),
    "I32": (4, "int32"),
    "I16": (2, "int16"),
    "I8": (1, "int8"),
    "U8": (1, "uint8"),
    "BOOL": (1, "bool"),
}
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
# safetensors' own bound. Without one a broken length would have us ask for terabytes.
MAX_HEADER_BYTES = 100_000_000
MAX_AXES = 64
LFS_POINTER = b"version https://git-lfs"
AGAIN = "download this file again; its checksum is on the Hub's page of it"


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of a tensor: safetensors' dtype, shape, size, and the file and byte offset where it lies."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    shard: Path
    start: int


def read_header(shard: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file in the order they lie in it.

    Raises UserError, naming the file, unless the header is sound and the file has exactly the bytes that it promises.
    """
    try:
        with open(shard, "rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            header = _header_bytes(shard, file.read(len(LFS_POINTER)), file_bytes)
            file.seek(8)
            content = _parse(shard, file.read(header))
    except OSError as error:
        raise UserError(
            f"shard {shard}", found=error.strerror, expected="a file that can be read", change=AGAIN
        ) from error
    tensors = [(name, _info(shard, name, entry, 8 + header)) for name, entry in content.items()]
    # An empty tensor shares its start with the next one, so the size decides.
    tensors.sort(key=lambda item: (item[1].start, item[1].nbytes))
    _check_layout(shard, tensors, 8 + header, file_bytes)
    return dict(tensors)


def _header_bytes(shard: Path, first: bytes, file_bytes: int) -> int:
    if first == LFS_POINTER:
        raise UserError(
            f"shard {shard}",
            found="a git-lfs pointer in the place of the weights",
            expected="the weights themselves",
            change="run `git lfs pull` in the folder",
        )
    if file_bytes < 8:
        _refuse(shard, f"{file_bytes} bytes", "at least 8 bytes")
    length = int.from_bytes(first[:8], "little")
    if length > MAX_HEADER_BYTES:
        _refuse(shard, f"a header of {length} bytes", f"a header of at most {MAX_HEADER_BYTES} bytes")
    if 8 + length > file_bytes:
        _refuse(shard, f"{file_bytes} bytes", f"at least {8 + length} bytes, which the header alone takes")
    return length


def _parse(shard: Path, header: bytes) -> dict[str, Any]:
    try:
        content = json.loads(header.decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError:
        _refuse(shard, "a header nested too deeply", "a header of names, dtypes and shapes")
    except ValueError as error:  # bad UTF-8, bad JSON, a key that comes twice
        _refuse(shard, f"a broken header ({error})", "a header in JSON, each key once")
    if not isinstance(content, dict):
        _refuse(shard, f"a header that is a {type(content).__name__}", "an object of tensors")
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _refuse(shard, "metadata that isn't a map of strings", "a map of strings")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key comes twice")
    for key in content:
        key.encode()  # half a surrogate pair can't be written back, or even printed
    return content


def _info(shard: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        _refuse(shard, f"for tensor {name!r} {str(entry)[:80]}", "dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UserError(
            f"shard {shard}, tensor {name!r}",
            found=f"dtype {dtype!r:.40}",
            expected=f"one of {', '.join(DTYPES)}",
            change="if the model is quantised, get its plain weights; otherwise download this file again",
        )
    if not _are_counts(shape) or len(shape) > MAX_AXES or math.prod(size for size in shape if size) >= 2**63:
        _refuse(shard, f"for tensor {name!r} shape {str(shape)[:80]}", "a list of sizes")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _refuse(shard, f"for tensor {name!r} data_offsets {str(offsets)[:80]}", "a start and an end")
    nbytes = math.prod(shape) * DTYPES[dtype][0]
    if offsets[1] - offsets[0] != nbytes:
        _refuse(
            shard,
            f"for tensor {name!r} {offsets[1] - offsets[0]} bytes",
            f"{nbytes} bytes for {dtype} of shape {shape}",
        )
    return TensorInfo(dtype, tuple(shape), nbytes, shard, data_start + offsets[0])


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _check_layout(shard: Path, tensors: list[tuple[str, TensorInfo]], data_start: int, file_bytes: int) -> None:
    end = data_start
    for name, info in tensors:
        if info.start != end:
            fault = "overlaps the one before" if info.start < end else "leaves a gap before it"
            _refuse(shard, f"tensor {name!r} at byte {info.start}, which {fault}", f"its start at byte {end}")
        end += info.nbytes
    if end != file_bytes:
        _refuse(shard, f"{file_bytes} bytes", f"{end} bytes by its header")


def _refuse(shard: Path, found: str, expected: str) -> NoReturn:
    raise UserError(f"shard {shard}", found=found, expected=expected, change=AGAIN)
