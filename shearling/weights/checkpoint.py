"""A source model's weights: headers checked at once, each tensor read when it's asked for."""

import hashlib
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shearling.errors import UserError, nearest, raise_all
from shearling.weights.config import INDEX_FILE, adapter_only, read_config, read_json
from shearling.weights.header import AGAIN, DTYPES, FLOAT_DTYPES, TensorInfo, read_header

if TYPE_CHECKING:
    import torch

SINGLE_FILE = "model.safetensors"
PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
BLOCK_BYTES = 1 << 20
SHOWN_NAMES = 5


@dataclass(frozen=True)
class Checkpoint:
    """A model folder whose config and headers have been read and found sound; the payloads are still on disk."""

    folder: Path
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Reads the config and every shard's header; raises UserError for whatever `read_config` and they refuse."""
        folder = Path(folder)
        config = read_config(folder)
        if (folder / SINGLE_FILE).is_file():  # as transformers does, an index beside it isn't looked at
            return cls(folder, config, read_header(folder / SINGLE_FILE))
        if (folder / INDEX_FILE).is_file():
            return cls(folder, config, _read_sharded(folder))
        raise _no_weights(folder)

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors by shard, and within it as they lie on disk: the cheapest order to read them in."""
        return tuple(self.tensors)

    @property
    def shards(self) -> tuple[Path, ...]:
        """The weight files, sorted by name. A shard that holds no tensor isn't among them."""
        return tuple(sorted({info.shard for info in self.tensors.values()}))

    def only(self, names: Container[str]) -> "Checkpoint":
        """The same with these of its tensors alone."""
        return replace(self, tensors={name: info for name, info in self.tensors.items() if name in names})

    def float_bytes(self) -> dict[str, int]:
        """Bytes of the weights in each floating dtype, by safetensors' name for it."""
        nbytes: dict[str, int] = dict.fromkeys(FLOAT_DTYPES, 0)
        for info in self.tensors.values():
            if info.dtype in nbytes:
                nbytes[info.dtype] += info.nbytes
        return nbytes

    def info(self, name: str) -> TensorInfo:
        """What the header says of a tensor. Raises UserError for a name that isn't there."""
        if name not in self.tensors:
            raise UserError(
                f"model {self.folder}",
                found=f"no tensor {name!r}",
                expected="every tensor that the config calls for",
                change=nearest(name, self.names)
                if len(self.names) <= 50
                else "check that config and weights belong together",
            )
        return self.tensors[name]

    def read(self, name: str) -> "torch.Tensor":
        """One tensor, of the shape and dtype in its header, in memory of its own and no other memory taken.

        Raises UserError if the file has become shorter since it was opened.
        """
        import torch

        info = self.info(name)
        raw = torch.empty(info.nbytes, dtype=torch.uint8)
        with open(info.shard, "rb", buffering=0) as file:
            file.seek(info.start)
            view, filled = raw.numpy().data, 0
            while filled < info.nbytes:
                count = file.readinto(view[filled:])
                if not count:
                    raise UserError(
                        f"shard {info.shard}, tensor {name!r}",
                        found=f"{filled} bytes",
                        expected=f"{info.nbytes} bytes",
                        change=f"the file was cut short while in use; {AGAIN}",
                    )
                filled += count
        return raw.view(getattr(torch, DTYPES[info.dtype][1])).reshape(info.shape)

    def alike(self, name: str, other: str) -> bool:
        """Whether two tensors have one dtype, shape and payload. Holds no more than a block of each in memory."""
        one, two = self.info(name), self.info(other)
        if (one.dtype, one.shape) != (two.dtype, two.shape):
            return False
        with open(one.shard, "rb") as first, open(two.shard, "rb") as second:
            first.seek(one.start)
            second.seek(two.start)
            sizes = (min(BLOCK_BYTES, one.nbytes - at) for at in range(0, one.nbytes, BLOCK_BYTES))
            return all(first.read(size) == second.read(size) for size in sizes)


def check_finite(name: str, tensor: "torch.Tensor") -> None:
    """Raises UserError, with counts, if a floating tensor holds NaN or an infinity."""
    if not tensor.is_floating_point():
        return
    broken = tensor.numel() - int(tensor.isfinite().sum())
    if broken:
        nans = int(tensor.isnan().sum())
        raise UserError(
            f"tensor {name!r}",
            found=f"{nans} NaN and {broken - nans} Inf among {tensor.numel()} values",
            expected="finite weights",
            change="get the source model again: its weights are damaged, or its training had diverged",
        )


