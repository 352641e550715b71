"""The modules that take a masked model's place of the plain ones, with the same parameters under the same names.

N tokens, O outputs, I inputs. A masked linear keeps no more for backward than a plain one: on a GPU under autocast the
folded weight where that keeps a cast of its own, otherwise none, and it is made again. Measured against the
alternatives in benchmarks/masked_step.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Centre:
    """The matrix I - k 1^T / m over O outputs: `keep` k is [O], `count` m one number."""

    keep: Tensor
    count: Tensor

    def vector(self, x: Tensor) -> Tensor:
        """Along the last dimension: [..., O] -> [..., O]."""
        return x - self.keep.to(x.dtype) * (x.sum(-1, keepdim=True) / self.count.to(x.dtype))


def fold(
    weight: Tensor,
    row: Tensor | None,
    column: Tensor | None,
    keep: Tensor | None = None,
    count: Tensor | None = None,
    *,
    dtype: torch.dtype,
) -> Tensor:
    """weight [O, I] times row [O] and column [I], its rows centred: in the widest dtype, then rounded to `dtype`."""
    factors = [factor for factor in (None if row is None else row.unsqueeze(-1), column) if factor is not None]
    for factor in factors[:-1]:
        weight = weight * factor
    if keep is None or count is None:
        return _times(weight, factors[-1], dtype) if factors else weight.to(dtype)
    weight = weight * factors[-1] if factors else weight
    with torch.autocast(weight.device.type, enabled=False):
        mean = (weight.sum(0) / count).to(weight.dtype)
        return torch.addr(weight, keep.to(weight.dtype), mean, alpha=-1).to(dtype)


def _times(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """(a * b).to(dtype), which a GPU does in one kernel."""
    as_it_is = torch.promote_types(a.dtype, b.dtype) == dtype
    return a * b if as_it_is else torch.mul(a, b, out=torch.empty_like(a, dtype=dtype))


class FoldedLinear(torch.autograd.Function):
    """x [..., I] -> [..., O] through fold(weight, row, column, keep, count), with gradients for all but the count.

    With G the gradient of the folded weight, brought before the centring as G - 1 (k^T G) / m:
    dW = fold(G), d row = (G * W) column, d column = (G * W)^T row; dk = -G s / m, s the sums that centring took off.
    """

    # With a `setup_context` torch would bind the arguments to the signature at each call, which takes the host longer
    # than to start all of the kernels.
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        row: Tensor | None,
        column: Tensor | None,
        keep: Tensor | None,
        count: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        folded = fold(weight, row, column, keep, count, dtype=dtype)
        # In place of the cast that autocast keeps for a plain linear: as wide as the weight it would be a copy more.
        # Only a GPU gains by it, where the host is what is slow; on a CPU the peak was 6% higher, the step no faster.
        kept = folded if x.is_cuda and dtype != weight.dtype else None
        ctx.save_for_backward(x, weight, row, column, keep, count, kept)
        ctx.dtype = dtype
        return functional.linear(x.to(dtype), folded)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Compiled, a backward runs under its forward's autocast, which would take masks' gradients in its dtype.
        with torch.autocast(grads[0].device.type, enabled=False):
            return _folded_backward(ctx, grads[0].to(ctx.dtype))


def _folded_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, row, column, keep, count, folded = ctx.saved_tensors
    dx = dweight = drow = dcolumn = dkeep = None
    if ctx.needs_input_grad[0]:
        folded = fold(weight, row, column, keep, count, dtype=ctx.dtype) if folded is None else folded
        dx = (grad @ folded).to(x.dtype)
    if any(ctx.needs_input_grad[1:5]):
        # In the widest dtype from here on: a mask's gradient sums over a whole row of G * W.
        wide = torch.promote_types(weight.dtype, torch.float32)
        g = grad.flatten(0, -2).T @ x.to(ctx.dtype).flatten(0, -2)
        if keep is not None or weight.dtype != wide:  # else what it is multiplied by makes it wide
            g = g.to(wide)
        if keep is not None:
            if ctx.needs_input_grad[4]:
                dkeep = g @ (fold(weight, row, column, dtype=wide).sum(0) / -count).to(wide)
            g = g - keep.to(wide) @ g / count
        if ctx.needs_input_grad[1]:
            dweight = fold(g, row, column, dtype=weight.dtype)
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            g = g * weight
        if ctx.needs_input_grad[2]:
            drow = g.sum(-1) if column is None else g @ column.to(wide)
        if ctx.needs_input_grad[3]:
            dcolumn = g.sum(0) if row is None else g.T @ row.to(wide)
    return dx, dweight, drow, dcolumn, dkeep, None, None


def called(module: nn.Module, parameters: Mapping[str, Tensor], *args: Any) -> Any:
    """module(*args) with these for parameters of its own, as torch.func.functional_call has it.

    What that looks at first takes the host as long as a norm's forward does.
    """
    own = module._parameters
    kept = {name: own[name] for name in parameters}
    own.update(cast(Any, parameters))
    try:
        return module(*args)
    finally:
        own.update(kept)


class MaskedLinear(nn.Module):
    """A linear whose weight is multiplied by a row mask [O] and a column mask [I], its bias by the row mask.

    `transposed`: the weight is stored as [I, O], as transformers' Conv1D has it.
    """

    def __init__(
        self,
        linear: nn.Module,
        row: Tensor | None,
        column: Tensor | None,
        *,
        centre: Centre | None = None,
        transposed: bool = False,
    ):
        super().__init__()
        self.plain = (linear,)  # in a tuple, so that its parameters are not registered twice
        self.weight = linear.get_parameter("weight")
        self.bias = dict(linear.named_parameters(recurse=False)).get("bias")
        self.row, self.column, self.centre, self.transposed = row, column, centre, transposed

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        weight = self.weight.T if self.transposed else self.weight
        keep, count = (None, None) if self.centre is None else (self.centre.keep, self.centre.count)
        y: Any = FoldedLinear.apply(x, weight, self.row, self.column, keep, count, dtype)
        if self.bias is not None:
            bias = self.bias if self.row is None else self.bias * self.row
            y = y + (bias if self.centre is None else self.centre.vector(bias)).to(dtype)
        return y


class MaskedNorm(nn.Module):
    """A norm over entries of which only some are alive: its own forward, weight and epsilon rescaled.

    `scale` is sqrt(m / D) as a tensor, `eps` the source's times m / D: tensors, since a float that changes at every
    step would have a compiled model compiled again. Without an `eps` its input is scaled instead, which is the same:
    torch's LayerNorm takes nothing but a float. `soft` [D] multiplies what the norm gives, `support` [D] its bias;
    `offset` is what the stored weight lacks of the effective one.
    """

    def __init__(
        self,
        norm: nn.Module,
        scale: Tensor,
        *,
        eps_attribute: str = "",
        eps: Tensor | None = None,
        soft: Tensor | None = None,
        support: Tensor | None = None,
        offset: float = 0.0,
    ):
        super().__init__()
        self.plain = (norm,)
        self.weight = norm.get_parameter("weight")
        self.bias = dict(norm.named_parameters(recurse=False)).get("bias")
        self.scale, self.soft, self.support, self.offset = scale, soft, support, offset
        self.eps_attribute, self.source_eps = eps_attribute, getattr(norm, eps_attribute) if eps_attribute else None
        if eps is not None:
            setattr(norm, eps_attribute, eps)

    def forward(self, x: Tensor) -> Tensor:
        factor = self.scale if self.soft is None else self.scale * self.soft
        weight = (self.weight + self.offset) * factor - self.offset if self.offset else self.weight * factor
        parameters: dict[str, Tensor] = {"weight": weight}
        if self.bias is not None:
            bias = self.bias if self.soft is None else self.bias * self.soft
            parameters["bias"] = bias if self.support is None else bias * self.support
        return called(self.plain[0], parameters, x if self.eps_attribute else x / self.scale.to(x.dtype))

    def restore(self) -> nn.Module:
        """The plain norm as it was."""
        if self.eps_attribute:
            setattr(self.plain[0], self.eps_attribute, self.source_eps)
        return self.plain[0]


class MaskedEmbedding(nn.Module):
    """An nn.Embedding whose output [..., hidden] is masked; its table, perhaps shared with the head, stays plain."""

    def __init__(self, embedding: nn.Module, column: Tensor, *, centre: Centre | None = None):
        super().__init__()
        self.plain = (embedding,)
        self.weight = embedding.get_parameter("weight")
        self.column, self.centre = column, centre

    def forward(self, ids: Tensor) -> Tensor:
        y = called(self.plain[0], {"weight": self.weight}, ids) * self.column.to(self.weight.dtype)
        return y if self.centre is None else self.centre.vector(y)
