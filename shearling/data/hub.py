"""Datasets of Hugging Face's `datasets`: by name and streamed, or a folder that `save_to_disk` wrote.

Spelled `hf-dataset:NAME[:CONFIG][:SPLIT]`, with NAME an id on the Hub or a folder: `hf-dataset:owner/name`,
`hf-dataset:owner/name:en`, `hf-dataset:owner/name::validation`. The split left out is train. No code of a dataset is
ever run: `datasets` 4 can't any more. Memory is bounded by what `datasets` reads at once, a few batches of rows.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from shearling.data.document import Document, Reading, check_column, of_fields
from shearling.data.files import chunks, is_remote, join, look, name, shown, without_secrets
from shearling.errors import UserError

PREFIX = "hf-dataset:"
SPEC = re.compile(r"(?P<name>([a-z0-9+.-]+://)?[^:]+)(:(?P<config>[^:]*))?(:(?P<split>[^:]+))?", re.IGNORECASE)
PART_BYTES = 1 << 25


def is_dataset(path: str) -> bool:
    """Whether it is spelled as a dataset."""
    return path.startswith(PREFIX)


def folder_of(path: str) -> str | None:
    """The folder of a dataset that `save_to_disk` wrote; None for one by name."""
    dataset, _, _ = _spec(path)
    return dataset if _is_folder(dataset) else None


def domain_name(path: str) -> str:
    """The last part of the dataset's name, and its configuration."""
    dataset, config, _ = _spec(path)
    last = name(dataset) if _is_folder(dataset) else dataset.rpartition("/")[2]
    return f"{last}-{config}" if config else last


def saved_splits(folder: str) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """The train and eval splits, spelled as datasets, of what `save_to_disk` wrote; None for any other folder.

    Of several splits only train and eval count. Raises UserError if none of them is train.
    """
    if look(index := join(folder, "dataset_dict.json")):
        splits = json.loads(b"".join(chunks(index)))["splits"]
        if "train" not in splits:
            raise _no_split(folder, "train", splits)
        return (f"{PREFIX}{folder}::train",), (f"{PREFIX}{folder}::eval",) * ("eval" in splits)
    if look(join(folder, "state.json")) and look(join(folder, "dataset_info.json")):
        return (f"{PREFIX}{folder}",), ()
    return None


def ranges(path: str, *, reading: Reading) -> list[tuple[int, int | None]]:
    """Each shard of a streamed dataset; ranges of rows, of some PART_BYTES bytes, of a saved one."""
    dataset = _load(path)
    _check(dataset, path=path, reading=reading)
    if _is_streamed(dataset):
        return [(shard, shard + 1) for shard in range(dataset.num_shards)]
    rows = max(1, len(dataset) * PART_BYTES // max(dataset.data.nbytes, 1))
    return [(start, min(start + rows, len(dataset))) for start in range(0, len(dataset), rows)]


def documents(path: str, *, start: int, end: int | None, reading: Reading) -> Iterator[Document | UserError]:
    """The documents of the shards or rows `start` to `end`; UserErrors for rows that hold none.

    Raises UserError for a dataset, configuration or split that isn't there or can't be read.
    """
    dataset = _load(path)
    _check(dataset, path=path, reading=reading)
    if dataset.column_names:  # so that images and the like beside it aren't decoded
        dataset = dataset.select_columns([reading.column])
    if not _is_streamed(dataset):
        last = len(dataset) if end is None else end
        yield from _documents(dataset.select(range(start, last)), path, where=path, first=start, reading=reading)
        return
    for shard in range(start, dataset.num_shards if end is None else end):
        rows = dataset.shard(num_shards=dataset.num_shards, index=shard)
        yield from _documents(rows, path, where=f"{path}, shard {shard}", first=0, reading=reading)


def _documents(
    rows: Iterable[Mapping[str, Any]], path: str, *, where: str, first: int, reading: Reading
) -> Iterator[Document | UserError]:
    iterator = iter(rows)
    row = first
    while True:
        with _trouble(path):
            fields = next(iterator, None)
        if fields is None:
            return
        row += 1
        try:
            yield of_fields(fields, where=f"{shown(where)}, row {row}", reading=reading)
        except UserError as error:
            yield error


def _spec(path: str) -> tuple[str, str | None, str | None]:
    match = SPEC.fullmatch(path.removeprefix(PREFIX))
    if not match:
        raise UserError(
            path,
            found="no name of a dataset",
            expected=f"{PREFIX}NAME[:CONFIG][:SPLIT]",
            change=f"name it, as in {PREFIX}owner/name:en:train, or {PREFIX}owner/name::train",
        )
    return match["name"], match["config"] or None, match["split"]


def _is_folder(dataset: str) -> bool:
    return is_remote(dataset) or look(dataset) == "folder"


# Every part of a dataset would look it up anew, on the Hub too.
@lru_cache(maxsize=8)
def _load(path: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            path,
            found="no `datasets` to read it with",
            expected="the extra 'datasets'",
            change="pip install 'shearling[datasets]'",
        ) from error
    dataset, config, split = _spec(path)
    datasets.disable_progress_bars()
    with _trouble(path):
        if not (_is_folder(dataset) and saved_splits(dataset)):
            return datasets.load_dataset(dataset, config, split=split or "train", streaming=True)
        saved = datasets.load_from_disk(dataset)
    if not isinstance(saved, Mapping):
        return saved
    if (split or "train") not in saved:
        raise _no_split(path, split or "train", [str(name) for name in saved])
    return saved[split or "train"]


def _is_streamed(dataset: Any) -> bool:
    from datasets import IterableDataset

    return isinstance(dataset, IterableDataset)


def _check(dataset: Any, *, path: str, reading: Reading) -> None:
    if dataset.column_names:  # a stream may not know before it is read
        check_column(dataset.column_names, where=path, reading=reading)


def _no_split(path: str, split: str, splits: list[str]) -> UserError:
    found = f"no split {split!r} among {', '.join(splits)}"
    return UserError(path, found=found, expected="a split that it has", change=f"name one, as in {PREFIX}NAME::SPLIT")


@contextmanager
def _trouble(path: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # datasets raises classes of many libraries
        found = f"{type(error).__name__}: {without_secrets(str(error)).partition(chr(10))[0]}"
        raise UserError(
            shown(path),
            found=found,
            expected="a dataset that `datasets` opens",
            change="check its name, configuration and split, your access and the network",
        ) from error
