"""Puts masks on a model: what axes/factors.py describes, as modules in place of the model's own."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from shearling.axes.axis import is_per_layer
from shearling.axes.factors import Factor, factors
from shearling.axes.index import positions
from shearling.axes.shape import shape_of
from shearling.axes.spec import Family
from shearling.axes.table import Tensor as Row
from shearling.masks.experts import MaskedExperts, MaskedRouter
from shearling.masks.folded import Centre, MaskedEmbedding, MaskedLinear, MaskedNorm
from shearling.masks.shares import Counts, Masks, Part, Share, Vectors
from shearling.weights import adapters


class Attached:
    """A model under `masks`. `set` gives them their values; `push` carries their gradients back to what they came from.

    The modules see leaves, one vector for each masked dim of a layer, and any number of backward passes may add to
    their gradients; the graph from the gates to them is walked once, by `push`. Those of all layers that are alike are
    made at once (masks/shares.py). `device` is where the weights will be, if they are on the meta device still.
    """

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        *,
        config: Mapping[str, Any],
        axes: Sequence[str],
        device: Any = None,
        adapted: Collection[str] = (),
    ):
        self.model, self.family, self.axes, self.adapted = model, family, tuple(axes), adapted
        self.sizes = shape_of(family, config).axes
        self.device = device or next(model.parameters()).device
        self._vectors: dict[object, Vectors] = {}
        self._counts: dict[object, Counts] = {}
        self._undo: list[tuple[nn.Module, str, Callable[[], nn.Module]]] = []
        tied = bool(family.setting(config, "tie_word_embeddings"))
        found = {
            row: [f for f in some if f.axis in self.axes and f.when != "cut"]
            for row, some in factors(family, tied=tied).items()
        }
        biases = {row.name: some for row, some in found.items() if row.is_bias}
        for row, layer in family.named(config):
            if found.get(row) and not row.is_bias:
                self._attach(row, found[row], biases.get(row.name.removesuffix("weight") + "bias", []), layer)
        self.masks: Masks = {}

    def _attach(self, row: Row, found: list[Factor], of_bias: list[Factor], layer: int | None) -> None:
        path = self._module(row).replace("*", str(layer))
        plain = self.model.get_submodule(path)
        restore: Callable[[], nn.Module] = lambda: plain  # noqa: E731
        if row.role == "embed":
            column = self._vector(row, found, 1, layer)
            assert column is not None
            masked: nn.Module = MaskedEmbedding(plain, column, centre=self._centre(row, found, layer))
        elif row.role in ("norm", "post"):
            masked = self._norm(plain, row, found, of_bias, layer)
            restore = masked.restore
        elif row.role == "route":
            support = self._vector(row, found, cast(int, row.output), layer)
            assert support is not None
            masked = MaskedRouter(plain, support)
        elif row.stacked:
            masked = self._experts(plain, row, found, layer)
        else:
            output = self._vector(row, found, cast(int, row.output), layer)
            inner = self._vector(row, found, cast(int, row.input), layer)
            centre = self._centre(row, found, layer)
            if path in self.adapted:  # of W + s B A: on the outputs of W and B, on the inputs of W and A
                a, b = plain.get_submodule(adapters.A), plain.get_submodule(adapters.B)
                self._put(f"{path}.{adapters.A}", MaskedLinear(a, None, inner), lambda: a)
                self._put(f"{path}.{adapters.B}", MaskedLinear(b, output, None, centre=centre), lambda: b)
                path = f"{path}.{adapters.BASE}"
                plain = self.model.get_submodule(path)
            masked = MaskedLinear(plain, output, inner, centre=centre, transposed=row.output == 1)
        self._put(path, masked, restore)

    def _put(self, path: str, masked: nn.Module, restore: Callable[[], nn.Module]) -> None:
        parent, name = self.model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
        setattr(parent, name, masked)
        self._undo.append((parent, name, restore))

    def _experts(self, plain: nn.Module, row: Row, found: list[Factor], layer: int | None) -> MaskedExperts:
        output, inner = cast(int, row.output), cast(int, row.input)
        return MaskedExperts(
            plain,
            row.name.rpartition(".")[2],
            expert=self._vector(row, found, 0, layer),
            row=self._vector(row, found, output, layer),
            column=self._vector(row, found, inner, layer),
            inner=inner,
        )

    @staticmethod
    def _module(row: Row) -> str:
        """The path of the module that a row belongs to; a stack of experts has its parameters without `.weight`."""
        return row.name.rpartition(".")[0] if row.stacked else row.name.removesuffix(".weight")

    def _norm(
        self, plain: nn.Module, row: Row, found: list[Factor], of_bias: list[Factor], layer: int | None
    ) -> MaskedNorm:
        kind = self.family.normalisation(row)
        counted, own = self._count(row, [f for f in found if f.part == "count"], layer)
        eps_attribute = "" if kind.centred else kind.eps_attribute
        eps = kind.epsilon(plain)
        return MaskedNorm(
            plain,
            torch.ones((), device=self.device) if counted is None else counted.scale.at(own),
            eps_attribute=eps_attribute,
            eps=None if kind.centred or counted is None else counted.eps(eps).at(own),
            soft=self._vector(row, [f for f in found if f.part == "soft"], 0, layer),
            support=self._vector(row, [f for f in of_bias if f.part == "support"], 0, layer),
            offset=kind.offset,
        )

    def _vector(self, row: Row, found: list[Factor], dim: int, layer: int | None) -> Tensor | None:
        """The leaf for one dim of a row: made once for all the tensors that take the same masks along it."""
        whole = row.output or 0  # a factor on all of a tensor goes on its outputs
        mine = [
            f for f in found if f.part in ("soft", "support") and (f.dim == dim or (f.dim is None and dim == whole))
        ]
        if not mine:
            return None
        support = mine[0].part == "support"
        assert all((f.part == "support") is support for f in mine), row.name
        key = (support, tuple(f.axis for f in mine), str(row.dims[dim]), layer is None)
        if key not in self._vectors:
            share = self._share(row, mine, dim, per_layer=layer is not None)
            self._vectors[key] = Vectors(share, support=support, device=self.device)
        return self._vectors[key].leaf(layer)

    def _centre(self, row: Row, found: list[Factor], layer: int | None) -> Centre | None:
        mine = [f for f in found if f.part == "centre"]
        if not mine:
            return None
        support = [Factor(f.axis, f.dim, "support") for f in mine]
        keep, (count, own) = self._vector(row, support, cast(int, row.stream), None), self._count(row, support, None)
        assert keep is not None
        assert count is not None
        return Centre(keep, count.alive.at(own))

    def _count(self, row: Row, found: list[Factor], layer: int | None) -> tuple[Counts | None, int | None]:
        """The counts along a norm's dim, and the layer if they are a layer's own."""
        if not found:
            return None, None
        dim = cast(int, found[0].dim)
        own = layer if any(is_per_layer(f.axis) for f in found) else None
        key = (tuple(f.axis for f in found), str(row.dims[dim]), own is None)
        if key not in self._counts:
            self._counts[key] = Counts(self._share(row, found, dim, per_layer=own is not None), self.device)
        return self._counts[key], own

    def _share(self, row: Row, found: list[Factor], dim: int, *, per_layer: bool) -> Share:
        along = row.nested(dim) or row.dims[dim]
        parts = (
            Part(f.axis)
            if f.dim is None
            else Part.at(f.axis, positions(along, f.axis, self.sizes), self.sizes, self.device)
            for f in found
        )
        return Share(tuple(parts), self.sizes["layer"] if per_layer else 1, along.size(self.sizes))

    def set(self, masks: Masks, *, support: Masks | None = None) -> None:
        """Gives the masks of all attached axes their values for the next passes.

        `support` stands for what of them is there, by axis as they are; left out, 1 where a mask isn't exactly 0.
        """
        if support is None:
            support = {axis: (mask.detach() != 0).to(mask.dtype) for axis, mask in masks.items()}
        self.masks = masks
        for vectors in self._vectors.values():
            vectors.set(masks, support)
        for counts in self._counts.values():
            counts.set(support)

    def push(self, *, over_ranks: Callable[[Tensor], Tensor] | None = None) -> None:
        """Adds the gradients gathered by the leaves to what the last `set` was given.

        `over_ranks` makes one gradient, [entries], of those that ranks have gathered apart.
        """
        # What nothing came to on this rank may have been reached on others.
        learned = [v for v in self._vectors.values() if v.learned and (v.reached or over_ranks is not None)]
        if not learned:
            return
        grads = [vectors.gradient() for vectors in learned]
        if over_ranks is not None:
            whole = over_ranks(torch.cat([grad.flatten() for grad in grads])).split([grad.numel() for grad in grads])
            grads = [part.view_as(grad) for part, grad in zip(whole, grads, strict=True)]
        torch.autograd.backward([vectors.value for vectors in learned], grads)

    def remove(self) -> None:
        """Gives the model its own modules back, weights as they are by now."""
        for parent, name, restore in self._undo:
            setattr(parent, name, restore())
        self._undo, self.masks = [], {}
        for vectors in self._vectors.values():
            vectors.forget()
