"""A teacher that runs beside its student. B sequences, T tokens, D hidden, V vocabulary, C channels compared."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shearling.data.batch import Batch
from shearling.loss.cross_entropy import hidden_states
from shearling.loss.distillation import Dense, Taught
from shearling.loss.logits import logit_cap, read_by_head
from shearling.loss.streams import in_order, outputs_of
from shearling.ranks.sharded import device_of, inside


def _read(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """What its head reads, [B, T, D], and the head's weight."""
    return read_by_head(model, hidden_states(model, batch.ids[:, :-1], position_ids=batch.position_ids))


@dataclass(frozen=True)
class Lesson:
    """What is taught of a batch's B x T next tokens, and the teacher's stream [B, T, C] after each layer asked for."""

    taught: Taught
    streams: tuple[Tensor, ...] = ()


class LiveTeacher:
    """A frozen model on any device, in a dtype of its own whatever the student's autocast.

    Of a batch it holds what its head reads, [B, T, D], and the streams after `blocks`, at `channels` or whole.
    """

    def __init__(self, model: Any, *, blocks: tuple[str, ...] = (), channels: tuple[int, ...] | None = None):
        self.model, self.blocks = model, blocks
        self.device = device_of(model)
        self._channels = None if channels is None else torch.tensor(channels, device=self.device)

    def __call__(self, batch: Batch) -> Lesson:
        batch = batch.to(self.device)
        # Not inference_mode: autograd may not keep what is made there, and the streams' loss does.
        with (
            torch.no_grad(),
            torch.autocast(self.device.type, enabled=False),
            outputs_of(self.model, self.blocks, channels=self._channels) as seen,
        ):
            hidden, weight = inside(self.model, _read, batch, stays=True)
        dense = Dense(hidden.flatten(0, 1), weight, logit_cap(self.model))
        return Lesson(dense, in_order(seen, self.blocks))
