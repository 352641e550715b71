"""Next-token cross-entropy, chunked over tokens so that the logits of a batch never exist at once.

B sequences, T tokens, D hidden, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from shearling.loss.distillation import CHUNK_TOKENS, blended_loss
from shearling.loss.logits import logit_cap, logits_of, read_by_head


def next_token_loss(model: Any, ids: Tensor) -> Tensor:
    """Mean nats per predicted token of a transformers causal model on ids [B, T + 1]."""
    targets = ids[:, 1:]
    total, _ = head_losses(model, hidden_states(model, ids[:, :-1]), targets)
    return total / targets.numel()


def head_losses(model: Any, hidden: Tensor, targets: Tensor, *, compiled: bool = False) -> tuple[Tensor, Tensor]:
    """Of what a model's head reads, [B, T, D], at targets int64 [B, T], those below 0 left out: the sum, to go backward
    from, and the nats of each, [B, T].

    Gradients are formed in the forward pass, chunk by chunk: on a CPU torch's own linear_cross_entropy took the time of
    four plain losses (benchmarks/trainer.py).
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    hidden, weight = read_by_head(model, hidden)
    cap = logit_cap(model)
    flat, ids = hidden.flatten(0, 1), targets.flatten()
    total, losses, _ = blended_loss(flat, weight, ids, None, share=0.0, dtype=dtype, cap=cap, compiled=compiled)
    return total, losses.view_as(targets)


@torch.no_grad()
def token_losses(model: Any, ids: Tensor) -> Tensor:
    """Nats of each predicted token of ids [B, T + 1], fp32 [B, T], without gradients."""
    hidden, weight = head_inputs(model, hidden_states(model, ids[:, :-1]))
    targets, cap = ids[:, 1:], logit_cap(model)
    chunks = zip(hidden.flatten(0, -2).split(CHUNK_TOKENS), targets.flatten().split(CHUNK_TOKENS), strict=True)
    parts = [functional.cross_entropy(logits_of(h, weight, cap).float(), t, reduction="none") for h, t in chunks]
    return torch.cat(parts).view(targets.shape)


def hidden_states(model: Any, ids: Tensor, *, position_ids: Tensor | None = None) -> Tensor:
    """What the head reads, [B, T, D], for ids [B, T]."""
    return model.base_model(input_ids=ids, position_ids=position_ids, use_cache=False).last_hidden_state


def head_inputs(model: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states, times what scales the logits, and the head's weight [V, D], in the dtype of their product."""
    kind = hidden.device.type
    hidden, weight = read_by_head(model, hidden)
    if torch.is_autocast_enabled(kind):
        hidden = hidden.to(torch.get_autocast_dtype(kind))
    return hidden, weight.to(hidden.dtype)
