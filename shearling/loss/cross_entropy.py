"""Next-token cross-entropy, chunked over tokens so that the logits of a batch never exist at once.

B sequences, T tokens, D hidden, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from shearling.loss.logits import logit_cap, logits_of, read_by_head
from shearling.loss.numbers import numbers_on

CHUNK_TOKENS = 1024


def next_token_loss(model: Any, ids: Tensor) -> Tensor:
    """Mean nats per predicted token of a transformers causal model on ids [B, T + 1]."""
    targets = ids[:, 1:]
    hidden, weight = head_inputs(model, hidden_states(model, ids[:, :-1]))
    return head_loss(hidden, weight, targets, cap=logit_cap(model)) / targets.numel()


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


def head_loss(hidden: Tensor, weight: Tensor, targets: Tensor, *, cap: float | None = None) -> Tensor:
    """Summed cross-entropy of softmax(hidden [..., D] weight^T [D, V]) at targets [...], those of -100 left out.

    With a `cap`, of the logits under it.
    """
    hidden, targets = hidden.flatten(0, -2), targets.flatten()
    if _is_small(hidden, weight):
        return _summed(hidden, weight, targets, cap)
    fused = getattr(functional, "linear_cross_entropy", None)  # torch 2.13 and later
    if fused is not None and cap is None:
        options = torch.nn.LinearCrossEntropyOptions()
        return fused(hidden, weight, targets, reduction="sum", options=options).float()
    total = torch.zeros((), device=hidden.device)
    for h, t in zip(hidden.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True):
        part = checkpoint(_summed, h, weight, t, cap, use_reentrant=False)
        assert isinstance(part, Tensor)
        total = total + part
    return total


def head_loss_by_domain(
    hidden: Tensor, weight: Tensor, targets: Tensor, domains: Sequence[int], *, cap: float | None = None
) -> Iterator[tuple[int, Tensor]]:
    """`head_loss` of hidden [B, T, D] at targets [B, T], apart for each domain that some of the B windows are from."""
    if _is_small(hidden.flatten(0, -2), weight):
        logits = logits_of(hidden.flatten(0, -2), weight, cap).float()
        by_window = functional.cross_entropy(logits, targets.flatten(), reduction="none").view_as(targets).sum(-1)
        for domain in sorted(set(domains)):
            yield domain, by_window[_windows_of(domain, domains, hidden.device)].sum()
        return
    for domain in sorted(set(domains)):
        rows = _windows_of(domain, domains, hidden.device)
        yield domain, head_loss(hidden[rows], weight, targets[rows], cap=cap)


def _windows_of(domain: int, domains: Sequence[int], device: Any) -> Any:
    if all(other == domain for other in domains):
        return slice(None)
    return numbers_on(device, [row for row, other in enumerate(domains) if other == domain])


def _is_small(hidden: Tensor, weight: Tensor) -> bool:
    # So few tokens, or so small a vocabulary, that chunks would only cost time.
    return len(hidden) < weight.shape[1] or len(weight) <= weight.shape[1]


def _summed(hidden: Tensor, weight: Tensor, targets: Tensor, cap: float | None) -> Tensor:
    return functional.cross_entropy(logits_of(hidden, weight, cap).float(), targets, reduction="sum")
