"""The gates of one model: a location for every entry of every axis that is cut, and what they come to."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from shearling.axes.axis import MASKABLE, mask_shape
from shearling.axes.index import Kept, places, select
from shearling.axes.shape import Shape
from shearling.masks import hard_concrete
from shearling.masks.constraint import expected_sparsity


class Gates(nn.Module):
    """log_alpha by axis, [*within, size], for the axes on which `target` is smaller than `source`."""

    def __init__(self, source: Shape, target: Shape, start: Mapping[str, Tensor]):
        super().__init__()
        self.source, self.target = source, target
        self.axes = tuple(axis for axis in MASKABLE if target.axes[axis] < source.axes[axis])
        self.log_alpha = nn.ParameterDict({axis: nn.Parameter(start[axis].clone().float()) for axis in self.axes})

    def sample(self, generator: torch.Generator) -> dict[str, Tensor]:
        """One draw of every mask."""
        masks = {}
        for axis in self.axes:
            log_alpha = self.log_alpha[axis]
            uniform = torch.rand(log_alpha.shape, generator=generator, device=generator.device)
            masks[axis] = hard_concrete.sample(log_alpha, uniform=uniform.to(log_alpha.device))
        return masks

    def sparsity(self) -> dict[str, Tensor]:
        """Expected sparsity by axis, one number for each place with a choice of its own: [*within]."""
        return {a: expected_sparsity(hard_concrete.keep_probability(self.log_alpha[a])) for a in self.axes}

    def wanted_sparsity(self, axis: str) -> float:
        """Where an axis must end: 1 - target / source."""
        return 1 - self.target.axes[axis] / self.source.axes[axis]

    def clamp_(self) -> None:
        """Keeps every gate where its gradient can still move it (LLM-Shearing: after every step)."""
        with torch.no_grad():
            for log_alpha in self.log_alpha.values():
                log_alpha.clamp_(hard_concrete.LOG_ALPHA_MIN, hard_concrete.LOG_ALPHA_MAX)

    def final(self, tiebreak: Mapping[str, Tensor] | None = None) -> tuple[Kept, dict[str, Tensor]]:
        """The kept entries, exactly as many as the target asks, and the masks: their soft values, zero elsewhere.

        Gates at the clamp's edge are equal; `tiebreak` scores decide between them.
        """
        scores = {}
        for axis in self.axes:
            score = self.log_alpha[axis].detach().double().cpu()
            if tiebreak is not None:
                score = score + 1e-9 * tiebreak[axis].double().argsort().argsort() / score.shape[-1]
            scores[axis] = score.tolist()
        kept = select(scores, source=self.source, target=self.target)
        return kept, self.masks(kept)

    def masks(self, kept: Kept) -> dict[str, Tensor]:
        """Soft values on the kept entries, exact zeros elsewhere; what lies within a removed entry is zero too."""
        masks = {}
        for axis in self.axes:
            soft = hard_concrete.soft_value(self.log_alpha[axis].detach())
            mask = torch.zeros(mask_shape(axis, self.source.axes), device=soft.device)
            for place in places(axis, kept):
                chosen = torch.tensor(kept.along(axis, place), device=soft.device)
                mask[(*place, chosen)] = soft[(*place, chosen)]
            masks[axis] = mask
        return masks

    def misses(self) -> list[dict[str, object]]:
        """Where the gates' own number of open entries (keep probability above 1/2) is not the target's."""
        found: list[dict[str, object]] = []
        for axis in self.axes:
            wanted = self.target.axes[axis]
            counts = (hard_concrete.keep_probability(self.log_alpha[axis].detach()) > 0.5).sum(-1)
            flat = counts.reshape(-1).tolist()
            shape = counts.shape
            for i, count in enumerate(flat):
                if count != wanted:
                    place = [int(n) for n in torch.unravel_index(torch.tensor(i), shape)] if shape else []
                    found.append({"axis": axis, "within": place, "open": int(count), "target": wanted})
        return found
