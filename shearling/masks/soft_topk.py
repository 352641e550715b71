"""Soft top-k: masks whose sum is exactly k at every step, hard as the temperature goes to 0.

z_i = sigmoid((s_i - tau) / T) with tau such that sum z = k. Of this form is the entropy-regularised top-k (Xie et al.
2020, arXiv 2002.06504, section 3, binary case). Everything acts along the last dimension: scores [..., size].
"""

import torch
from torch import Tensor

BISECTIONS = 40  # to 1e-12 of the scores' range, below fp32


def soft_topk(scores: Tensor, *, k: float, temperature: float) -> Tensor:
    """z in (0, 1) with sum k along the last dimension, 0 < k < size. Differentiable in the scores, tau included."""
    assert 0 < k < scores.shape[-1], (k, scores.shape)
    with torch.no_grad():
        tau = threshold(scores, k=k, temperature=temperature)
        z = torch.sigmoid((scores - tau) / temperature)
        slope = (z * (1 - z)).sum(-1, keepdim=True).clamp(min=torch.finfo(z.dtype).tiny)
    # A Newton step from the solution moves it by nothing, and has the gradient of tau as a function of the scores.
    excess = torch.sigmoid((scores - tau) / temperature).sum(-1, keepdim=True) - k
    tau = tau + temperature * excess / slope
    return torch.sigmoid((scores - tau) / temperature)


def threshold(scores: Tensor, *, k: float, temperature: float) -> Tensor:
    """tau, by bisection: [..., 1]."""
    wide = 30 * temperature  # sigmoid(-30) is 1e-13
    low, high = scores.amin(-1, keepdim=True) - wide, scores.amax(-1, keepdim=True) + wide
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        too_many = torch.sigmoid((scores - middle) / temperature).sum(-1, keepdim=True) > k
        low, high = torch.where(too_many, middle, low), torch.where(too_many, high, middle)
    return (low + high) / 2
