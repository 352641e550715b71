"""Steps left out because their gradients weren't finite: counted on the device, told of when that is waited for."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shearling.train.objective import Losses

MOST = 2  # its place among the counts


@dataclass(frozen=True)
class Skipped:
    """`counts` int64 [4]: left out in a row by now, in all, the most in a row since it was told, the last one's number.

    `domains` int64 [D]: since then, how often each domain's loss was what wasn't finite.
    """

    counts: Tensor
    domains: Tensor

    @classmethod
    def after(cls, before: "Skipped | None", step: int, losses: Losses, left_out: Tensor) -> "Skipped":
        """After the step of this number, counted from 1; `left_out` is 1 if it was, else 0. Nobody waits for it."""
        out = left_out.long()
        broken = (~torch.isfinite(losses.sums["loss"])).long() * out
        if before is None:
            before = cls(torch.zeros(4, dtype=torch.int64, device=out.device), torch.zeros_like(broken))
        in_a_row, in_all, most, last = before.counts.unbind()
        in_a_row = (in_a_row + 1) * out
        counts = [in_a_row, in_all + out, torch.maximum(most, in_a_row), last + (step - last) * out]
        return cls(torch.stack(counts), before.domains + broken)

    def told(self) -> "Skipped":
        """With nothing left to tell of."""
        counts = self.counts.clone()
        counts[MOST] = 0
        return replace(self, counts=counts, domains=torch.zeros_like(self.domains))
