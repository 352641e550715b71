"""What a step goes backward from: the loss of a micro-batch, and by domain what it was."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree

from shearling.data.batch import IGNORED, Batch
from shearling.loss.cross_entropy import head_losses, hidden_states
from shearling.loss.numbers import numbers_on, widest_float
from shearling.ranks.ranks import Ranks


@dataclass(frozen=True)
class Losses:
    """`total`: summed over the tokens asked for, to go backward from. `sums`: by name, detached sums by domain [D].

    "loss" is the cross-entropy in nats; an objective may have others beside it. `counts` int64 [D]: tokens asked for.
    """

    total: Tensor
    sums: Mapping[str, Tensor]
    counts: Tensor

    def __add__(self, other: "Losses") -> "Losses":
        sums = {name: value + other.sums[name] for name, value in self.sums.items()}
        return Losses(self.total + other.total, sums, self.counts + other.counts)

    def detached(self) -> "Losses":
        """The same figures without what they were computed from."""
        return Losses(self.total.detach(), self.sums, self.counts)

    def over(self, ranks: Ranks) -> "Losses":
        """What all ranks' come to: each gets the same figures."""
        if ranks.count == 1:
            return self
        counts = self.counts.to(self.total.device)
        parts = [self.total.reshape(1), counts, *self.sums.values()]
        wide = widest_float(self.total.device)
        whole = ranks.add_up(torch.cat([part.to(wide) for part in parts]))
        total, counts, *sums = whole.split([len(part) for part in parts])
        named = {name: value.float() for name, value in zip(self.sums, sums, strict=True)}
        return Losses(total[0].to(self.total.dtype), named, counts.long())

    def means(self) -> dict[str, float]:
        """Means over all tokens asked for, by name, and of what was gone backward from."""
        tokens = max(1, int(self.counts.sum()))
        means = {name: float(value.sum()) / tokens for name, value in self.sums.items()}
        return means if len(means) == 1 else {**means, "objective": float(self.total) / tokens}

    def by_domain(self, domains: Sequence[str]) -> dict[str, dict[str, float | None]]:
        """Means by name and domain; None where a domain had no token."""
        counts = self.counts.tolist()
        return {
            name: {d: s / n if n else None for d, s, n in zip(domains, value.tolist(), counts, strict=True)}
            for name, value in self.sums.items()
        }


# Hooks on what a sharded model's forward pass gives look for the tensors in it.
_pytree.register_dataclass(Losses, field_names=[field.name for field in fields(Losses)])


class Objective(Protocol):
    """The loss of a model on a micro-batch, in the autocast that the loop sets."""

    def __call__(self, model: Any, batch: Batch) -> Losses: ...


@dataclass(frozen=True)
class NextToken:
    """Cross-entropy of the next token, for a store of so many domains. `compiled`: what is done to the logits."""

    domains: int
    compiled: bool = False

    def __call__(self, model: Any, batch: Batch) -> Losses:
        hidden = hidden_states(model, batch.ids[:, :-1], position_ids=batch.position_ids)
        total, losses = head_losses(model, hidden, batch.targets, compiled=self.compiled)
        sums = {"loss": by_domain(losses, batch.domains, self.domains)}
        return Losses(total, sums, target_counts(batch, self.domains))


def by_domain(figure: Tensor, of: Sequence[int], domains: int) -> Tensor:
    """Sums of [B, T] over the windows of each domain, float32 [domains]."""
    # Not by index_add, whose order of summation changes from run to run on a GPU.
    device = figure.device
    belongs = torch.arange(domains, device=device).unsqueeze(-1) == numbers_on(device, of)
    return torch.where(belongs, figure.sum(-1).float(), 0.0).sum(-1)


def target_counts(batch: Batch, domains: int) -> Tensor:
    """Tokens asked for by domain, int64 [domains]."""
    asked = (batch.targets != IGNORED).sum(-1)
    index = numbers_on(asked.device, batch.domains)
    return torch.zeros(domains, dtype=torch.int64, device=asked.device).index_add(0, index, asked)
