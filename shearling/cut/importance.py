"""One-shot importance from activations, for every axis that can be cut, in one pass over calibration data.

Like Minitron (arXiv 2407.14679, section 2.2), but each unit's activation is weighed by what reads it, as in Wanda
(arXiv 2306.11695, eq. 1): a unit that nothing comes into, or that nothing goes out of, scores exactly zero.
Layers by block influence (ShortGPT, arXiv 2403.03853, eq. 1).
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from shearling.axes.axis import MASKABLE, Dim, mask_shape
from shearling.axes.factors import normalised
from shearling.axes.index import Kept, positions
from shearling.axes.shape import shape_of
from shearling.axes.spec import Family
from shearling.axes.table import Tensor as Row
from shearling.cut.experts import stacks
from shearling.loss.numbers import widest_float
from shearling.ranks.rows import gathered
from shearling.ranks.sharded import device_of


@dataclass(frozen=True)
class Norm:
    """One norm over an axis that can be cut: its row, its layer, and what calibration found of its inputs x.

    `energy` is the mean over tokens of x^2 / (ms + eps), ms their mean square at each token, [entries], in float64; of
    a centred norm x is what it has when the mean is off.
    """

    row: Row
    layer: int | None
    energy: Tensor


@dataclass(frozen=True)
class Importance:
    """What calibration found, on the CPU in float64.

    `scores` by axis, [*within, size], each at least 0; `norms` by the norm's name.
    """

    scores: dict[str, Tensor]
    norms: dict[str, Norm]

    def norm_scales(self, kept: Kept) -> dict[str, float]:
        """By norm, how much its denominator grows at the cut, in the root mean square over tokens.

        With x over all entries D, or over the kept ones K: (ms_K + eps) / (ms_D + eps), where the energy gives
        ms_K / (ms_D + eps), and what it lacks of 1 on average is eps / (ms_D + eps). Multiplied into the norm's weight
        it gives the cut model's readers inputs of the size that they had.
        """
        scales = {}
        for name, norm in self.norms.items():
            if norm.layer is None or norm.layer in kept.layers:
                entries = kept.rows(norm.row.dims[0], norm.layer)
                if entries is not None:
                    scales[name] = float((norm.energy[entries].mean() + 1 - norm.energy.mean()).sqrt())
        return scales


class _Collector:
    """Running sums of squares, per tensor that is watched."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}

    def add(self, name: str, squares: Tensor) -> None:
        total = squares.flatten(0, -2).sum(0).cpu().double()
        self.sums[name] = self.sums[name] + total if name in self.sums else total
        self.tokens[name] = self.tokens.get(name, 0) + squares.shape[:-1].numel()

    def mean(self, name: str) -> Tensor:
        return self.sums[name] / self.tokens[name]


