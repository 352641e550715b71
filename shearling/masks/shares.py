"""What lies along the masked dims of all layers, made from the masks by a few operations for all of them at once.

L layers, E entries of a dim. One layer's vector is so small that a GPU takes longer to start the kernels that make it
than to run them; a set of them for each layer leaves it waiting for the host.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from math import gcd, prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from shearling.axes.axis import is_per_layer, mask_shape

Masks = Mapping[str, Tensor]  # by axis, [*within, size]
ALIGNED_BYTES = 16  # of what modules see: compiled code copies an input that lies elsewhere


@dataclass(frozen=True)
class Part:
    """Of the mask along `axis` its entries `where` (None: all, in order), each of them `each` times in a row."""

    axis: str
    where: Tensor | None = None
    each: int = 1
    padded: bool = False  # `where` has entries that the axis says nothing of, at -1

    @classmethod
    def at(cls, axis: str, positions: Sequence[int], sizes: Mapping[str, int], device: Any) -> "Part":
        """`positions` as axes/index.py gives them. No index where none is needed: its gradient would sort."""
        shape = mask_shape(axis, sizes)
        size = prod(shape[1:] if is_per_layer(axis) else shape)
        each = gcd(*(sum(1 for _ in run) for _, run in groupby(positions)))
        taken = list(positions[::each])
        where = None if taken == list(range(size)) else torch.tensor(taken, device=device)
        return cls(axis, where, each, padded=-1 in taken)

    def of(self, masks: Masks) -> Tensor:
        """[L, E], or [1, E] of what is all layers', or [L, 1] of what is all entries'."""
        mask = masks[self.axis]
        rows = mask.reshape(len(mask), -1) if is_per_layer(self.axis) else mask.reshape(1, -1)
        if self.where is not None:
            # A 1 behind all others, at -1, for the entries that the axis says nothing of.
            rows = (functional.pad(rows, (0, 1), value=1.0) if self.padded else rows)[:, self.where]
        return rows if self.each == 1 else rows.unsqueeze(-1).expand(-1, -1, self.each).flatten(1)


@dataclass(frozen=True)
class Share:
    """The masks that lie along one dim, `entries` long, of `layers` layers; 1 for what belongs to none."""

    parts: tuple[Part, ...]
    layers: int
    entries: int

    def of(self, masks: Masks) -> Tensor:
        """Their product, [L, E]."""
        value: Tensor | None = None
        for part in self.parts:
            value = part.of(masks) if value is None else value * part.of(masks)
        assert value is not None
        return value.expand(self.layers, self.entries)


@dataclass(frozen=True)
class Rows:
    """A buffer of a row for each layer, [L, ...], and the rows that modules see, each a tensor of its own."""

    buffer: Tensor
    seen: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def ones(cls, share: Share, device: Any, *, entries: int) -> "Rows":
        per = ALIGNED_BYTES // torch.get_default_dtype().itemsize
        return cls(torch.ones(share.layers, -(-entries // per) * per, device=device)[:, :entries])

    def at(self, layer: int | None) -> Tensor:
        """A layer's row, or the one of what belongs to none; the same tensor each time."""
        row = layer or 0
        if row not in self.seen:
            self.seen[row] = self.buffer[row].detach()
        return self.seen[row]


class Vectors:
    """What multiplies one dim of the weights that share it, in all layers: leaves [E] that modules see."""

    def __init__(self, share: Share, *, support: bool, device: Any):
        self.share, self.support = share, support  # made of the masks' supports, not of their values
        self.rows = Rows.ones(share, device, entries=share.entries)
        self.value = self.rows.buffer  # [L, E], what the leaves were last set to, with its graph

    def leaf(self, layer: int | None) -> Tensor:
        return self.rows.at(layer).requires_grad_()

    def set(self, masks: Masks, support: Masks) -> None:
        self.value = self.share.of(support if self.support else masks)
        with torch.no_grad():
            self.rows.buffer.copy_(self.value)
        for leaf in self.rows.seen.values():
            leaf.grad = None
            if self.support:  # of a support that is counted there is nothing to learn
                leaf.requires_grad_(self.value.requires_grad)

    def forget(self) -> None:
        """Lets go of the graph."""
        self.value = self.rows.buffer

    @property
    def learned(self) -> bool:
        """Whether gradients go on from here."""
        return self.value.requires_grad

    @property
    def reached(self) -> bool:
        """Whether a gradient has come to any leaf."""
        return any(leaf.grad is not None for leaf in self.rows.seen.values())

    def gradient(self) -> Tensor:
        """[L, E], 0 where none came."""
        zero = self.rows.buffer.new_zeros(self.share.entries)
        grads = {row: leaf.grad for row, leaf in self.rows.seen.items() if leaf.grad is not None}
        return torch.stack([grads.get(row, zero) for row in range(self.share.layers)])


class Counts:
    """How many of a dim's D entries are alive in each layer, m, as norms see it.

    Numbers that modules see: `alive` m, `scale` sqrt(m / D), `eps` x m / D.
    """

    def __init__(self, share: Share, device: Any):
        self.share, self.device = share, device
        self.alive, self.scale = self._numbers(), self._numbers()
        self._eps: dict[float, Rows] = {}

    def eps(self, source: float) -> Rows:
        if source not in self._eps:
            self._eps[source] = self._numbers()
            self._eps[source].buffer.fill_(source)
        return self._eps[source]

    def _numbers(self) -> Rows:
        return Rows(Rows.ones(self.share, self.device, entries=1).buffer[:, 0])

    @torch.no_grad()
    def set(self, support: Masks) -> None:
        """No gradient goes through the count."""
        alive = self.share.of(support).mean(-1).clamp(min=1 / self.share.entries)
        self.alive.buffer.copy_(alive * self.share.entries)
        self.scale.buffer.copy_(alive.sqrt())
        for source, rows in self._eps.items():
            rows.buffer.copy_(source * alive)
