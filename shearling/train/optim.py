"""Optimizers and the rates that they start from."""

from collections.abc import Iterable

from torch import nn
from torch.optim import AdamW, Optimizer

BETAS = (0.9, 0.95)  # Sheared-LLaMA; no weight decay there either


def adamw(params: Iterable[nn.Parameter], *, lr: float) -> Optimizer:
    """AdamW on one group, without weight decay."""
    chosen = [p for p in params if p.requires_grad]
    fused = chosen[0].device.type in ("cuda", "cpu")
    return AdamW([{"params": chosen, "peak_lr": lr}], lr=lr, betas=BETAS, weight_decay=0.0, fused=fused)


def default_lr(parameters: int) -> float:
    """A peak rate for continued training of a model of this size, a power law through what healed best.

    4e-3 at 260 thousand parameters (recipes/stories260k.yaml) and 1e-4 at 1.3 billion (Sheared-LLaMA).
    """
    return min(8e-3, 4e-3 * (260_000 / parameters) ** 0.43)
