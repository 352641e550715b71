"""Optimizers and the rates that they start from."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from shearling.train.eight_bit import adamw_8bit

BETAS = (0.9, 0.95)  # Sheared-LLaMA; no weight decay there either
TOLD = ("cuda", "cpu")  # where fused kernels heed `found_inf`: MPS's have done so only since torch's pull 186360


def adamw(params: Iterable[nn.Parameter], *, lr: float, bits: int = 32) -> Optimizer:
    """AdamW on one group, without weight decay, its moments in so many bits: 32 or 8."""
    chosen = [p for p in params if p.requires_grad]
    groups = [{"params": chosen, "peak_lr": lr}]
    if bits == 8:
        return adamw_8bit(groups, lr=lr, betas=BETAS)
    return AdamW(groups, lr=lr, betas=BETAS, weight_decay=0.0, fused=True)


def set_rates(groups: Iterable[dict[str, Any]], share: float) -> None:
    """Of each group that share of its peak rate."""
    for group in groups:
        lr = group["peak_lr"] * share
        group["lr"] = group["lr"].fill_(lr) if isinstance(group["lr"], Tensor) else lr


def step_unless(left_out: Tensor, optimizers: Sequence[Optimizer]) -> None:
    """Steps all of them, or none where `left_out`, a float on their device, is 1.

    Fused ones are told so by a tensor, as GradScaler does it, and nobody waits for a device that has the weights.
    """
    for optimizer in optimizers:
        device = optimizer.param_groups[0]["params"][0].device
        if optimizer.defaults.get("fused") and device.type in TOLD:
            told: Any = optimizer
            told.grad_scale, told.found_inf = None, left_out.to(device)
            optimizer.step()
        elif not bool(left_out):
            optimizer.step()


def not_finite(parameters: Iterable[Tensor], norm: Tensor) -> Tensor:
    """1.0 if `norm` or the gradient of some of these parameters isn't finite, else 0.0."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    other = torch.nn.utils.get_total_norm(gradients).to(norm.device) if gradients else torch.zeros_like(norm)
    return 1.0 - torch.isfinite(norm + other).float()


def default_lr(parameters: int) -> float:
    """A peak rate for continued training of a model of this size, a power law through what healed best.

    4e-3 at 260 thousand parameters (recipes/stories260k.yaml) and 1e-4 at 1.3 billion (Sheared-LLaMA).
    """
    return min(8e-3, 4e-3 * (260_000 / parameters) ** 0.43)


def default_adapters_lr(parameters: int) -> float:
    """The same for low-rank adapters: ten times as much, at any rank (Schulman et al. 2025, "LoRA Without Regret").

    At most what healed a cut of 117 thousand parameters best, where ten times as much diverged.
    """
    return min(1.6e-2, 10 * default_lr(parameters))