@torch.no_grad()
def measure(model: nn.Module, family: Family, *, config: Mapping[str, Any], batches: Iterable[Tensor]) -> Importance:
    """Scores from one pass of the plain model over `batches` of ids, each [B, T]."""
    seen = _Collector()
    sizes = shape_of(family, config).axes
    rows = list(family.named(config))
    experts = list(stacks(model, rows))
    handles = [*_watch(model, family, rows, sizes, seen), *(stack.watch() for stack in experts)]
    device = device_of(model)
    try:
        for ids in batches:
            model(ids.to(device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    scores = {axis: torch.zeros(mask_shape(axis, sizes), dtype=torch.float64) for axis in MASKABLE if axis in sizes}
    weights = dict(model.named_parameters(remove_duplicate=False))
    scores["hidden"] = _hidden_scores(family, rows, seen, weights)
    for row, layer in rows:
        if row.role == "write" and row.input is not None and not row.stacked:
            _inner_scores(row, layer, sizes, seen, weights, scores)
    if "rotary" in sizes:
        scores["rotary"] = _rotary_scores(family, rows, sizes, seen)
    for stack in experts:
        scores["expert"][stack.layer], scores["moe_intermediate"][stack.layer] = stack.scores()
    for layer in range(sizes["layer"]):
        scores["layer"][layer] = seen.mean(f"influence {layer}").squeeze()
    norms = {
        row.at(layer): Norm(row, layer, seen.mean(f"energy {row.at(layer)}"))
        for row, layer in rows
        if _runs_over_a_cut_axis(row)
    }
    return Importance(scores, norms)


def _is_turned(row: Row, family: Family) -> bool:
    """Whether what a row gives has rotary positions put on it, by the name of the axis; no norm comes before."""
    over = row.dims[0] if row.role == "norm" else row.dims[row.output] if row.output is not None else None
    return over is not None and not row.is_bias and "rotary" in over.axes() and row not in dict(normalised(family))


def _runs_over_a_cut_axis(row: Row) -> bool:
    over = {axis for axis in row.dims[0].axes() if axis in MASKABLE}
    return row.role in ("norm", "post") and not row.is_bias and bool(over)


def _reads_the_stream(row: Row) -> bool:
    return row.role in ("read", "route") and row.input is not None and not row.norm


def _watch(
    model: nn.Module, family: Family, rows: list[tuple[Row, int | None]], sizes: dict[str, int], seen: _Collector
) -> Iterator[Any]:
    """Hooks on the inputs of norms, of residual writers and of what reads the bare stream, and around each block."""
    for row, layer in rows:
        name = row.at(layer)
        if _runs_over_a_cut_axis(row):
            norm = model.get_submodule(name.removesuffix(".weight"))
            kind = family.normalisation(row)
            eps = kind.epsilon(norm)

            def normalised(
                _: nn.Module, args: tuple[Tensor, ...], name: str = name, eps: float = eps, centred: bool = kind.centred
            ) -> None:
                plain = args[0].float()
                x = plain - plain.mean(-1, keepdim=True) if centred else plain
                rest = x.square().mean(-1, keepdim=True) + eps
                seen.add(f"energy {name}", x.square() / rest)
                if centred:  # a channel that nothing comes into isn't 0 once the mean is off
                    seen.add(f"stream {name}", plain.square() / rest)

            yield norm.register_forward_pre_hook(normalised)
        elif (row.role == "write" and row.input is not None and not row.stacked) or _reads_the_stream(row):

            def squared(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                seen.add(name, args[0].float().square())

            yield model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(squared)
    for row, layer in rows:
        if _is_turned(row, family):

            def turned(_: nn.Module, args: Any, output: Tensor, name: str = row.at(layer)) -> None:
                seen.add(f"turned {name}", output.float().square())

            yield model.get_submodule(row.at(layer).removesuffix(".weight")).register_forward_hook(turned)
    for layer in range(sizes["layer"]):

        def influence(_: nn.Module, args: tuple[Tensor, ...], output: Any, layer: int = layer) -> None:
            after = output if isinstance(output, Tensor) else output[0]
            wide = widest_float(after.device)
            cosine = functional.cosine_similarity(args[0].to(wide), after.to(wide), dim=-1)
            # A block that adds nothing must score exactly 0, whatever the cosine rounds to.
            moved = (args[0] != after).any(-1)
            seen.add(f"influence {layer}", ((1 - cosine).clamp(min=0) * moved).unsqueeze(-1))

        yield model.get_submodule(family.block(layer)).register_forward_hook(influence)


def _hidden_scores(
    family: Family, rows: list[tuple[Row, int | None]], seen: _Collector, weights: Mapping[str, Tensor]
) -> Tensor:
    """Each norm's view of a channel: its energy there, by the norm's weight, by all the weights that read it.

    What reads the bare stream has a view of its own. All views count alike, whatever the size of what reads them.
    """
    views: list[Tensor] = []
    for row, layer in rows:
        name = row.at(layer)
        if row.role == "norm" and row.stream is not None and not row.is_bias:
            kind = family.normalisation(row)
            energy = seen.mean(f"stream {name}" if kind.centred else f"energy {name}")
            effective = gathered(weights[name]).cpu().double() + kind.offset
            readers = [r for r in family.readers(row.name) if r.at(layer) in weights]
            views.append(energy * effective.square() * sum(_squares(weights[r.at(layer)], r.input) for r in readers))
        elif _reads_the_stream(row):
            views.append(seen.mean(name) * _squares(weights[name], row.input))
    return torch.stack([view / view.sum().clamp(min=torch.finfo(view.dtype).tiny) for view in views]).sum(0)


def _squares(weight: Tensor, dim: int | None) -> Tensor:
    """Sums of a weight's squares over all of its dims but one."""
    assert dim is not None
    return gathered(weight).float().square().sum([d for d in range(weight.dim()) if d != dim]).cpu().double()


def _rotary_scores(
    family: Family, rows: list[tuple[Row, int | None]], sizes: dict[str, int], seen: _Collector
) -> Tensor:
    """An entry's mean square in q, by that in k, both over all heads; each layer counts alike. [head_dim]"""
    found: dict[int | None, list[Tensor]] = {}
    for row, layer in rows:
        if _is_turned(row, family):
            dim = row.dims[0 if row.output is None else row.output]
            where = torch.tensor(positions(dim, "rotary", sizes))
            products = torch.tensor([n for n, p in enumerate(dim.products) for _ in range(Dim((p,)).size(sizes))])
            squares = seen.mean(f"turned {row.at(layer)}")
            for product in products[where >= 0].unique():  # q and k may be one tensor
                mine = (products == product) & (where >= 0)
                total = torch.zeros(sizes["rotary"], dtype=squares.dtype).index_add(0, where[mine], squares[mine])
                found.setdefault(layer, []).append(total)
    views = [torch.stack(parts).prod(0) for parts in found.values()]
    return torch.stack([view / view.sum().clamp(min=torch.finfo(view.dtype).tiny) for view in views]).sum(0)


def _inner_scores(
    row: Row,
    layer: int | None,
    sizes: dict[str, int],
    seen: _Collector,
    weights: Mapping[str, Tensor],
    scores: dict[str, Tensor],
) -> None:
    """Mean square of what comes in at each column, by the column's norm, summed onto each axis it is built from."""
    assert row.input is not None
    name, dim = row.at(layer), row.dims[row.input]
    column = seen.mean(name) * _squares(weights[name], row.input)
    for axis in dim.axes():
        if axis in MASKABLE:
            where = torch.tensor(positions(dim, axis, sizes))
            scores[axis][layer].view(-1).index_add_(0, where, column)
