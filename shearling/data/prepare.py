"""Documents to a token store: planned as jobs, done by processes, a share held out, the manifest last."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from shearling.data.document import Reading, some
from shearling.data.documents import Domain, Input, find_domains
from shearling.data.files import shown
from shearling.data.jobs import TICKETS, Finished, Job, do, done_before, files_of, plan
from shearling.data.manifest import SPLITS, DomainEntry, Manifest, SplitEntry, TokenizerEntry, dtype_for
from shearling.data.pool import default_processes, do_all
from shearling.data.sources import fingerprint as file_print
from shearling.data.sources import holds_bytes, is_local
from shearling.data.store import Store
from shearling.data.tokenise import Encoder, Pipeline, fingerprint, load_tokenizer
from shearling.errors import UserError, raise_all

Progress = Callable[[str, int, int], None]  # a domain, its documents and its tokens so far
DEFAULT = Reading()


def prepare(
    inputs: Sequence[str | Path | Input],
    *,
    tokenizer: Path,
    out: Path,
    held_out: float = 0.01,
    seed: int = 0,
    source: str | None = None,
    reading: Reading = DEFAULT,
    processes: int | None = None,
    progress: Progress | None = None,
) -> Store:
    """Tokenises documents into the existing folder `out` and opens the store; `source` names the model, for people.

    What an earlier call with the same arguments has finished there is kept, if the files are still the same. The bytes
    don't depend on `processes`, which is the cores for inputs that are worth it. Memory: in each process the tokenizer,
    one batch and one document; a document takes some ten times its length.

    Splits that the inputs name are kept; elsewhere the share `held_out` of the documents is, chosen by a hash of
    (seed, domain, shard, number of the document), never none and never all. Of a domain with a single document the
    last `held_out` share of its tokens is held out, and its train part then has no EOS.
    Raises UserError for what documents, tokenizer or share lack.
    """
    if not 0 < held_out < 1:
        raise UserError("held_out", found=held_out, expected="a share between 0 and 1", change="0.01 holds out 1%")
    domains = find_domains(inputs)
    loaded = load_tokenizer(tokenizer)
    pipeline = Pipeline.of(loaded, folder=tokenizer)
    work = _Work(pipeline, out, reading, processes, progress)
    manifest = Manifest(
        dtype=dtype_for(pipeline.vocab_size),
        vocab_size=pipeline.vocab_size,
        eos_id=pipeline.eos_id,
        tokenizer=TokenizerEntry(fingerprint=fingerprint(loaded), source=source or str(tokenizer)),
        seed=seed,
        held_out=held_out,
        domains=_tokenised(domains, work, before={}, held_out=held_out, seed=seed),
    )
    _finish(manifest, domains, out)
    return Store.open(out)


def prepare_more(
    onto: Store,
    inputs: Sequence[str | Path | Input],
    *,
    tokenizer: Path,
    out: Path,
    reading: Reading = DEFAULT,
    processes: int | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Tokenises documents for a store that is there: their shards in the folder `out`, and the manifest with them.

    Documents come after those that a domain has, held out by the store's own seed and share. Raises UserError for
    another tokenizer, and for files that the domain was made from already.
    """
    domains = find_domains(inputs)
    _check_new(domains, onto)
    loaded = load_tokenizer(tokenizer)
    onto.check_tokenizer(fingerprint(loaded), str(tokenizer))
    work, given = _Work(Pipeline.of(loaded, folder=tokenizer), out, reading, processes, progress), onto.manifest
    entries = _tokenised(domains, work, before=given.domains, held_out=given.held_out, seed=given.seed)
    manifest = given.model_copy(update={"domains": {**given.domains, **entries}})
    _finish(manifest, domains, out)
    return manifest


def check_same_inputs(inputs: Sequence[str | Path | Input], store: Store) -> None:
    """Raises UserError naming local files that a finished store wasn't made from: new ones, or changed since.

    Inputs that are gone are none of its business: the store has all of them. Those at addresses aren't looked at.
    """
    try:
        domains = find_domains(inputs)
    except UserError:
        return
    known = {source for entry in store.manifest.domains.values() for source in entry.sources}
    files = [path for domain in domains for path in (*domain.train, *domain.eval)]
    others = [path for path in files if is_local(path) and holds_bytes(path) and file_print(path) not in known]
    if others:
        raise UserError(
            f"store {store.folder}",
            found=f"it was made before these files were as they are now: {some(others)}",
            expected="the inputs that it was made from",
            change="choose another --out to make a store of them, or put the files back; "
            "documents that are only more go into it with --add",
        )


@dataclass(frozen=True)
class _Work:
    """With what, where to and how jobs are done."""

    pipeline: Pipeline
    out: Path
    reading: Reading
    processes: int | None
    progress: Progress | None


def _tokenised(
    domains: Sequence[Domain], work: _Work, *, before: Mapping[str, DomainEntry], held_out: float, seed: int
) -> dict[str, DomainEntry]:
    """The entries of `domains`, what they had `before` included, with their new shards written."""
    below = round(held_out * TICKETS)
    jobs = [
        job
        for domain in domains
        for job in plan(
            domain,
            first=_next_number(before.get(domain.name)),
            key=str(seed),
            below=below,
            reading=domain.reading or work.reading,
        )
    ]
    done = _do_or_find(jobs, work)
    entries = {}
    for domain in domains:
        mine = [(job, done[job.name]) for job in jobs if job.domain == domain.name]
        if domain.name not in before and not domain.eval:
            mine = _both_splits(mine, work, share=held_out)
        entries[domain.name] = _entry(domain, mine, before.get(domain.name))
    return entries


