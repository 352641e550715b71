"""Windows of a store as tensors: training batches by position, held-out batches always the same.

B: sequences, T: seq_len.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from shearling.data.sampler import Position, window_of
from shearling.data.store import Store
from shearling.errors import UserError, raise_all

HELD_OUT_SEQUENCES = 8  # a batch's logits at 2,048 tokens and 32,000 ids stay near 2 GB in fp32


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


def batch(store: Store, positions: Sequence[Position], *, seq_len: int, seed: int) -> torch.Tensor:
    """The train windows at `positions`, int64 [B, T + 1]; UserError where a domain has no whole window."""
    check_windows(store, sorted({position.domain for position in positions}), seq_len=seq_len)
    windows = []
    for position in positions:
        count = store.window_count(position.domain, "train", seq_len)
        windows.append(store.window(position.domain, "train", window_of(position, count, seed), seq_len))
    return torch.from_numpy(np.stack(windows))


def held_out(
    store: Store, domain: str, *, seq_len: int, limit: int | None = None, sequences: int = HELD_OUT_SEQUENCES
) -> Iterator[torch.Tensor]:
    """The held-out windows of a domain in batches, int64 [B, T + 1] with B <= sequences; always the same ones.

    At most `limit` windows, spread evenly over the split. A split shorter than one window gives one tensor
    [1, tokens] of all there is.
    """
    assert sequences >= 1
    assert limit is None or limit >= 1
    available = store.window_count(domain, "eval", seq_len)
    if available == 0:
        yield torch.from_numpy(store.slice(domain, "eval").astype(np.int64))[None]
        return
    count = available if limit is None else min(limit, available)
    chosen = [number * available // count for number in range(count)]
    for start in range(0, count, sequences):
        windows = [store.window(domain, "eval", index, seq_len) for index in chosen[start : start + sequences]]
        yield torch.from_numpy(np.stack(windows))
