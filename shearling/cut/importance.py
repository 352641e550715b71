"""One-shot importance from activations, for every axis that can be cut, in one pass over calibration data.

Like Minitron (arXiv 2407.14679, section 2.2), but each unit's activation is weighed by what reads it, as in Wanda
(arXiv 2306.11695, eq. 1): a unit that nothing comes into, or that nothing goes out of, scores exactly zero.
Layers by block influence (ShortGPT, arXiv 2403.03853, eq. 1).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from shearling.axes.axis import MASKABLE, mask_shape
from shearling.axes.index import Kept, positions
from shearling.axes.spec import Family
from shearling.axes.table import Tensor as Row


@dataclass(frozen=True)
class Importance:
    """What calibration found, on the CPU in float64.

    `scores` by axis, [*within, size], each at least 0. `energy` by the name of a norm over the hidden axis: the mean
    of x^2 / (ms + eps) for each of its inputs x, [hidden], ms being their mean square at each token.
    """

    scores: dict[str, Tensor]
    energy: dict[str, Tensor]

    def norm_scales(self, kept: Kept) -> dict[str, float]:
        """By norm, how much its denominator grows at the cut, in the root mean square over tokens.

        With x over all channels D, or over the kept ones K: (ms_K + eps) / (ms_D + eps), where the energy gives
        ms_K / (ms_D + eps), and what it lacks of 1 on average is eps / (ms_D + eps). Multiplied into the norm's weight
        it gives the cut model's readers inputs of the size that they had.
        """
        if "hidden" not in kept.choices:
            return {}
        channels = torch.tensor(kept.along("hidden"))
        return {
            name: float((energy[channels].mean() + 1 - energy.mean()).sqrt()) for name, energy in self.energy.items()
        }


class _Collector:
    """Running sums of squares, per tensor that is watched."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}

    def add(self, name: str, squares: Tensor) -> None:
        total = squares.flatten(0, -2).sum(0).double().cpu()
        self.sums[name] = self.sums[name] + total if name in self.sums else total
        self.tokens[name] = self.tokens.get(name, 0) + squares.shape[:-1].numel()

    def mean(self, name: str) -> Tensor:
        return self.sums[name] / self.tokens[name]


@torch.no_grad()
def measure(
    model: nn.Module, family: Family, *, sizes: dict[str, int], batches: Iterable[Tensor], tied: bool
) -> Importance:
    """Scores from one pass of the plain model over `batches` of ids, each [B, T]."""
    seen = _Collector()
    handles = list(_watch(model, family, sizes, seen))
    device = next(model.parameters()).device
    try:
        for ids in batches:
            model(ids.to(device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    scores = {axis: torch.zeros(mask_shape(axis, sizes), dtype=torch.float64) for axis in MASKABLE}
    weights = dict(model.named_parameters())
    energy = {name: seen.mean(name) for name in seen.sums if name in _norms(family, sizes)}
    scores["hidden"] = _hidden_scores(family, sizes, energy, weights, tied)
    for row in family.role("write"):
        if len(row.dims) == 2:
            _inner_scores(row, sizes, seen, weights, scores)
    for layer in range(sizes["layer"]):
        scores["layer"][layer] = seen.mean(f"influence {layer}").squeeze()
    return Importance(scores, energy)


def _norms(family: Family, sizes: dict[str, int]) -> dict[str, tuple[Row, int | None]]:
    """The norms over the hidden axis, each with its layer, by their names on the module."""
    return {
        row.at(layer): (row, layer)
        for row in family.role("norm")
        if row.dims[0].axes() == ("hidden",)
        for layer in (range(sizes["layer"]) if row.per_layer else (None,))
    }


def _watch(model: nn.Module, family: Family, sizes: dict[str, int], seen: _Collector) -> Iterable[Any]:
    """Hooks on the inputs of norms and of residual writers, and on both ends of each block."""
    for name, (row, _) in _norms(family, sizes).items():
        norm = model.get_submodule(name.removesuffix(".weight"))
        eps = float(getattr(norm, family.normalisation(row).eps_attribute))

        def normalised(_: nn.Module, args: tuple[Tensor, ...], name: str = name, eps: float = eps) -> None:
            squares = args[0].float().square()
            seen.add(name, squares / (squares.mean(-1, keepdim=True) + eps))

        yield norm.register_forward_pre_hook(normalised)
    for row in family.role("write"):
        for layer in range(sizes["layer"]) if len(row.dims) == 2 else ():
            name = row.at(layer)

            def squared(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                seen.add(name, args[0].float().square())

            yield model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(squared)
    for layer in range(sizes["layer"]):

        def influence(_: nn.Module, args: tuple[Tensor, ...], output: Any, layer: int = layer) -> None:
            after = output if isinstance(output, Tensor) else output[0]
            cosine = functional.cosine_similarity(args[0].double(), after.double(), dim=-1)
            # A block that adds nothing must score exactly 0, whatever the cosine rounds to.
            moved = (args[0] != after).any(-1)
            seen.add(f"influence {layer}", ((1 - cosine).clamp(min=0) * moved).unsqueeze(-1))

        yield model.get_submodule(family.block(layer)).register_forward_hook(influence)


def _hidden_scores(
    family: Family, sizes: dict[str, int], energy: dict[str, Tensor], weights: Mapping[str, Tensor], tied: bool
) -> Tensor:
    """Each norm's view of a channel: its energy there, by the norm's weight, by all the weights that read it.

    Norms count alike, whatever the size of what reads them.
    """
    total = torch.zeros(sizes["hidden"], dtype=torch.float64)
    for name, (row, layer) in _norms(family, sizes).items():
        effective = weights[name].double().cpu() + family.normalisation(row).offset
        outgoing = torch.zeros_like(total)
        for reader in family.readers(row.name):
            source = reader.tied if reader.tied and tied else reader.at(layer)
            outgoing += weights[source].float().square().sum(0).double().cpu()
        seen = energy[name] * effective.square() * outgoing
        total += seen / seen.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return total


def _inner_scores(
    row: Row, sizes: dict[str, int], seen: _Collector, weights: Mapping[str, Tensor], scores: dict[str, Tensor]
) -> None:
    """Mean square of what comes in at each column, by the column's norm, summed onto each axis it is built from."""
    for layer in range(sizes["layer"]):
        name = row.at(layer)
        column = seen.mean(name) * weights[name].float().square().sum(0).double().cpu()
        for axis in row.dims[1].axes():
            if axis in MASKABLE:
                where = torch.tensor(positions(row.dims[1], axis, sizes))
                scores[axis][layer].view(-1).index_add_(0, where, column)
