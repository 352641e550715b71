"""Held-out loss: the same windows each time, the same figure at any batch size."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from shearling.loss.cross_entropy import next_token_loss


@torch.no_grad()
def held_out_losses(model: Any, batches: Mapping[str, Iterable[Tensor]]) -> dict[str, float]:
    """Mean nats per token by domain, of batches of ids [B, T + 1]; each token counts alike, summed in float64."""
    device = next(model.parameters()).device
    losses = {}
    for domain, ids_batches in batches.items():
        total, tokens = 0.0, 0
        for ids in ids_batches:
            count = ids.shape[0] * (ids.shape[1] - 1)
            total += float(next_token_loss(model, ids.to(device)).double()) * count
            tokens += count
        losses[domain] = total / tokens
    return losses
