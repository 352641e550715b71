"""What a training run is made of: its settings, its state, and who takes part in a step."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from shearling.data.batch import Batch
from shearling.train.objective import Losses
from shearling.train.schedule import Schedule
from shearling.train.skipping import Skipped


@dataclass(frozen=True)
class Settings:
    """How a run goes, all explicit. A batch is `batch_sequences` windows of `seq_len` tokens."""

    steps: int
    seq_len: int
    batch_sequences: int
    micro_sequences: int
    domains: tuple[str, ...]
    schedule: Schedule
    clip_norm: float = 1.0
    eval_every: int = 0  # steps between held-out losses; 0: only at the ends
    log_every: int = 1  # steps; at those between nobody waits for a GPU
    skip_at_most: int = 10  # steps in a row whose gradients aren't finite
    autocast: torch.dtype | None = None
    halves: bool = False  # `micro_sequences`, where a step runs out of memory

    @property
    def batch_tokens(self) -> int:
        return self.batch_sequences * self.seq_len


class MixtureInForce(Protocol):
    """Each domain's share of the batches, and by how much its loss was above its reference, where that is known."""

    @property
    def weights(self) -> Mapping[str, float]: ...
    @property
    def excess(self) -> Mapping[str, float]: ...


@dataclass(frozen=True)
class State:
    """Where a run is. With the weights, the optimizers and the terms' own state, all that the next step depends on.

    `tally`: the losses by domain since the mixture was last updated. `skipped`: the steps left out because their
    gradients weren't finite. `micro_sequences`: windows at a time so far, on which the bits depend.
    """

    step: int
    tokens: int
    sampler: Any
    mixture: Any  # a MixtureInForce, which only its Steering looks into
    tally: Losses | None = None
    skipped: Skipped | None = None
    micro_sequences: int | None = None

    def after(self, settings: Settings, sampler: Any, losses: Losses, left_out: Tensor) -> "State":
        """After a step; `left_out` is 1 if it was."""
        tally = losses if self.tally is None else self.tally + losses
        step, tokens = self.step + 1, self.tokens + settings.batch_tokens
        skipped = Skipped.after(self.skipped, step, losses, left_out)
        micro = settings.micro_sequences
        return State(step, tokens, sampler, self.mixture, tally, skipped, micro)


class Term(Protocol):
    """What takes part in each step beside the objective, such as masks under their constraint."""

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


class Keep(Protocol):
    """Who saves the run as it goes."""

    def __call__(self, state: State) -> None:
        """After each step: may save, and may end the run by raising."""
        ...

    @property
    def last(self) -> str:
        """Where the last checkpoint is, for messages."""
        ...


class Steering(Protocol):
    """Who decides the mixture: asked after every so many steps, from held-out losses or from those trained on."""

    @property
    def every(self) -> int: ...
    @property
    def wants_held_out(self) -> bool: ...

    def __call__(self, mixture: Any, losses: Mapping[str, Mapping[str, float | None]]) -> tuple[Any, dict[str, Any]]:
        """The mixture from the next step on, and what the record says of it.

        `losses` by name and domain: "held_out" where it is wanted, and those of the objective since the last time,
        None for a domain without samples.
        """
        ...


# (sampler's state, weights by domain) -> (a batch, or None at the data's end, the state after)
Draw = Callable[[Any, Mapping[str, float]], tuple[Batch | None, Any]]
Log = Callable[..., None]  # (event, **fields)
Evaluate = Callable[[], dict[str, float]]  # held-out loss by domain, of the model as it is
# (step, what the record has of it, excess by domain where it is known)
OnStep = Callable[[int, Mapping[str, float], Mapping[str, float]], None]
