"""Distillation as an objective: the next token, a teacher's distribution of it, perhaps its residual stream.

B sequences, T tokens. A student under masks is a student like any other; the teacher has none.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from shearling.data.batch import IGNORED, Batch
from shearling.loss.cross_entropy import hidden_states
from shearling.loss.distillation import Taught, blended_loss
from shearling.loss.logits import logit_cap, read_by_head
from shearling.loss.streams import Weights, in_order, outputs_of, stream_loss
from shearling.train.objective import Losses, by_domain, target_counts


class Lesson(Protocol):
    """What a teacher says of a batch: of its B x T next tokens, and its stream [B, T, C] after each layer asked for."""

    @property
    def taught(self) -> Taught: ...
    @property
    def streams(self) -> Sequence[Tensor]: ...


class Teacher(Protocol):
    """Teaches a batch, in whatever autocast; keeps nothing of it."""

    def __call__(self, batch: Batch) -> Lesson: ...


@dataclass(frozen=True)
class Streams:
    """The hidden-state term: the student's blocks, by path, in the order of the lessons' streams, and its weight.

    `counting` says what of them counts how much at present; left out: all alike.
    """

    blocks: tuple[str, ...]
    weight: float
    counting: Callable[[], Weights] = Weights


def linear(step: int, steps: int, *, start: float, end: float) -> float:
    """From `start` at the first step to `end` at the last."""
    return start + (end - start) * min(1.0, step / max(1, steps - 1))


class Distilled:
    """(1 - share) cross-entropy + share KL(teacher || student), and what of the streams is asked for.

    An objective, and a term as well: with each step's beginning the share is what `share` says for (step, steps).
    Figures beside "loss", the cross-entropy: "kl" in nats, and "hidden", the streams' relative square error.
    """

    def __init__(
        self,
        teacher: Teacher,
        *,
        domains: int,
        share: Callable[[int, int], float],
        steps: int,
        streams: Streams | None = None,
    ):
        self.teacher, self.domains, self.streams = teacher, domains, streams
        self._schedule, self._steps = share, steps
        self.share = share(0, steps)

    def __call__(self, model: Any, batch: Batch) -> Losses:
        lesson, paths = self.teacher(batch), self.streams.blocks if self.streams else ()
        with outputs_of(model, paths) as seen:
            hidden = hidden_states(model, batch.ids[:, :-1], position_ids=batch.position_ids)
        kind, targets = hidden.device.type, batch.targets
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        hidden, weight = read_by_head(model, hidden)
        total, loss, kl = blended_loss(
            hidden.flatten(0, 1),
            weight,
            targets.flatten(),
            lesson.taught,
            share=self.share,
            dtype=dtype,
            cap=logit_cap(model),
        )
        figures = {"loss": loss.view_as(targets), "kl": kl.view_as(targets)}
        if self.streams:
            apart = stream_loss(in_order(seen, paths), lesson.streams, self.streams.counting())
            apart = apart * (targets != IGNORED)
            total = total + self.streams.weight * apart.sum()
            figures["hidden"] = apart.detach()
        sums = {name: by_domain(figure, batch.domains, self.domains) for name, figure in figures.items()}
        return Losses(total, sums, target_counts(batch, self.domains))

    def begin(self, step: int) -> None:
        self.share = self._schedule(step, self._steps)

    def backward(self, step: int) -> None:
        """Nothing: an objective's part is done."""

    def end(self, step: int) -> None:
        """Nothing."""

    def metrics(self) -> dict[str, float]:
        return {"kl_share": self.share}
