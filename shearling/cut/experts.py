"""One-shot scores of experts and of what lies inside them, from what goes through each of them in calibration.

N tokens, E experts, k for each token, H channels, I entries of an expert's inner axis. An expert's score is the mean,
over the tokens that it was chosen for, of routing weight x norm of its output (REAP, arXiv 2510.13999, eq. 9). An inner
entry's is its mean square under the routing weight, by the norm of its column of the down weight.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from shearling.axes.table import Tensor as Row
from shearling.axes.table import bias_name
from shearling.ranks.rows import gathered


class Stack:
    """One layer's experts, watched: `row` is their down weight's."""

    def __init__(self, model: nn.Module, row: Row, layer: int):
        path, _, self.down = row.at(layer).rpartition(".")
        self.row, self.layer = row, layer
        self.module = model.get_submodule(path)
        weight = self._down()  # [E, H, I]
        experts, _, inner = weight.shape
        self.tokens = 0
        self.chosen = torch.zeros(experts, dtype=torch.float64)
        self.outputs = torch.zeros(experts, dtype=torch.float64)
        self.squares = torch.zeros(experts, inner, dtype=torch.float64)

    def _down(self) -> Tensor:
        weight = self.module.get_parameter(self.down).detach()
        return weight.transpose(1, 2) if self.row.input == 1 else weight

    def watch(self) -> Any:
        """The hook's handle."""
        return self.module.register_forward_pre_hook(self._see)

    def _see(self, _: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> None:
        x, which, weights = args
        self.tokens += len(x)
        bias = dict(self.module.named_parameters()).get(bias_name(self.down))
        for expert in which.unique().tolist():
            token, slot = torch.where(which == expert)
            gate = weights[token, slot].float()
            inner = self._inner(x[token], expert).float()
            output = inner @ self._down()[expert].float().T
            output = output if bias is None else output + bias[expert].float()
            self.chosen[expert] += len(token)
            self.outputs[expert] += (gate * output.norm(dim=-1)).sum().cpu().double()
            self.squares[expert] += (gate.unsqueeze(-1) * inner).square().sum(0).cpu().double()

    def _inner(self, x: Tensor, expert: int) -> Tensor:
        """What the down weight of one expert reads, [n, I]: the module's own forward, with selectors in its place."""
        weight, device = self._down(), x.device
        _, channels, inner = weight.shape
        which = torch.full((len(x), 1), expert, device=device)
        ones = torch.ones(len(x), 1, dtype=x.dtype, device=device)
        name = bias_name(self.down)
        parameters: dict[str, Tensor] = dict(self.module.named_parameters())
        if name in parameters:
            parameters[name] = torch.zeros_like(parameters[name])
        parts = []
        with _eager(self.module):
            for start in range(0, inner, channels):
                selector = torch.eye(inner, dtype=weight.dtype, device=device)[start : start + channels]
                selector = torch.nn.functional.pad(selector, (0, 0, 0, channels - len(selector)))
                selector = selector.T if self.row.input == 1 else selector
                parameters[self.down] = selector.expand(len(weight), -1, -1)
                parts.append(functional_call(self.module, parameters, (x, which, ones)))
        return torch.cat(parts, -1)[:, :inner]

    def scores(self) -> tuple[Tensor, Tensor]:
        """Of the experts [E], and of their inner entries [E, I]; 0 where no token came."""
        column = gathered(self._down()).float().square().sum(1).cpu().double()
        return self.outputs / self.chosen.clamp(min=1), self.squares / max(1, self.tokens) * column


def stacks(model: nn.Module, rows: Sequence[tuple[Row, int | None]]) -> Iterator[Stack]:
    """The stacks of experts of a model's layers."""
    for row, layer in rows:
        if row.ends_stack:
            assert layer is not None
            yield Stack(model, row, layer)


class _eager:
    """Within it a module of experts takes its plain loop, which asks nothing of shapes and strides.

    It is seen as a hook of the module itself: the forward that it calls must not be watched again.
    """

    def __init__(self, module: Any):
        self.module, self.config = module, module.config
        self.before = self.config._experts_implementation

    def __enter__(self) -> None:
        self.config._experts_implementation = "eager"
        self.hooks, self.module._forward_pre_hooks = self.module._forward_pre_hooks, {}

    def __exit__(self, *_: object) -> None:
        self.config._experts_implementation = self.before
        self.module._forward_pre_hooks = self.hooks
