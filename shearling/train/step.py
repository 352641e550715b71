"""What a training run is made of: its settings, its state, and the terms that join the loss."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from shearling.train.schedule import Schedule


@dataclass(frozen=True)
class Settings:
    """How a run goes, all explicit. A batch is `batch_sequences` windows of `seq_len` tokens."""

    steps: int
    seq_len: int
    batch_sequences: int
    micro_sequences: int
    schedule: Schedule
    clip_norm: float = 1.0
    eval_every: int = 0  # steps between held-out losses; 0: only at the ends
    log_every: int = 1
    autocast: torch.dtype | None = None

    @property
    def batch_tokens(self) -> int:
        return self.batch_sequences * self.seq_len


@dataclass(frozen=True)
class State:
    """Where a run is. With the weights, the optimizers and the terms' own state, all that the next step depends on."""

    step: int
    tokens: int
    sampler: Any

    def after(self, tokens: int, sampler: Any) -> "State":
        return replace(self, step=self.step + 1, tokens=self.tokens + tokens, sampler=sampler)


class Term(Protocol):
    """What takes part in each step beside the cross-entropy, such as masks under their constraint."""

    def begin(self, step: int) -> None:
        """Before the forward passes of a step."""
        ...

    def backward(self, step: int) -> None:
        """After them: adds what gradients are the term's own."""
        ...

    def end(self, step: int) -> None:
        """After the optimizers have stepped."""
        ...

    def metrics(self) -> dict[str, float]:
        """Figures for the record."""
        ...


Draw = Callable[[Any], tuple[Tensor, Any]]  # sampler state -> (ids [B, T + 1], the state after)
Log = Callable[..., None]  # (event, **fields)
Evaluate = Callable[[], dict[str, float]]  # held-out loss by domain, of the model as it is
