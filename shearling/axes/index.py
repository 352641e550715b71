"""What is kept along each axis, and where that lies in any tensor."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

from shearling.axes.axis import AXES, Dim
from shearling.axes.rotary import selections
from shearling.axes.shape import Shape


@dataclass(frozen=True)
class Kept:
    """The source's entries that stay, in ascending order, by axis and by the entries of the axes it lies within.

    `choices["group"][(layer, kv_head)]` are the query heads that stay under one kv head of one layer; an axis that
    isn't cut has no choices. Only entries of kept layers (and kv heads) need be there.
    """

    choices: Mapping[str, Mapping[tuple[int, ...], tuple[int, ...]]]
    source: Mapping[str, int]  # the source's entries per axis

    def along(self, axis: str, within: tuple[int, ...] = ()) -> tuple[int, ...]:
        """The entries kept along `axis`, given the entries of the axes it lies within."""
        return self.choices[axis][within] if axis in self.choices else tuple(range(self.source[axis]))

    @property
    def layers(self) -> tuple[int, ...]:
        return self.along("layer")

    @property
    def rotary(self) -> tuple[int, ...] | None:
        """The entries of q and k that stay; None where all of them do."""
        return self.along("rotary") if "rotary" in self.choices else None

    def counts(self) -> dict[str, int]:
        """Entries kept per axis. Raises ValueError where they differ from layer to layer."""
        sizes = dict(self.source)
        for axis, choices in self.choices.items():
            found = {len(kept) for kept in choices.values()}
            if len(found) != 1:
                raise ValueError(f"{axis}: kept {sorted(found)} entries in different places; expected one number")
            sizes[axis] = found.pop()
        return sizes

    def rows(self, dim: Dim, layer: int | None) -> list[int] | None:
        """The positions to keep along a dim of one layer's tensor, ascending; None where all of them stay."""
        if not any(axis in self.choices for axis in dim.axes()):
            return None
        kept: list[int] = []
        start = 0
        for factors in dim.products:
            chosen = {} if layer is None else {"layer": layer}
            kept.extend(start + position for position in self._positions(factors, chosen))
            start += Dim((factors,)).size(self.source)
        return kept

    def _positions(self, factors: tuple[str | int, ...], chosen: dict[str, int]) -> Iterator[int]:
        if not factors:
            yield 0
            return
        factor, rest = factors[0], factors[1:]
        stride = Dim((rest,)).size(self.source) if rest else 1
        if isinstance(factor, int):
            entries: tuple[int, ...] = tuple(range(factor))
        else:
            entries = self.along(factor, tuple(chosen[outer] for outer in AXES[factor].within))
        for entry in entries:
            inner = {**chosen, factor: entry} if isinstance(factor, str) else chosen
            for position in self._positions(rest, inner):
                yield entry * stride + position

    def to_json(self) -> dict[str, list[dict[str, Any]]]:
        """As `shearling.json` holds it: per axis a list of {"within": [...], "kept": [...]}."""
        return {
            axis: [{"within": list(within), "kept": list(kept)} for within, kept in sorted(choices.items())]
            for axis, choices in self.choices.items()
        }


def places(axis: str, kept: Kept) -> list[tuple[int, ...]]:
    """Where a choice along `axis` is to be made, given the choices already made along the axes it lies within."""
    found: list[tuple[int, ...]] = [()]
    for outer in AXES[axis].within:
        found = [(*place, entry) for place in found for entry in kept.along(outer, place[: len(AXES[outer].within)])]
    return found


def positions(dim: Dim, axis: str, sizes: Mapping[str, int]) -> list[int]:
    """For each entry along a dim, which entry of the axis's mask (flattened, its layer apart) lies on it.

    So a mask of shape [layer, *inner, size], flattened to [layer, n], spreads over a dim as mask[:, positions].
    Entries of a product without the axis are -1.
    """
    outers = (*tuple(outer for outer in AXES[axis].within if outer != "layer"), axis)
    spread: list[int] = []
    for factors in dim.products:
        if axis not in factors:
            spread.extend([-1] * Dim((factors,)).size(sizes))
            continue
        extents = [range(f) if isinstance(f, int) else range(sizes[f]) for f in factors]
        where = [factors.index(outer) for outer in outers]
        for entry in product(*extents):
            flat = 0
            for outer, position in zip(outers, where, strict=True):
                flat = flat * sizes[outer] + entry[position]
            spread.append(flat)
    return spread


def kept_shape(source: Shape, kept: Kept) -> Shape:
    """The shape that a selection leaves."""
    return source.at(kept.counts())


def select(scores: Mapping[str, Sequence[Any]], *, source: Shape, target: Shape) -> Kept:
    """The entries with the highest scores along each axis that must shrink, the first of equals; of q's and k's entries
    the choice with the highest sum.

    `scores` are nested as masks are, [*within, size]. Within an axis the choice is made where its outer axes stay.
    """
    axes, wanted = source.axes, target.axes
    kept = Kept({}, axes)
    for axis in (name for name in AXES if name in axes and wanted[name] < axes[name]):
        choices: dict[tuple[int, ...], tuple[int, ...]] = {}
        for place in places(axis, kept):
            along = scores[axis]
            for outer in place:
                along = along[outer]
            choices[place] = best(axis, along, wanted[axis], source)
        kept = Kept({**kept.choices, axis: choices}, axes)
    return kept


def best(axis: str, scores: Sequence[Any], kept: int, source: Shape) -> tuple[int, ...]:
    """The `kept` entries of one place with the highest scores, ascending; of layers, some of every kind.

    Along `rotary` the choice of its ways with the highest sum.
    """
    if axis == "rotary":
        return max(selections(source.rotary, len(scores), kept), key=lambda chosen: sum(scores[i] for i in chosen))
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    if axis == "layer" and source.kinds:
        order = [*cover(source.kinds, order), *order]
    return tuple(sorted(list(dict.fromkeys(order))[:kept]))


def cover(kinds: Sequence[frozenset[str]], order: Sequence[int]) -> tuple[int, ...]:
    """The fewest layers among which there is one of every kind that occurs; of such choices the first by `order`."""
    first: dict[frozenset[str], int] = {}
    for layer in order:
        first.setdefault(kinds[layer], layer)
    every = frozenset().union(*kinds)
    sized = (chosen for size in range(len(every) + 1) for chosen in combinations(first, size))
    return tuple(first[kind] for kind in next(chosen for chosen in sized if every == frozenset().union(*chosen)))
