"""The Lagrangian that holds expected sizes to a sliding target (Sheared-LLaMA, arXiv 2310.06694, eq. 3-4).

s is the expected sparsity of an axis, one number for each place with a choice of its own; t its target now.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Slide:
    """The target's way from the source's size to its own: linear over `warmup_steps`, then still."""

    warmup_steps: int

    def progress(self, step: int) -> float:
        """0 at the first step, 1 from `warmup_steps` on."""
        return min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0


def expected_sparsity(keep_probability: Tensor) -> Tensor:
    """1 - E / size along the last dimension: [..., size] -> [...]."""
    return 1 - keep_probability.mean(-1)


def penalty(sparsity: Tensor, *, target: float, linear: Tensor, quadratic: Tensor) -> Tensor:
    """sum of l1 (s - t) + l2 (s - t)^2 over places; s, l1 and l2 have one shape. Minimised over s, maximised over l."""
    violation = sparsity - target
    return (linear * violation + quadratic * violation**2).sum()
