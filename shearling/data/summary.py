"""What a store holds, by domain, and how often a training budget would read it."""

from collections.abc import Mapping
from dataclasses import dataclass

from shearling.data.sampler import SamplerState, draw
from shearling.data.store import Store


@dataclass(frozen=True)
class DomainSummary:
    """Counts of a domain's two splits; `text_bytes` are of its train text, in UTF-8.

    `share` is what a mixture gives the domain, `repeats` how often a budget reads each of its train tokens.
    """

    documents: int
    tokens: int
    held_out_documents: int
    held_out_tokens: int
    skipped_documents: int
    shards: int
    text_bytes: int
    bytes_per_token: float
    share: float
    repeats: float | None


def summarise(
    store: Store, *, tokens: int | None = None, weights: Mapping[str, float] | None = None
) -> dict[str, DomainSummary]:
    """Each domain's summary, for a budget of train tokens and a mixture, by the domains' sizes where none is given.

    Raises UserError for weights that don't fit the domains.
    """
    shares = weights or {domain: float(store.num_tokens(domain, "train")) for domain in store.domains}
    draw(SamplerState.start(store.domains), shares, 0)  # says what is wrong with them
    found = {}
    for domain, entry in store.manifest.domains.items():
        train, held, share = entry.train, entry.eval, shares[domain] / sum(shares.values())
        found[domain] = DomainSummary(
            documents=train.documents,
            tokens=train.tokens,
            held_out_documents=held.documents,
            held_out_tokens=held.tokens,
            skipped_documents=train.skipped + held.skipped,
            shards=len(entry.shards),
            text_bytes=train.text_bytes,
            bytes_per_token=train.text_bytes / train.tokens,
            share=share,
            repeats=None if tokens is None else tokens * share / train.tokens,
        )
    return found
