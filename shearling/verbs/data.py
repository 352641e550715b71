"""`data`: documents to a token store, more of them onto one, and what one holds."""

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from shearling.data.document import Reading
from shearling.data.domains import Input
from shearling.data.files import is_remote, place, shown
from shearling.data.jobs import has_receipts
from shearling.data.manifest import MANIFEST, Manifest, parse_manifest
from shearling.data.prepare import check_same_inputs, prepare, prepare_more
from shearling.data.store import Store
from shearling.data.summary import DomainSummary, summarise
from shearling.data.tokenise import fingerprint, load_tokenizer
from shearling.errors import UserError
from shearling.recipe import Data, Inspect
from shearling.recipe import Input as OneInput
from shearling.stage import Stage, locked, sync
from shearling.weights.config import check_code
from shearling.weights.folder import resolve

Progress = Callable[[str, int, int], None]
SAMPLE_TOKENS = 48


def make_store(asked: Data, *, tokenizer: str, out: str, progress: Progress | None = None) -> tuple[Store, bool]:
    """The store at `out`, and whether it was there already.

    What is finished of a preparation that ended early is kept, and the same call goes on from it. Raises UserError
    where the store is there and its inputs have changed.
    """
    _check_local(out)
    folder = resolve(tokenizer)
    check_code(folder)
    identity = {
        "verb": "data",
        "tokenizer": fingerprint(load_tokenizer(folder)),
        "held_out": asked.held_out,
        "seed": asked.seed,
        **_asked_of_documents(asked),
    }
    stage = Stage(Path(out), identity, resumable=has_receipts, discard=UserError)
    if stage.done:
        store = Store.open(stage.out)
        check_same_inputs(_inputs(asked), store)
        return store, True
    with stage as partial:
        prepare(
            _inputs(asked),
            tokenizer=folder,
            source=tokenizer,
            reading=_reading(asked),
            out=partial,
            held_out=asked.held_out,
            seed=asked.seed,
            processes=asked.processes,
            progress=progress,
        )
    return Store.open(stage.out), False


def add_documents(asked: Data, *, tokenizer: str, out: str, progress: Progress | None = None) -> Store:
    """The store at `out` with more documents at the ends of its streams; nothing of what was there is written again.

    The new shards are prepared beside the store, linked into it, and are part of it once the manifest is replaced.
    A call that ended early is gone on with by the same call. Raises UserError for documents that are in it already.
    """
    _check_local(out)
    folder = resolve(tokenizer)
    check_code(folder)
    store = Path(os.path.abspath(Path(out).expanduser()))
    with locked(Path(f"{store}.more.lock")):
        onto = Store.open(store)
        more = store.with_name(f"{store.name}.more")
        if (more / MANIFEST).is_file() and (more / MANIFEST).read_bytes() == (store / MANIFEST).read_bytes():
            shutil.rmtree(more)  # all of it was in the store when its process ended
        identity = {"verb": "data --add", "onto": onto.digest, **_asked_of_documents(asked)}
        stage = Stage(more, identity, resumable=has_receipts, discard=UserError)
        if not stage.done:
            with stage as partial:
                prepare_more(
                    onto,
                    _inputs(asked),
                    tokenizer=folder,
                    reading=_reading(asked),
                    out=partial,
                    processes=asked.processes,
                    progress=progress,
                )
        _join(more, store, onto.manifest)
        shutil.rmtree(more)
    return Store.open(store)


@dataclass(frozen=True)
class Inspected:
    """What a store holds, by domain; `samples` are the starts of its train streams, where there's the tokenizer."""

    store: str
    tokenizer: str
    fingerprint: str
    vocab_size: int
    dtype: str
    domains: Mapping[str, DomainSummary]
    samples: Mapping[str, str]


def inspect_store(store: str, asked: Inspect) -> Inspected:
    """Counts, repeats and samples of a store. Raises UserError for a tokenizer asked for that isn't the store's."""
    opened = Store.open(store)
    domains = summarise(opened, tokens=asked.tokens, weights=asked.weights)
    source = asked.tokenizer or opened.manifest.tokenizer.source
    tokenizer = _tokenizer_of(opened, source, needed=asked.tokenizer is not None)
    samples = {}
    for domain in opened.domains if tokenizer else ():
        ids = opened.slice(domain, "train", 0, min(SAMPLE_TOKENS, opened.num_tokens(domain, "train")))
        samples[domain] = tokenizer.decode(ids.tolist())
    return Inspected(store, source, opened.fingerprint, opened.vocab_size, opened.dtype, domains, samples)


def verify_store(store: str) -> int:
    """How many files the store has. Reads them all and raises UserError naming those that aren't what was written."""
    return Store.open(store).verify()


def _tokenizer_of(store: Store, source: str, *, needed: bool) -> Any:
    """The tokenizer at `source`; where it isn't needed None if it isn't on this machine, or isn't the store's."""
    if not needed and not Path(source).expanduser().is_dir():
        return None
    folder = resolve(source)
    try:
        check_code(folder)
        tokenizer = load_tokenizer(folder)
        store.check_tokenizer(fingerprint(tokenizer), source)
    except UserError:
        if needed:
            raise
        return None
    return tokenizer


def _join(more: Path, store: Path, before: Manifest) -> None:
    """Links the shards of `more` into the store and puts its manifest in place."""
    manifest = parse_manifest((more / MANIFEST).read_bytes(), where=str(more / MANIFEST))
    for domain, entry in manifest.domains.items():
        known = {shard.name for shard in before.domains[domain].shards} if domain in before.domains else set()
        new = [name for s in entry.shards if s.name not in known for name in s.sizes(manifest.dtype)]
        (store / domain).mkdir(exist_ok=True)
        for name in new:
            (store / domain / name).unlink(missing_ok=True)  # from a call that was killed here
            _link(more / domain / name, store / domain / name)
        sync(store / domain)
    manifest.write(store)
    sync(store)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)
        sync(target)


def _reading(asked: Data) -> Reading:
    return Reading(**{field.name: getattr(asked, field.name) for field in fields(Reading)})


def _inputs(asked: Data) -> list[str | Input]:
    """The inputs, those with a section of their own with how they are read."""
    return [one if isinstance(one, str) else Input(one.path, _own_reading(asked, one)) for one in asked.inputs]


def _own_reading(asked: Data, one: OneInput) -> Reading:
    own = one.model_dump(exclude={"path"}, exclude_none=True)
    if one.text_column is not None and one.messages_column is None:
        own = {"messages_column": None, "assistant_loss_only": False, **own}  # texts, where others are conversations
    return Reading(**{**asdict(_reading(asked)), **own})


def _asked_of_documents(asked: Data) -> dict[str, Any]:
    """What decides which documents are read: for the identity of what is made of them, without passwords of URLs."""
    inputs = [
        _named(one) if isinstance(one, str) else {"path": _named(one.path), "reading": asdict(one.reading)}
        for one in _inputs(asked)
    ]
    return {"inputs": inputs, "reading": asdict(_reading(asked))}


def _named(path: str) -> str:
    path = place(path)
    return str(Path(path).resolve()) if os.path.lexists(path) else shown(path)


def _check_local(out: str) -> None:
    if is_remote(out):
        change = "write to a local folder and copy it there; it can be read in place"
        raise UserError(f"output {out}", found="an address", expected="a local folder", change=change)
