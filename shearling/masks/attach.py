"""Puts masks on a model: what axes/factors.py describes, as modules in place of the model's own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from shearling.axes.axis import is_per_layer
from shearling.axes.factors import Factor, factors
from shearling.axes.index import positions
from shearling.axes.spec import Family
from shearling.axes.table import Tensor as Row
from shearling.masks.folded import MaskedEmbedding, MaskedLinear, MaskedNorm

Masks = Mapping[str, Tensor]  # by axis, [*within, size]


@dataclass(frozen=True)
class Vector:
    """What multiplies one dim of the weights that share it: a leaf that modules see, and the masks it is made of.

    A part is (axis, layer or None, entries of the axis's mask along the dim; None: one number for the whole dim).
    """

    leaf: Tensor
    parts: tuple[tuple[str, int | None, Tensor | None], ...]

    def compute(self, masks: Masks) -> Tensor:
        value = torch.ones((), device=self.leaf.device)
        for axis, layer, where in self.parts:
            mask = masks[axis] if layer is None else masks[axis][layer]
            value = value * (mask if where is None else mask.reshape(-1)[where])
        return value.expand_as(self.leaf)


class Attached:
    """A model under `masks`. `set` gives them their values; `push` carries their gradients back to what they came from.

    The modules see leaves, one vector for each masked dim of a layer, and any number of backward passes may add to
    their gradients; the graph from the gates to them is walked once, by `push`.
    """

    def __init__(self, model: nn.Module, family: Family, *, sizes: Mapping[str, int], axes: Sequence[str], tied: bool):
        self.model, self.sizes = model, dict(sizes)
        self.axes = tuple(axes)
        self.device = next(model.parameters()).device
        self._vectors: dict[object, Vector] = {}
        self._computed: list[Tensor] = []
        self.masks: Masks = {}
        self._undo: list[tuple[nn.Module, str, nn.Module]] = []
        self._norms: list[MaskedNorm] = []
        self._scale = torch.ones((), device=self.device)
        self._eps: dict[float, Tensor] = {}
        for row, found in factors(family, tied=tied).items():
            for layer in range(sizes["layer"]) if row.per_layer else (None,):
                self._attach(row, [f for f in found if f.axis in self.axes and f.when != "cut"], layer, family)

    def _attach(self, row: Row, found: list[Factor], layer: int | None, family: Family) -> None:
        path = row.at(layer).removesuffix(".weight")
        if not found or path == row.at(layer):  # a bias takes its factors with its weight's
            return
        parent = self.model.get_submodule(path.rpartition(".")[0])
        plain = self.model.get_submodule(path)
        masked: nn.Module
        if any(factor.output for factor in found):
            column = self._vector(row, found, 1, layer)
            assert column is not None
            masked = MaskedEmbedding(cast(nn.Embedding, plain), column)
        elif all(factor.part == "soft" for factor in found):
            masked = MaskedLinear(
                cast(nn.Linear, plain), self._vector(row, found, 0, layer), self._vector(row, found, 1, layer)
            )
        else:
            eps_attribute = family.normalisation(row).eps_attribute
            eps = float(getattr(plain, eps_attribute))
            eps_tensor = self._eps.setdefault(eps, torch.tensor(eps, device=self.device))
            masked = MaskedNorm(plain, eps_attribute, self._scale, eps_tensor)
            self._norms.append(masked)
        name = path.rpartition(".")[2]
        setattr(parent, name, masked)
        self._undo.append((parent, name, plain))

    def _vector(self, row: Row, found: list[Factor], dim: int, layer: int | None) -> Tensor | None:
        """The leaf for one dim of a row: made once for all the tensors that take the same masks along it."""
        mine = [f for f in found if f.dim == dim or (f.dim is None and dim == 0)]
        if not mine:
            return None
        key = (tuple(f.axis for f in mine), str(row.dims[dim]), layer)
        if key not in self._vectors:
            leaf = torch.ones(row.dims[dim].size(self.sizes), device=self.device, requires_grad=True)
            self._vectors[key] = Vector(leaf, tuple(self._part(row, f, layer) for f in mine))
        return self._vectors[key].leaf

    def _part(self, row: Row, factor: Factor, layer: int | None) -> tuple[str, int | None, Tensor | None]:
        chosen = layer if is_per_layer(factor.axis) else None
        if factor.dim is None:
            return factor.axis, chosen, None
        where = positions(row.dims[factor.dim], factor.axis, self.sizes)
        return factor.axis, chosen, torch.tensor(where, device=self.device)

    def set(self, masks: Masks, *, alive: Tensor | float | None = None) -> None:
        """Gives the masks of all attached axes their values for the next passes.

        `alive` is how many hidden channels the norms count; left out, those that aren't exactly 0.
        """
        self.masks, self._computed = masks, []
        for vector in self._vectors.values():
            value = vector.compute(masks)
            self._computed.append(value)
            with torch.no_grad():
                vector.leaf.copy_(value)
            vector.leaf.grad = None
        if "hidden" in self.axes:
            self._count((masks["hidden"] != 0).sum() if alive is None else alive)

    @torch.no_grad()
    def _count(self, alive: Tensor | float) -> None:
        """The norms see a model of so many channels. No gradient goes through the count."""
        share = torch.as_tensor(alive / self.sizes["hidden"], device=self.device).clamp(min=1 / self.sizes["hidden"])
        self._scale.copy_(share.sqrt())
        for eps, tensor in self._eps.items():
            tensor.copy_(eps * share)

    def push(self) -> None:
        """Adds the gradients gathered by the leaves to what the last `set` was given."""
        pairs = [
            (value, vector.leaf.grad)
            for value, vector in zip(self._computed, self._vectors.values(), strict=True)
            if vector.leaf.grad is not None and value.requires_grad
        ]
        if pairs:
            torch.autograd.backward([value for value, _ in pairs], [grad for _, grad in pairs])

    def remove(self) -> None:
        """Gives the model its own modules back, weights as they are by now."""
        for norm in self._norms:
            setattr(norm.plain[0], norm.eps_attribute, norm.source_eps)
        for parent, name, plain in self._undo:
            setattr(parent, name, plain)
        self._undo, self._norms, self._computed, self.masks = [], [], [], {}
