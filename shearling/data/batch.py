"""A batch: windows of token ids, and what a loss has to know of them. B sequences, T tokens."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # a target that torch's cross-entropies pass over


@dataclass(frozen=True)
class Batch:
    """Ids int64 [B, T + 1] and the domain that each window is from, by number.

    `counted` bool [B, T + 1]: a token that isn't is read but not asked for; None: all are. `starts` int64 [B, T + 1],
    only where documents are kept apart: where in the window each token's document starts. `windows`: the number of
    each window in its domain's train split, where they are such; with its domain, what names it in any run.
    """

    ids: Tensor
    domains: tuple[int, ...]
    counted: Tensor | None = None
    starts: Tensor | None = None
    windows: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def split(self, sequences: int) -> Iterator["Batch"]:
        """So many windows at a time, in order."""
        for start in range(0, len(self), sequences):
            part = slice(start, start + sequences)
            counted, starts = (None if t is None else t[part] for t in (self.counted, self.starts))
            windows = None if self.windows is None else self.windows[part]
            yield Batch(self.ids[part], self.domains[part], counted, starts, windows)

    def rows(self, chosen: list[int]) -> "Batch":
        """Some of the windows, copied."""
        windows = None if self.windows is None else tuple(self.windows[row] for row in chosen)
        some = self._each(lambda tensor: tensor[chosen])
        return replace(some, domains=tuple(self.domains[row] for row in chosen), windows=windows)

    def to(self, device: Any) -> "Batch":
        """The same on a device; to a GPU, from pinned memory, without waiting."""
        # Away from a GPU nothing would wait for the copy, and whoever reads would be too early.
        ahead = torch.device(device).type == "cuda"
        return self._each(lambda tensor: tensor.to(device, non_blocking=ahead))

    def pinned(self) -> "Batch":
        """The same in page-locked memory, which copies to a GPU without waiting."""
        return self._each(lambda tensor: tensor.pin_memory())

    @property
    def targets(self) -> Tensor:
        """What is to be predicted, int64 [B, T]; IGNORED where a token doesn't count or begins another document."""
        targets = self.ids[:, 1:]
        if self.counted is not None:
            targets = targets.masked_fill(~self.counted[:, 1:], IGNORED)
        if self.starts is not None:
            targets = targets.masked_fill(self.starts[:, 1:] != self.starts[:, :-1], IGNORED)
        return targets

    @property
    def position_ids(self) -> Tensor | None:
        """int64 [B, T], from 0 in each document; transformers takes the restarts as the bounds of attention."""
        if self.starts is None:
            return None
        inputs = self.starts[:, :-1]
        return torch.arange(inputs.shape[1], device=inputs.device) - inputs

    def num_targets(self) -> int:
        """Tokens that are asked for."""
        if self.counted is None and self.starts is None:
            return self.ids[:, 1:].numel()
        return int((self.targets != IGNORED).sum())

    def _each(self, change) -> "Batch":
        counted, starts = (None if t is None else change(t) for t in (self.counted, self.starts))
        return replace(self, ids=change(self.ids), counted=counted, starts=starts)
