"""An objective with the routers' load-balancing loss beside it, and the experts' loads for the record."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from shearling.data.batch import Batch
from shearling.loss.balance import load_balance, loads
from shearling.train.objective import Losses, Objective


class Balanced:
    """`objective` + coefficient x balance, per token; `routers` are the paths of modules that give their logits first.

    A term of the loop as well, for its figures: of the last micro-batch the largest and the smallest load of an expert
    in any layer, as multiples of an even one.
    """

    def __init__(self, objective: Objective, *, routers: Sequence[str], top_k: int, coefficient: float):
        self.objective, self.routers = objective, tuple(routers)
        self.top_k, self.coefficient = top_k, coefficient
        self._loads: list[tuple[Tensor, Tensor]] = []

    def __call__(self, model: Any, batch: Batch) -> Losses:
        with self._listening(model) as logits:
            losses = self.objective(model, batch)
        balance = load_balance(logits, self.top_k)
        self._loads = [_relative(layer.detach(), self.top_k) for layer in logits]
        total = losses.total + self.coefficient * balance * losses.counts.sum()
        return Losses(total, {**losses.sums, "balance": balance.detach() * losses.counts}, losses.counts)

    @contextmanager
    def _listening(self, model: Any) -> Iterator[list[Tensor]]:
        """What the routers' logits are in the forward pass; not when checkpointing makes it again."""
        logits: list[Tensor] = []
        handles = [
            model.get_submodule(path).register_forward_hook(lambda _, args, output: logits.append(output[0]))
            for path in self.routers
        ]
        try:
            yield logits
        finally:
            for handle in handles:
                handle.remove()

    def begin(self, step: int) -> None:
        """Nothing: an objective has no part before the passes."""

    def backward(self, step: int) -> None:
        """Nothing: it went backward with the loss."""

    def end(self, step: int) -> None:
        """Nothing."""

    def metrics(self) -> dict[str, float]:
        if not self._loads:
            return {}
        loads = torch.cat([found[there] for found, there in self._loads])
        return {"expert_load_most": float(loads.max()), "expert_load_least": float(loads.min())}


def _relative(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Loads of a layer's experts [E], as multiples of an even one, and which of them are there."""
    there = torch.isfinite(logits[0])
    return loads(logits, top_k) * there.sum() / top_k, there