def _do_or_find(jobs: Sequence[Job], work: _Work) -> dict[str, Finished]:
    """What each job has made, by the job's name, now or in a call before this one."""
    encoder, count = Encoder(work.pipeline), Counter[tuple[str, str]]()
    done: dict[str, Finished] = {}

    def take(job: Job, finished: Finished) -> None:
        done[job.name] = finished
        count[job.domain, "documents"] += finished.documents
        count[job.domain, "tokens"] += finished.tokens
        if work.progress:
            work.progress(job.domain, count[job.domain, "documents"], count[job.domain, "tokens"])

    found = [(job, finished) for job in jobs if (finished := done_before(job, encoder, work.out))]
    _keep_only(work.out, {name for job, finished in found for name in files_of(job, finished)})
    for job, finished in found:
        take(job, finished)
    left = [job for job in jobs if job.name not in done]
    for job, finished in do_all(left, work.pipeline, work.out, processes=work.processes or default_processes(left)):
        take(job, finished)
    return done


def _both_splits(done: list[tuple[Job, Finished]], work: _Work, *, share: float) -> list[tuple[Job, Finished]]:
    """The same, but where all drew tickets for one split, a document or a part of one moved, by one job again."""
    drawn = [(job, finished.tickets) for job, finished in done if finished.tickets]
    if sum(finished.documents for _, finished in done) == 1:
        old = drawn[0][0]
        new = replace(old, last_share=share)
    elif drawn and not any(finished.eval for _, finished in done):
        old, (lowest, _) = min(drawn, key=lambda pair: pair[1][0])
        new = replace(old, below=lowest + 1)
    elif drawn and not any(finished.train for _, finished in done):
        old, (_, highest) = max(drawn, key=lambda pair: pair[1][1])
        new = replace(old, below=highest)
    else:
        return done
    again = do(new, Encoder(work.pipeline), work.out)
    return [(job, again if job is old else finished) for job, finished in done]


def _entry(domain: Domain, done: list[tuple[Job, Finished]], before: DomainEntry | None) -> DomainEntry:
    skipped, broken = Counter[str](), Counter[str]()
    for job, finished in done:
        split = "eval" if job.below == TICKETS else "train"
        skipped[split] += finished.skipped
        broken[split] += finished.broken
    shards = {split: [shard for _, f in done if (shard := getattr(f, split))] for split in SPLITS}
    if not (any(shards.values()) if before else all(shards.values())):
        lacking = next(split for split in SPLITS if not shards[split])
        more = f", {broken[lacking]} broken" if broken[lacking] else ""
        hint = "; without skip_broken the first broken one is told, and what to change" if more else ""
        raise UserError(
            f"domain {domain.name!r} ({shown(domain.path)})",
            found=f"no documents with text for {lacking} ({skipped[lacking]} empty ones{more})",
            expected="at least one",
            change=f"add text or leave the domain out{hint}",
        )
    old = {split: getattr(before, split) for split in SPLITS} if before else {}
    splits = {
        split: SplitEntry(
            shards=[*(old[split].shards if old else []), *shards[split]],
            skipped=skipped[split] + (old[split].skipped if old else 0),
            broken=broken[split] + (old[split].broken if old else 0),
        )
        for split in SPLITS
    }
    sources = [*(before.sources if before else []), *(name for _, finished in done for name in finished.sources)]
    return DomainEntry(**splits, sources=sources)


def _check_new(domains: Sequence[Domain], onto: Store) -> None:
    errors = []
    for domain in domains:
        entry = onto.manifest.domains.get(domain.name)
        known = set(entry.sources) if entry else set()
        again = [path for path in (*domain.train, *domain.eval) if file_print(path) in known]
        if again:
            errors.append(
                UserError(
                    f"domain {domain.name!r} of {onto.folder}",
                    found=f"documents that it has already, from {some([*map(shown, again)])}",
                    expected="new ones",
                    change="leave those files out",
                )
            )
    raise_all(errors)


def _next_number(entry: DomainEntry | None) -> int:
    return 1 + max(shard.number for shard in entry.shards) if entry else 0


def _finish(manifest: Manifest, domains: Sequence[Domain], out: Path) -> None:
    manifest.write(out)
    shards = [(d.name, shard) for d in domains for shard in manifest.domains[d.name].shards]
    _keep_only(out, {f"{domain}/{name}" for domain, shard in shards for name in shard.sizes(manifest.dtype)})


def _keep_only(out: Path, names: Collection[str]) -> None:
    """Removes every other file from the folders of `out`, and folders without any."""
    for folder in [path for path in out.iterdir() if path.is_dir()]:
        for path in folder.iterdir():
            if f"{folder.name}/{path.name}" not in names:
                path.unlink()
        if not any(folder.iterdir()):
            folder.rmdir()
