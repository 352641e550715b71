"""Inputs gathered into domains: files and folders here and in object stores, datasets by name."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from shearling.data import hub, mds
from shearling.data.document import Reading, some
from shearling.data.files import Kind, children, is_remote, join, look, name, place, shown, stem, suffix
from shearling.data.store import name_error
from shearling.errors import UserError, raise_all

# Only data files name splits: `train.py` in a folder of code is a document like any other.
SPLIT_SUFFIXES = (".jsonl", ".ndjson", ".json", ".txt", ".parquet", ".bin")
SPLIT_NAME = re.compile(r"(train|eval)([-_.0-9].*)?")


@dataclass(frozen=True)
class Input:
    """A file, folder or dataset whose documents are to be read in a way of their own."""

    path: str
    reading: Reading


@dataclass(frozen=True)
class Domain:
    """A domain's sources by split, as paths, URLs or names; an empty `eval` means that some of `train` is held out.

    `reading` is its own way of being read, if its input has one.
    """

    name: str
    path: str
    train: tuple[str, ...]
    eval: tuple[str, ...] = ()
    reading: Reading | None = None


def find_domains(inputs: Sequence[str | Path | Input]) -> tuple[Domain, ...]:
    """The domains of files, folders and datasets, in the order given, a folder's in alphabetical order.

    A file is a domain named after its stem. A folder is one domain, or one for each of its folders when it has some.
    Inside a domain, data files named train*/eval* or folders train/ and eval/ are its splits. Hidden files are skipped.
    URLs that fsspec opens (s3://, gs://, hf://, memory:// ...) are files and folders too. `hf-dataset:NAME` is a
    domain (`hub.py`), and so is a folder that holds one dataset: MDS, or what `save_to_disk` of datasets wrote. A
    Megatron pair counts as its .bin, and may be named without the suffix.
    Raises UserError for a path that isn't there, an empty domain, loose files beside domains or splits, a domain name
    that can't name a folder, and a name that two inputs share.
    """
    if not inputs:
        raise UserError("inputs", found="none", expected="files or folders of documents", change="name at least one")
    found, errors = [], []
    for given in inputs:
        path, reading = (given.path, given.reading) if isinstance(given, Input) else (given, None)
        try:
            found += [replace(domain, reading=reading) for domain in _domains_of(place(path))]
        except UserError as error:
            errors.append(error)
    seen: dict[str, str] = {}
    for domain in found:
        if error := name_error(domain.name, where=shown(domain.path)):
            errors.append(error)
        if domain.name in seen:
            errors.append(
                UserError(
                    f"domain {domain.name!r}",
                    found=f"two inputs of that name, {shown(seen[domain.name])} and {shown(domain.path)}",
                    expected="one input for each domain",
                    change="rename one, or put both into one folder",
                )
            )
        seen.setdefault(domain.name, domain.path)
    raise_all(errors)
    return tuple(found)


def _domains_of(path: str) -> list[Domain]:
    if hub.is_dataset(path):
        return [Domain(hub.domain_name(path), path, (path,))]
    kind = look(path)
    if kind is None or suffix(path) == ".idx":
        path, kind = _megatron_pair(path), "file"
    if kind != "folder":
        return [Domain(stem(path), path, (path,))]
    if dataset := _dataset(path):
        return [dataset]
    inside = _listed(path)
    folders = [child for child in inside if inside[child] == "folder"]
    if all(_split_of(folder, "folder") for folder in folders):
        return [_domain(path)]
    if loose := [name(child) for child in inside if child not in folders]:
        raise UserError(
            shown(path),
            found=f"files ({some(loose)}) beside folders ({some([name(folder) for folder in folders])})",
            expected="folders only, one for each domain, or files only",
            change="move the files into a folder of their own, or out of the way",
        )
    return [_domain(folder) for folder in folders]


def _domain(folder: str) -> Domain:
    if dataset := _dataset(folder):
        return dataset
    inside = _listed(folder)
    splits = {child: _split_of(child, kind) for child, kind in inside.items()}
    named = [name(child) for child in inside if splits[child]]
    others = [name(child) for child in inside if not splits[child]]
    if named and others:  # a guess here would train on what was held out, or on a README
        raise UserError(
            shown(folder),
            found=f"{some(others)} beside the splits {some(named)}",
            expected="nothing but train*/eval* where one of them is named so",
            change="move the others out of the way, or rename the splits if they are none",
        )
    files = {child: tuple(_files(child, kind)) for child, kind in inside.items()}
    empty = [name(child) for child in inside if splits[child] and not files[child]]
    train = tuple(file for child in inside if splits[child] != "eval" for file in files[child])
    held_out = tuple(file for child in inside if splits[child] == "eval" for file in files[child])
    if empty or not train:
        raise UserError(
            f"domain {name(folder)!r} ({shown(folder)})",
            found=f"no file in {some(empty)}" if empty else "no file to train on",
            expected="at least one file of documents",
            change="add documents or leave the folder out",
        )
    return Domain(name(folder), folder, train, held_out)


def _dataset(folder: str) -> Domain | None:
    """The domain of a folder that is one dataset in itself."""
    if mds.is_mds(index := join(folder, mds.INDEX)):
        return Domain(name(folder), folder, (index,))
    if splits := hub.saved_splits(folder):
        train, held_out = splits
        return Domain(name(folder), folder, train, held_out)
    return None


def _listed(folder: str) -> dict[str, Kind]:
    """What a folder holds, a Megatron pair as its .bin alone."""
    inside = children(folder)
    return {
        child: kind for child, kind in inside.items() if not (child.endswith(".idx") and f"{child[:-4]}.bin" in inside)
    }


def _megatron_pair(path: str) -> str:
    prefix = path.removesuffix(".idx")
    if look(f"{prefix}.bin") is None or look(f"{prefix}.idx") is None:
        pair = suffix(path) == ".idx" and look(path)
        raise UserError(
            shown(path),
            found=f"no {name(prefix)}.bin beside it" if pair else "no such file or folder",
            expected="the two files of a Megatron dataset" if pair else "documents",
            change="check the path",
        )
    return f"{prefix}.bin"


def _files(path: str, kind: Kind, above: tuple[str, ...] = ()) -> Iterator[str]:
    if kind == "file":
        yield path
        return
    real = path if is_remote(path) else os.path.realpath(path)
    if real in above or kind == "neither":
        what = "neither a file nor a folder" if kind == "neither" else "a link that leads back to a folder it is in"
        raise UserError(path, found=what, expected="files and folders", change="remove it")
    if dataset := _dataset(path):
        yield from dataset.train
        return
    for child, child_kind in _listed(path).items():
        yield from _files(child, child_kind, (*above, real))


def _split_of(path: str, kind: Kind) -> str | None:
    if kind == "folder":
        return name(path) if name(path) in ("train", "eval") else None
    match = SPLIT_NAME.fullmatch(stem(path))
    return match[1] if match and suffix(path) in SPLIT_SUFFIXES else None
