"""A preparation cut into jobs: each makes one shard of a domain from parts of its files, and leaves a receipt."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import NonNegativeInt, ValidationError

from shearling.data.document import Reading
from shearling.data.documents import Domain, read
from shearling.data.manifest import ShardEntry, Strict, dtype_for
from shearling.data.shard import UNFINISHED, ShardWriter
from shearling.data.sources import Source, check_unchanged, fingerprint, sources_of
from shearling.data.tokenise import Encoder
from shearling.errors import UserError

# Of what is read, compressed or not: some seconds of work for one process, which is what a kill costs.
SHARD_BYTES = 1 << 25
TICKETS = 1 << 64
RECEIPT = ".job"


@dataclass(frozen=True)
class Job:
    """Shard `number` of a domain. Its documents draw tickets below TICKETS; those below `below` are held out.

    `last_share`, of a domain with a single document, is the share of its tokens to hold out at its end.
    """

    domain: str
    number: int
    key: str
    sources: tuple[Source, ...]
    below: int
    reading: Reading
    last_share: float | None = None

    @property
    def name(self) -> str:
        """The job's own in its preparation, and where its receipt lies."""
        return f"{self.domain}/{self.number:05}{RECEIPT}"

    @property
    def digest(self) -> str:
        """The sha256 of all that decides what the job writes, but for the tokenizer."""
        return hashlib.sha256(json.dumps(asdict(self), default=str, sort_keys=True).encode()).hexdigest()


class Finished(Strict):
    """What a job has written; the tickets are the lowest and the highest that its documents drew."""

    train: ShardEntry | None
    eval: ShardEntry | None
    skipped: NonNegativeInt
    broken: NonNegativeInt
    tickets: tuple[int, int] | None
    sources: list[str]

    @property
    def shards(self) -> list[ShardEntry]:
        """Of both splits."""
        return [shard for shard in (self.train, self.eval) if shard]

    @property
    def documents(self) -> int:
        """Of both splits."""
        return sum(shard.documents for shard in self.shards)

    @property
    def tokens(self) -> int:
        """Of both splits."""
        return sum(shard.tokens for shard in self.shards)


class Receipt(Strict):
    """Written when all that a job has made is on the disk."""

    job: str
    finished: Finished


def plan(domain: Domain, *, first: int, key: str, below: int, reading: Reading) -> list[Job]:
    """The jobs of a domain, numbered from `first`. Its own eval files are held out, or else tickets under `below`.

    Raises UserError for a file that can't be looked at.
    """
    splits = [(domain.train, 0 if domain.eval else below), (domain.eval, TICKETS)]
    groups = [(group, limit) for files, limit in splits for group in _groups(sources_of(files, reading))]
    return [
        Job(domain.name, number, f"{key}/{domain.name}/{number}", group, limit, reading)
        for number, (group, limit) in enumerate(groups, start=first)
    ]


def do(job: Job, encoder: Encoder, out: Path) -> Finished:
    """Tokenises a job's documents into `out`, one batch in memory at a time; the receipt comes last.

    Raises UserError for what can't be read or tokenised, and for files that change meanwhile.
    """
    folder, skipped, drawn, broken = out / job.domain, 0, list[int](), list[UserError]()
    folder.mkdir(exist_ok=True)
    (out / job.name).unlink(missing_ok=True)
    dtype = dtype_for(encoder.pipeline.vocab_size)
    with (
        ShardWriter(folder, f"train-{job.number:05}", dtype=dtype) as train,
        ShardWriter(folder, f"eval-{job.number:05}", dtype=dtype) as held,
    ):
        parts = (read(source.part, reading=job.reading, broken=broken.append) for source in job.sources)
        documents = (document for part in parts for document in part)
        passed_over = broken.append if job.reading.skip_broken else None
        for number, piece in enumerate(encoder.pieces(documents, broken=passed_over)):
            if not len(piece.ids):
                skipped += 1
                continue
            ticket = _ticket(f"{job.key}/{number}")
            drawn = [min([ticket, *drawn]), max([ticket, *drawn])]
            if job.last_share is not None:
                chosen = zip((train, held), encoder.cut(piece, share=job.last_share), strict=True)
            else:
                chosen = [(held if ticket < job.below else train, piece)]
            for writer, written in chosen:
                writer.add(written.ids, text_bytes=written.text_bytes, loss=written.loss)
        check_unchanged(job.sources)
        firsts = [source.part.path for source in job.sources if source.part.start == 0 and source.num_bytes]
        tickets = (drawn[0], drawn[1]) if drawn else None
        finished = Finished(
            train=train.finish(),
            eval=held.finish(),
            skipped=skipped,
            broken=len(broken),
            tickets=tickets,
            sources=[fingerprint(str(path)) for path in firsts],
        )
    receipt = Receipt(job=job.digest, finished=finished)
    new = out / f"{job.name}.{os.getpid()}{UNFINISHED}"
    new.write_text(receipt.model_dump_json(), encoding="utf-8")
    os.replace(new, out / job.name)
    return finished


def done_before(job: Job, encoder: Encoder, out: Path) -> Finished | None:
    """What the job has left in `out` if it was finished there, from the files as they are now, and is whole."""
    try:
        receipt = Receipt.model_validate_json((out / job.name).read_bytes())
    except (OSError, ValidationError):
        return None
    dtype = dtype_for(encoder.pipeline.vocab_size)
    sizes = [item for shard in receipt.finished.shards for item in shard.sizes(dtype).items()]
    files = [(out / job.domain / name, size) for name, size in sizes]
    whole = all(path.is_file() and path.stat().st_size == size for path, size in files)
    return receipt.finished if whole and receipt.job == job.digest else None


def files_of(job: Job, finished: Finished) -> list[str]:
    """What a finished job has in a preparation's folder, its receipt included."""
    kinds = [(shard.name, kind) for shard in finished.shards for kind in shard.sums]
    return [job.name, *(f"{job.domain}/{name}.{kind}" for name, kind in kinds)]


def has_receipts(folder: Path) -> bool:
    """Whether a preparation in `folder` has finished any shard."""
    return any(any(receipt.parent.glob("*.tokens")) for receipt in folder.glob(f"*/*{RECEIPT}"))


def _groups(sources: Iterable[Source]) -> Iterator[tuple[Source, ...]]:
    group: list[Source] = []
    size = 0
    for source in sources:
        if group and size + source.num_bytes > SHARD_BYTES:
            yield tuple(group)
            group, size = [], 0
        group.append(source)
        size += source.num_bytes
    if group:
        yield tuple(group)


def _ticket(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest())
