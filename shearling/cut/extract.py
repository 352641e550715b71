"""The cut: the source's tensors one by one, sliced and folded, to a checkpoint of exactly the target shape."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shearling.axes.factors import factors
from shearling.axes.index import Kept
from shearling.axes.shape import Shape
from shearling.axes.spec import Family
from shearling.axes.table import Tensor as Row
from shearling.cut.fold import fold_factors, slice_kept

Read = Callable[[Row, int | None], Tensor]  # a row of the source's table, for one of the source's layers


@dataclass(frozen=True)
class Cut:
    """All that turns a source's tensors into its cut's. `norm_scales` multiply the norms' weights, by source name."""

    family: Family
    config: Mapping[str, Any]  # the source's
    shape: Shape
    kept: Kept
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    norm_scales: Mapping[str, float] = field(default_factory=dict)

    def rows(self) -> Iterator[tuple[Row, int | None]]:
        """The result's parameters, each with its layer in the result."""
        return self.family.written(self.config, self.kept.layers)

    def tensor(self, row: Row, layer: int | None, read: Read) -> Tensor:
        """One tensor of the result. A row that nothing is cut from or folded into comes back bit for bit."""
        source_layer = None if layer is None else self.kept.layers[layer]
        tied = bool(self.family.setting(self.config, "tie_word_embeddings"))
        weight = slice_kept(read(row, source_layer), row, self.kept, source_layer)
        found = factors(self.family, tied=tied).get(row, ())
        offset = 0.0 if row.role not in ("norm", "post") or row.is_bias else self.family.normalisation(row).offset
        weight = fold_factors(weight, row, found, kept=self.kept, masks=self.masks, layer=source_layer, offset=offset)
        scale = self.norm_scales.get(row.at(source_layer))
        if scale is not None:
            weight = scale * (weight.to(torch.promote_types(weight.dtype, torch.float32)) + offset) - offset
        assert tuple(weight.shape) == row.shape(self.shape.axes), (row.name, weight.shape)
        return weight
