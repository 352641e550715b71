"""Windows of a store as tensors: training batches by position, held-out batches always the same.

B: sequences, T: seq_len.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from shearling.data.batch import Batch
from shearling.data.sampler import Position, window_of
from shearling.data.store import Store, span
from shearling.errors import UserError, raise_all

HELD_OUT_SEQUENCES = 8  # a batch's logits at 2,048 tokens and 32,000 ids stay near 2 GB in fp32


@dataclass(frozen=True)
class HeldOut:
    """Windows to measure on: `ids` and the split's `documents` that they belong to, both int64 [B, T + 1].

    `counted` [B, T + 1] is 0 where a token's loss doesn't count; None where all do. Without `documents` nobody knows
    where one ends.
    """

    ids: torch.Tensor
    documents: torch.Tensor | None = None
    counted: torch.Tensor | None = None


def check_windows(store: Store, domains: Sequence[str], *, seq_len: int) -> None:
    """Raises UserError naming every domain whose train split is too short for one window."""
    raise_all(
        [
            UserError(
                f"domain {domain!r} of {store.folder}",
                found=f"too little data for one step, {store.num_tokens(domain, 'train')} tokens",
                expected=f"at least {seq_len + 1} (seq_len + 1)",
                change="use a shorter --seq-len or more text",
            )
            for domain in domains
            if store.window_count(domain, "train", seq_len) == 0
        ]
    )


def batch(store: Store, positions: Sequence[Position], *, seq_len: int, seed: int, separate: bool = False) -> Batch:
    """The train windows at `positions`; UserError where a domain has no whole window.

    `separate` says where the documents in each window start, so that they can be kept apart.
    """
    check_windows(store, sorted({position.domain for position in positions}), seq_len=seq_len)
    found = []
    for position in positions:
        count = store.window_count(position.domain, "train", seq_len)
        found.append((position.domain, window_of(position, count, seed)))
    spans = [span(index, seq_len) for _, index in found]
    ids = np.empty((len(found), seq_len + 1), np.int64)
    for row, (domain, _), s in zip(ids, found, spans, strict=True):
        row[:] = store.slice(domain, "train", s.start, s.stop)
    masks = [store.loss_mask(name, "train", s.start, s.stop) for (name, _), s in zip(found, spans, strict=True)]
    counted = None
    if any(mask is not None for mask in masks):
        every = np.ones(seq_len + 1, bool)
        counted = torch.from_numpy(np.stack([every if mask is None else mask != 0 for mask in masks]))
    starts = None
    if separate:
        starts = torch.from_numpy(np.stack([_starts(store, domain, index, seq_len) for domain, index in found]))
    domains = tuple(store.domains.index(domain) for domain, _ in found)
    return Batch(torch.from_numpy(ids), domains, counted, starts, windows=tuple(index for _, index in found))


def _starts(store: Store, domain: str, index: int, seq_len: int) -> np.ndarray:
    """Where in window `index` each token's document starts, int64 [seq_len + 1]; 0 for the one it opens in."""
    inside = span(index, seq_len)
    offsets = store.offsets(domain, "train")
    # uint64 like the offsets, as below
    first = np.searchsorted(offsets, np.uint64(inside.start), side="right")
    last = np.searchsorted(offsets, np.uint64(inside.stop), side="left")
    starts = np.concatenate(([0], offsets[first:last].astype(np.int64) - inside.start))
    lengths = np.diff(np.append(starts, seq_len + 1))
    return np.repeat(starts, lengths)


def held_out(
    store: Store,
    domain: str,
    *,
    seq_len: int,
    limit: int | None = None,
    sequences: int = HELD_OUT_SEQUENCES,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[HeldOut]:
    """The held-out windows of a domain in batches, [B, T + 1] with B <= sequences; always the same ones.

    At most `limit` windows, spread evenly over the split. A split shorter than one window gives one of all there is,
    [1, tokens]. `rank` of `ranks` has its share, which may be nothing: all shares together are all the windows.
    """
    assert sequences >= 1
    assert 0 <= rank < ranks
    assert limit is None or limit >= 1
    available = store.window_count(domain, "eval", seq_len)
    if available == 0:
        if rank > 0:
            return
        whole = slice(0, store.num_tokens(domain, "eval"))
        yield _held_out(store, domain, store.slice(domain, "eval").astype(np.int64)[None], [whole])
        return
    count = available if limit is None else min(limit, available)
    chosen = [number * available // count for number in range(rank, count, ranks)]
    for start in range(0, len(chosen), sequences):
        indices = chosen[start : start + sequences]
        windows = np.stack([store.window(domain, "eval", index, seq_len) for index in indices])
        yield _held_out(store, domain, windows, [span(index, seq_len) for index in indices])


def bytes_per_token(store: Store) -> dict[str, float]:
    """UTF-8 bytes of text per token of each domain's eval split: nats per token over this are nats per byte."""
    return {d: store.text_bytes(d, "eval") / store.num_tokens(d, "eval") for d in store.domains}


def _held_out(store: Store, domain: str, ids: np.ndarray, spans: Sequence[slice]) -> HeldOut:
    # uint64 like the offsets: with int64 numpy would copy all of them to float64.
    positions = np.stack([np.arange(s.start, s.stop, dtype=np.uint64) for s in spans])
    documents = np.searchsorted(store.offsets(domain, "eval"), positions, side="right") - 1
    masks = [mask for s in spans if (mask := store.loss_mask(domain, "eval", s.start, s.stop)) is not None]
    counted = torch.from_numpy(np.stack(masks)) if masks else None
    return HeldOut(torch.from_numpy(ids), torch.from_numpy(documents), counted)
