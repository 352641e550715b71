"""Next-token cross-entropy, chunked over tokens so that the logits of a batch never exist at once.

B sequences, T tokens, D hidden, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

CHUNK_TOKENS = 1024


def next_token_loss(model: Any, ids: Tensor, *, loss_mask: Tensor | None = None) -> Tensor:
    """Mean nats per predicted token of a transformers causal model on ids [B, T + 1].

    `loss_mask` [B, T + 1]: a token whose entry is 0 is read but not asked for.
    """
    targets = ids[:, 1:]
    if loss_mask is not None:
        targets = targets.masked_fill(loss_mask[:, 1:] == 0, -100)
    hidden, weight = _before_head(model, ids)
    return head_loss(hidden, weight, targets.flatten())


@torch.no_grad()
def token_losses(model: Any, ids: Tensor) -> Tensor:
    """Nats of each predicted token of ids [B, T + 1], fp32 [B, T], without gradients."""
    hidden, weight = _before_head(model, ids)
    targets = ids[:, 1:]
    chunks = zip(hidden.split(CHUNK_TOKENS), targets.flatten().split(CHUNK_TOKENS), strict=True)
    parts = [functional.cross_entropy((h @ weight.T).float(), t, reduction="none") for h, t in chunks]
    return torch.cat(parts).view(targets.shape)


def _before_head(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The last hidden states [B * T, D] at ids [B, T + 1], and the head's weight [V, D] in their dtype."""
    hidden = model.base_model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        hidden = hidden.to(torch.get_autocast_dtype(kind))
    return hidden.flatten(0, -2), model.get_output_embeddings().weight.to(hidden.dtype)


def head_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of softmax(hidden [N, D] weight^T [D, V]) at targets [N]; targets of -100 don't count."""
    if len(hidden) < weight.shape[1] or len(weight) <= weight.shape[1]:
        # So few tokens, or so small a vocabulary, that chunks would only cost time.
        return functional.cross_entropy((hidden @ weight.T).float(), targets)
    fused = getattr(functional, "linear_cross_entropy", None)  # torch 2.13 and later
    if fused is not None:
        return fused(hidden, weight, targets, options=torch.nn.LinearCrossEntropyOptions()).float()
    total = torch.zeros((), device=hidden.device)
    for h, t in zip(hidden.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True):
        part = checkpoint(_summed, h, weight, t, use_reentrant=False)
        assert isinstance(part, Tensor)
        total = total + part
    return total / (targets != -100).sum()


def _summed(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy((hidden @ weight.T).float(), targets, reduction="sum")
