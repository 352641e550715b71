"""Soft top-k: masks whose sum is exactly k at every step, hard as the temperature goes to 0.

z_i = sigmoid((s_i - tau) / T) with tau such that sum z = k. Of this form is the entropy-regularised top-k (Xie et al.
2020, arXiv 2002.06504, section 3, binary case). Everything acts along the last dimension: scores [..., size].
"""

from collections.abc import Sequence
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor

FAR = 30  # sigmoid(-30) is 1e-13
POINTS, ROUNDS = 7, 7
LEFT = 2 * FAR / (POINTS + 1) ** ROUNDS  # 3e-5, in units of the temperature: its square is below fp32


def soft_topk(scores: Tensor, *, k: float, temperature: float) -> Tensor:
    """z in (0, 1) with sum k along the last dimension, 0 < k < size. Differentiable in the scores, tau included."""
    (z,) = soft_topks([scores], ks=[k], temperature=temperature)
    return z


def soft_topks(scores: Sequence[Tensor], *, ks: Sequence[float], temperature: float) -> list[Tensor]:
    """The same of several scores, each with its own k."""
    assert all(0 < k < s.shape[-1] for s, k in zip(scores, ks, strict=True)), (ks, [s.shape for s in scores])
    return list(_SoftTopKs.apply(ks, temperature, *scores))  # type: ignore[arg-type]


class _SoftTopKs(torch.autograd.Function):
    """All of them as the rows of one matrix: so many small kernels would take a GPU longer to start than to run.

    sum z = k moves tau by d tau = sum w ds / sum w, with w = z (1 - z).
    """

    @staticmethod
    def forward(ctx: Any, ks: Sequence[float], temperature: float, *scores: Tensor) -> tuple[Tensor, ...]:
        wanted = torch.cat([s.new_full((prod(s.shape[:-1]), 1), k) for s, k in zip(scores, ks, strict=True)])
        z = _solved(_stacked(scores, fill=-torch.inf), wanted, temperature)
        ctx.save_for_backward(z)
        ctx.temperature, ctx.shapes = temperature, [s.shape for s in scores]
        return _parts(z, ctx.shapes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (z,) = ctx.saved_tensors
        w, whole = _slopes(z)
        moved = _stacked(grads, fill=0.0).mul_(w)
        moved.addcmul_(w, moved.sum(-1, keepdim=True).div_(whole), value=-1)
        return None, None, *_parts(moved.div_(ctx.temperature), ctx.shapes)


def _solved(rows: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """z [R, size] with sum `wanted` [R, 1]. All points that cut what is left for tau in eighths are tried at once, as a
    GPU takes no longer for them; the last step is Newton's.
    """
    # tau lies about the last entry of which some is wanted and the first of which not all is. From there, as scores by
    # a cold temperature are so large that fp32 is coarse.
    ordered = rows.sort(-1, descending=True).values
    zero, other = ordered.gather(-1, wanted.long()), ordered.gather(-1, wanted.ceil().long() - 1)
    rows = ((rows - zero) / temperature).unsqueeze(1)
    width = ((other - zero) / temperature + 2 * FAR).unsqueeze(1)
    tau, wanted = width / 2 - FAR, wanted.unsqueeze(1)
    points = torch.arange(POINTS, dtype=rows.dtype, device=rows.device).sub_(POINTS // 2).unsqueeze(-1)
    for power in range(1, ROUNDS + 1):
        share = (POINTS + 1) ** -power
        tried = torch.addcmul(tau, points, width, value=share)  # [R, POINTS, 1]
        excess = (rows - tried).sigmoid_().sum(-1, keepdim=True).sub_(wanted)
        tau.addcmul_(excess.sign_().sum(1, keepdim=True), width, value=share / 2)
    z = (rows - tau).sigmoid_()
    step = z.sum(-1, keepdim=True).sub_(wanted).div_(_slopes(z)[1])
    tau.add_(step.clamp_(-LEFT, LEFT))  # where all is open or shut there is rounding alone, and no slope
    return (rows - tau).sigmoid_().squeeze(1)


def _slopes(z: Tensor) -> tuple[Tensor, Tensor]:
    """d z / d (s / T) for each entry, and its sum [R, 1], which can be divided by."""
    w = torch.addcmul(z, z, z, value=-1)
    return w, w.sum(-1, keepdim=True).clamp_(min=torch.finfo(w.dtype).tiny)


def _stacked(tensors: Sequence[Tensor], *, fill: float) -> Tensor:
    """Their rows one below another, [R, widest]."""
    ends = _ends([t.shape for t in tensors])
    whole = tensors[0].new_full((ends[-1], max(t.shape[-1] for t in tensors)), fill)
    for tensor, (start, end) in zip(tensors, pairwise(ends), strict=True):
        size = tensor.shape[-1]
        whole[start:end, :size] = tensor.reshape(-1, size)
    return whole


def _parts(whole: Tensor, shapes: Sequence[torch.Size]) -> tuple[Tensor, ...]:
    """The tensors of which `whole` was stacked."""
    rows = zip(shapes, pairwise(_ends(shapes)), strict=True)
    return tuple(whole[start:end, : shape[-1]].view(shape) for shape, (start, end) in rows)


def _ends(shapes: Sequence[torch.Size]) -> list[int]:
    found = [0]
    for shape in shapes:
        found.append(found[-1] + prod(shape[:-1]))
    return found
