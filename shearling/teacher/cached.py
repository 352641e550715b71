"""A teacher whose sayings are kept: it is asked for a window once, by whichever run comes to it first."""

from collections.abc import Callable, Sequence
from functools import cached_property
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from shearling.data.batch import Batch
from shearling.loss.distillation import Dense, Sparse, chunks
from shearling.teacher.cache import Cache
from shearling.teacher.live import Lesson, LiveTeacher


class CachedTeacher:
    """Teaches from a cache, and fills it: `load` gives the live teacher once a window isn't there."""

    def __init__(self, cache: Cache, load: Callable[[], LiveTeacher], *, domains: Sequence[str]):
        self.cache, self.domains = cache, tuple(domains)
        self._load = load

    @cached_property
    def live(self) -> LiveTeacher:
        return self._load()

    def __call__(self, batch: Batch) -> Lesson:
        """What is known of the batch's windows, which must be whole ones of the cache's store, on its device."""
        assert batch.windows is not None
        names = [(self.domains[domain], window) for domain, window in zip(batch.domains, batch.windows, strict=True)]
        found = [self.cache.read(*name) for name in names]
        missing = [row for row, records in enumerate(found) if records is None]
        if missing:
            written = self._ask(batch.rows(missing), [names[row] for row in missing])
            for row, records in zip(missing, written, strict=True):
                found[row] = records
                self.cache.write(*names[row], records)
        said = self.cache.kind.read(np.concatenate([records for records in found if records is not None]))
        return Lesson(_on(said, batch.ids.device))

    def _ask(self, batch: Batch, names: Sequence[tuple[str, int]]) -> np.ndarray:
        """The live teacher's records of a batch's windows, [B, T]."""
        dense = self.live(batch).taught
        assert isinstance(dense, Dense)
        seq_len = batch.ids.shape[1] - 1
        offsets = torch.cat([_offsets(self.cache.manifest.seed, *name, count=seq_len) for name in names])
        parts = [self.cache.kind.write(dense.logits(rows), offsets[rows]) for rows in chunks(len(dense.hidden))]
        return np.concatenate(parts).reshape(len(batch), seq_len)


def _offsets(seed: int, domain: str, window: int, *, count: int) -> Tensor:
    """Uniform numbers in [0, 1) for a window's tokens, the same whoever draws them."""
    digest = blake2b(f"{seed}/{domain}/{window}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    return torch.rand(count, dtype=torch.float64, generator=generator)


def _on(said: Sparse, device: torch.device) -> Sparse:
    rest = None if said.rest is None else said.rest.to(device)
    return Sparse(said.ids.to(device), said.probabilities.to(device), said.negative_entropy.to(device), rest)
