"""The modules that take the place of a router and of a stack of experts, with the same parameters under the same names.

N tokens, E experts, k of them for each token, H channels, I entries of an expert's inner axis. transformers keeps a
layer's experts as 3-D parameters of one module, called with what its router gives: (x [N, H], which [N, k], weights
[N, k]). So what multiplies an expert's output goes on its routing weight, what multiplies channels on what the module
gives, and only what lies inside, on I, is folded into a weight: a copy of the down weights is kept for backward then.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from shearling.masks.folded import called
from shearling.masks.hard_concrete import KEPT_MIN


class _Excluding(TorchFunctionMode):
    """Within it every linear map gives -inf where `removed` says: routers compute their logits inside themselves."""

    def __init__(self, removed: Tensor):
        super().__init__()
        self.removed = removed

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        return found.masked_fill(self.removed, -torch.inf) if func is functional.linear else found


class MaskedRouter(nn.Module):
    """A router that never chooses a removed expert: one whose `support` [E] is below what a kept value can be.

    Its logits are -inf before softmax and top-k. Those that stay are not rescaled: their soft values belong on the
    weights that the router ends with.
    """

    def __init__(self, router: nn.Module, support: Tensor):
        super().__init__()
        self.plain = (router,)  # in a tuple, so that its parameters are not registered twice
        for name, parameter in router.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        self.support = support

    def forward(self, x: Tensor) -> Any:
        removed = self.support.detach() < KEPT_MIN
        # In a layer that goes itself nothing is kept, and nothing of what it gives counts: no softmax of -inf alone.
        with _Excluding(removed & ~removed.all()):
            return called(self.plain[0], dict(self.named_parameters(recurse=False)), x)


class MaskedExperts(nn.Module):
    """A stack of experts under masks: `expert` [E], `row` [H], `column` [E * I] on the parameter called `down`.

    `inner` is the dim of that parameter along which I lies: 1 or 2.
    """

    def __init__(
        self,
        experts: nn.Module,
        down: str,
        *,
        expert: Tensor | None,
        row: Tensor | None,
        column: Tensor | None,
        inner: int,
    ):
        super().__init__()
        self.plain = (experts,)
        for name, parameter in experts.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        self.down, self.expert, self.row, self.column, self.inner = down, expert, row, column, inner

    def forward(self, x: Tensor, which: Tensor, weights: Tensor) -> Tensor:
        parameters: dict[str, Tensor] = dict(self.named_parameters(recurse=False))
        if self.column is not None:
            plain = parameters[self.down]
            column = self.column.view(plain.shape[0], plain.shape[self.inner]).unsqueeze(3 - self.inner)
            parameters[self.down] = (plain * column).to(plain.dtype)
        if self.expert is not None:
            weights = weights * self.expert.to(weights.dtype)[which]
        y = called(self.plain[0], parameters, x, which, weights)
        return y if self.row is None else y * self.row.to(y.dtype)
