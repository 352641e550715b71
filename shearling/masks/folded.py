"""The modules that take a masked model's place of the plain ones, with the same parameters under the same names.

N tokens, O outputs, I inputs. A masked linear keeps nothing for backward that a plain one doesn't: the folded weight
is made again there. Measured against the alternatives in benchmarks/masked_step.py.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional


def fold(weight: Tensor, row: Tensor | None, column: Tensor | None) -> Tensor:
    """weight [O, I] times row [O] and column [I], in the wider of their dtypes; the weight itself if both are None."""
    if row is not None:
        weight = weight * row.unsqueeze(-1)
    if column is not None:
        weight = weight * column
    return weight


class FoldedLinear(torch.autograd.Function):
    """x [..., I] -> [..., O] through fold(weight, row, column), with gradients for all four.

    With G the gradient of the folded weight: dW = fold(G), d row = (G * W) column, d column = (G * W)^T row.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, row: Tensor | None, column: Tensor | None, dtype: torch.dtype) -> Tensor:
        return functional.linear(x.to(dtype), fold(weight, row, column).to(dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, row, column, ctx.dtype = inputs
        ctx.save_for_backward(x, weight, row, column)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, row, column = ctx.saved_tensors
        grad = grads[0].to(ctx.dtype)
        dx = dweight = drow = dcolumn = None
        if ctx.needs_input_grad[0]:
            dx = (grad @ fold(weight, row, column).to(ctx.dtype)).to(x.dtype)
        if any(ctx.needs_input_grad[1:4]):
            # In the widest dtype from here on: a mask's gradient sums over a whole row of G * W.
            g = (grad.flatten(0, -2).T @ x.to(ctx.dtype).flatten(0, -2)).to(
                torch.promote_types(weight.dtype, torch.float32)
            )
            if ctx.needs_input_grad[1]:
                dweight = fold(g, row, column).to(weight.dtype)
            g = g * weight
            if ctx.needs_input_grad[2]:
                drow = g.sum(-1) if column is None else g @ column.to(g.dtype)
            if ctx.needs_input_grad[3]:
                dcolumn = g.sum(0) if row is None else row.to(g.dtype) @ g
        return dx, dweight, drow, dcolumn, None


class MaskedLinear(nn.Module):
    """An nn.Linear whose weight is multiplied by a row mask [O] and a column mask [I], its bias by the row mask."""

    def __init__(self, linear: nn.Linear, row: Tensor | None, column: Tensor | None):
        super().__init__()
        self.plain = (linear,)  # in a tuple, so that its parameters are not registered twice
        self.weight, self.bias = linear.weight, linear.bias
        self.row, self.column = row, column

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        with torch.autocast(kind, enabled=False):
            y: Any = FoldedLinear.apply(x, self.weight, self.row, self.column, dtype)
            if self.bias is not None:
                y = y + (self.bias if self.row is None else self.bias * self.row).to(dtype)
        return y


class MaskedNorm(nn.Module):
    """A norm over an axis of which only some entries are alive: its own forward, weight and epsilon rescaled.

    `scale` is sqrt(m / D) as a tensor, `eps` the source's times m / D: tensors, since a float that changes at every
    step would have a compiled model compiled again.
    """

    def __init__(self, norm: nn.Module, eps_attribute: str, scale: Tensor, eps: Tensor):
        super().__init__()
        self.plain = (norm,)
        self.eps_attribute, self.source_eps = eps_attribute, getattr(norm, eps_attribute)
        self.weight = norm.get_parameter("weight")
        self.scale = scale
        setattr(norm, eps_attribute, eps)

    def forward(self, x: Tensor) -> Tensor:
        return functional_call(self.plain[0], {"weight": self.weight * self.scale}, (x,))


class MaskedEmbedding(nn.Module):
    """An nn.Embedding whose output [..., hidden] is masked; its table, perhaps shared with the head, stays plain."""

    def __init__(self, embedding: nn.Embedding, column: Tensor):
        super().__init__()
        self.plain = (embedding,)
        self.weight = embedding.weight
        self.column = column

    def forward(self, ids: Tensor) -> Tensor:
        return functional_call(self.plain[0], {"weight": self.weight}, (ids,)) * self.column.to(self.weight.dtype)
