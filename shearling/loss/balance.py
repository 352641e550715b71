"""How evenly routers spread tokens over experts. N tokens, E experts, k of them for each token."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def loads(logits: Tensor, top_k: int) -> Tensor:
    """Each expert's share of the tokens, [E], for router logits [N, E]: k in all."""
    chosen = logits.topk(top_k, dim=-1).indices
    return functional.one_hot(chosen, logits.shape[-1]).sum(-2).float().mean(0)


def load_balance(logits: Sequence[Tensor], top_k: int) -> Tensor:
    """Mean over layers of m sum_e f_e p_e: f the loads, p the mean probabilities, m the experts that are there.

    Switch Transformers (arXiv 2101.03961, eq. 4-6) with k choices for each token; k where both are even. An expert with
    logits of -inf has been removed and doesn't count, so a masked model's loss is its cut's.
    """
    terms = []
    for layer in logits:
        there = torch.isfinite(layer[0]).sum()
        probabilities = layer.float().softmax(-1).mean(0)
        terms.append(there * (loads(layer.detach(), top_k) * probabilities).sum())
    return torch.stack(terms).mean()