def check_dtype(config: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Raises UserError if the config names another dtype than most of the weights have, by bytes.

    A few tensors may differ (norms kept in F32), and a config that names none is content.
    """
    declared = config.get("dtype", config.get("torch_dtype"))
    if declared is None:
        return
    nbytes = checkpoint.float_bytes()
    most = max(nbytes.values())
    majority = [DTYPES[dtype][1] for dtype in FLOAT_DTYPES if most and nbytes[dtype] == most]
    if majority and str(declared).removeprefix("torch.") not in majority:
        raise UserError(
            f"model {checkpoint.folder}, field dtype",
            found=f"{declared} in config.json and {' and '.join(majority)} in the weights",
            expected="the same in both",
            change="pass --dtype to choose",
        )


def fingerprint(folder: Path) -> str:
    """sha256, in hex, of config.json and of every shard by name: its header, its size and its whole payload.

    Reads every byte. Raises UserError as `Checkpoint.open` does.
    """
    folder = Path(folder)
    digest = hashlib.sha256()
    for path in (folder / "config.json", *Checkpoint.open(folder).shards):
        # The size first, so that no byte can move from one file to the next unnoticed.
        digest.update(path.stat().st_size.to_bytes(8, "little"))
        with open(path, "rb") as file:
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()


def _read_sharded(folder: Path) -> dict[str, TensorInfo]:
    index = folder / INDEX_FILE
    shard_of = _weight_map(index)
    shards = sorted(set(shard_of.values()))
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise UserError(
            f"index {index}",
            found=f"no file {_some(missing)}",
            expected=f"all {len(shards)} shards that it names",
            change="download the missing shards",
        )
    tensors: dict[str, TensorInfo] = {}
    errors: list[UserError] = []
    unlisted: list[str] = []
    for shard in shards:
        try:
            header = read_header(folder / shard)
        except UserError as error:
            errors.append(error)
            continue
        unlisted += [f"{name} in {shard}" for name in header if shard_of.get(name) != shard]
        tensors |= {name: info for name, info in header.items() if shard_of.get(name) == shard}
    raise_all(errors)
    raise_all(_index_errors(index, [name for name in shard_of if name not in tensors], unlisted))
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    content = read_json(index, unique_keys=True)
    shard_of = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shard_of, dict) or not shard_of:
        raise UserError(f"index {index}", found="no weight_map", expected="tensors and their shards", change=AGAIN)
    for name, shard in shard_of.items():
        # A shard is a plain name: a path could lead anywhere on the disk.
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or set("/\\\0") & set(shard):
            raise UserError(
                f"index {index}, tensor {name!r}",
                found=f"shard {str(shard)[:80]!r}",
                expected="the name of a .safetensors file in the same folder",
                change="don't use this checkpoint unless you trust where it comes from",
            )
    return shard_of


def _index_errors(index: Path, absent: Sequence[str], unlisted: Sequence[str]) -> list[UserError]:
    errors = []
    if absent:
        errors.append(
            UserError(
                f"index {index}",
                found=f"tensors that no shard holds where it says: {_some(absent)}",
                expected="every tensor that it names",
                change="download index and shards again, from one revision",
            )
        )
    if unlisted:
        errors.append(
            UserError(
                f"index {index}",
                found=f"tensors that it doesn't name there: {_some(unlisted)}",
                expected="every tensor of the shards in the index",
                change="download index and shards again, from one revision",
            )
        )
    return errors


def _some(names: Sequence[str]) -> str:
    more = len(names) - SHOWN_NAMES
    return ", ".join(names[:SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")


def _no_weights(folder: Path) -> UserError:
    if (folder / "adapter_config.json").is_file():
        return adapter_only(folder)
    wanted = f"{SINGLE_FILE}, or {INDEX_FILE} and its shards"
    pickles = sorted(path.name for pattern in PICKLE_PATTERNS for path in folder.glob(pattern))
    if pickles:
        return UserError(
            f"model {folder}",
            found=f"pickle-only weights ({_some(pickles)}), which can run code and are never opened here",
            expected=wanted,
            change="convert them to safetensors with `model.save_pretrained(...)` in an environment you trust",
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    return UserError(
        f"model {folder}",
        found=f"{_some(others)} without an index" if others else "no weights",
        expected=wanted,
        change=f"download {INDEX_FILE} too" if others else "download the weights; for `inspect`, config.json is enough",
    )
