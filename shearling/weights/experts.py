"""Stacks of experts under autocast, which knows nothing of torch's grouped product."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shearling.axes.spec import Family
from shearling.axes.target import EXPERTS_ROW_BYTES

STEP = EXPERTS_ROW_BYTES // torch.bfloat16.itemsize


def autocast_experts(model: Any, family: Family, config: Mapping[str, Any]) -> None:
    """Has a family's stacks of experts compute in autocast's dtype where it is on, as linears do.

    Else they would in that of their weights, float32 in training, and compiled one by one. Stacks whose sizes the
    kernel doesn't take in 16 bits stay as they are.
    """
    for row, layer in family.named(config):
        if row.ends_stack:
            stack = model.get_submodule(row.at(layer).rpartition(".")[0])
            sizes = [size for p in stack.parameters(recurse=False) if p.dim() == 3 for size in p.shape[1:]]
            if all(size % STEP == 0 for size in sizes):
                stack.forward = partial(_narrowed, stack, stack.forward)


def _narrowed(stack: nn.Module, forward: Callable[..., Tensor], x: Tensor, *routing: Tensor) -> Tensor:
    if not torch.is_autocast_enabled(x.device.type):
        return forward(x, *routing)
    dtype, kept = torch.get_autocast_dtype(x.device.type), dict(stack._parameters)
    narrow: Any = {name: None if p is None else p.to(dtype) for name, p in kept.items()}
    stack._parameters.update(narrow)
    try:
        return forward(x.to(dtype), *routing)
    finally:
        stack._parameters.update(kept)
