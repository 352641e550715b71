"""Soft top-k: masks whose sum is exactly k at every step, hard as the temperature goes to 0.

z_i = sigmoid((s_i - tau) / T) with tau such that sum z = k. Of this form is the entropy-regularised top-k (Xie et al.
2020, arXiv 2002.06504, section 3, binary case). Everything acts along the last dimension: scores [..., size].
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

BISECTIONS = 40  # to 1e-12 of the scores' range, below fp32


def soft_topk(scores: Tensor, *, k: float, temperature: float) -> Tensor:
    """z in (0, 1) with sum k along the last dimension, 0 < k < size. Differentiable in the scores, tau included."""
    (z,) = soft_topks([scores], ks=[k], temperature=temperature)
    return z


def soft_topks(scores: Sequence[Tensor], *, ks: Sequence[float], temperature: float) -> list[Tensor]:
    """The same of several scores, each with its own k."""
    assert all(0 < k < s.shape[-1] for s, k in zip(scores, ks, strict=True)), (ks, [s.shape for s in scores])
    with torch.no_grad():
        taus = thresholds(scores, ks=ks, temperature=temperature)
    return [_soft(s, tau, k, temperature) for s, tau, k in zip(scores, taus, ks, strict=True)]


def _soft(scores: Tensor, tau: Tensor, k: float, temperature: float) -> Tensor:
    z = torch.sigmoid((scores - tau) / temperature)
    slope = (z * (1 - z)).detach().sum(-1, keepdim=True).clamp(min=torch.finfo(z.dtype).tiny)
    # A Newton step from the solution moves it by nothing, and has the gradient of tau as a function of the scores.
    tau = tau + temperature * (z.sum(-1, keepdim=True) - k) / slope
    return torch.sigmoid((scores - tau) / temperature)


def thresholds(scores: Sequence[Tensor], *, ks: Sequence[float], temperature: float) -> list[Tensor]:
    """Each one's tau [..., 1], by bisection of all of them at once.

    So many small kernels would take a GPU longer to start than to run, one set of them for each axis.
    """
    size = max(s.shape[-1] for s in scores)
    rows = [s.reshape(-1, s.shape[-1]) / temperature for s in scores]
    wide = 30  # sigmoid(-30) is 1e-13
    low = torch.cat([row.amin(-1, keepdim=True) for row in rows]) - wide
    high = torch.cat([row.amax(-1, keepdim=True) for row in rows]) + wide
    wanted = torch.cat([row.new_full((len(row), 1), k) for row, k in zip(rows, ks, strict=True)])
    together = torch.cat([functional.pad(row, (0, size - row.shape[-1]), value=-torch.inf) for row in rows])
    tau, step = (low + high) / 2, (high - low) / 2
    for power in range(1, BISECTIONS):
        excess = (together - tau).sigmoid_().sum(-1, keepdim=True).sub_(wanted)
        tau.addcmul_(excess.sign_(), step, value=0.5**power)
    parts = (tau * temperature).split([len(row) for row in rows])
    return [part.view(*s.shape[:-1], 1) for part, s in zip(parts, scores, strict=True)]
