"""The two relaxations as gates: hard-concrete draws under a Lagrangian, and the exact soft top-k."""

from collections.abc import Mapping
from functools import partial
from math import inf

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from shearling.axes.shape import Shape
from shearling.masks import hard_concrete
from shearling.masks.constraint import Slide, expected_sparsity, penalty
from shearling.masks.gates import Gates
from shearling.masks.options import Options
from shearling.masks.soft_topk import soft_topks
from shearling.masks.start import dead, none_closed, open_start, ranked_start, unit_start


class HardConcreteGates(Gates):
    """Location is log alpha. Each axis has multipliers l1, l2, one pair for each place with a choice of its own."""

    def __init__(
        self,
        source: Shape,
        target: Shape,
        *,
        start: Mapping[str, Tensor],
        closed: Mapping[str, Tensor],
        slide: Slide,
        options: Options,
        seed: int,
    ):
        super().__init__(source, target, start=start, closed=closed)
        self.slide, self.options, self.seed = slide, options, seed
        zeros = {axis: torch.zeros(self.location[axis].shape[:-1]) for axis in self.learned}
        self.linear = nn.ParameterDict({axis: nn.Parameter(zero.clone()) for axis, zero in zeros.items()})
        self.quadratic = nn.ParameterDict({a: nn.Parameter(zero + options.quadratic) for a, zero in zeros.items()})

    def log_alpha(self, axis: str) -> Tensor:
        """At the bottom where closed: no gradient gets there."""
        return self.location[axis].masked_fill(self.closed[axis], hard_concrete.LOG_ALPHA_MIN)

    def draw(self, step: int) -> dict[str, Tensor]:
        """By noise that follows from (seed, step) alone, drawn on the CPU so that it is the same on any device."""
        generator = torch.Generator().manual_seed(hard_concrete.noise_seed(self.seed, step))
        masks = {axis: mask.clone() for axis, mask in self.settled.items()}
        for axis in self.learned:
            log_alpha = self.log_alpha(axis)
            uniform = torch.rand(log_alpha.shape, generator=generator)
            if log_alpha.is_cuda:  # from pinned memory nobody waits for the copy
                uniform = uniform.pin_memory().to(log_alpha.device, non_blocking=True)
            uniform = uniform.to(log_alpha.device)
            masks[axis] = hard_concrete.sample(log_alpha, uniform=uniform)
        if "expert" in masks:
            masks["expert"] = self._enough(masks["expert"])
        return masks

    def _enough(self, experts: Tensor) -> Tensor:
        """A draw [layer, expert] in which the likeliest experts are open, as many as a token goes to."""
        least = min(self.source.fixed["top_k"], self.target.axes["expert"])
        likeliest = self.log_alpha("expert").topk(least, dim=-1).indices
        opened = torch.zeros_like(experts).scatter(-1, likeliest, hard_concrete.KEPT_MIN)
        return torch.maximum(experts, opened)

    def support(self, masks: Mapping[str, Tensor]) -> None:
        """Of this very draw."""
        return None

    def penalty(self, step: int) -> Tensor:
        progress = self.slide.progress(step + 1)
        terms = [
            penalty(
                expected_sparsity(hard_concrete.keep_probability(self.log_alpha(axis))),
                target=progress * (1 - self.target.axes[axis] / self.source.axes[axis]),
                linear=self.linear[axis],
                quadratic=self.quadratic[axis],
            )
            for axis in self.learned
        ]
        return torch.stack(terms).sum()

    def end(self, step: int) -> None:
        """Keeps every gate where its gradient can still move it (LLM-Shearing: after every step)."""
        with torch.no_grad():
            for log_alpha in self.location.values():
                log_alpha.clamp_(hard_concrete.LOG_ALPHA_MIN, hard_concrete.LOG_ALPHA_MAX)

    def optimizers(self) -> list[Optimizer]:
        """AdamW moves a multiplier by its rate a step whatever the violation; plain ascent by rate x violation."""
        o = self.options
        multipliers = {"params": [*self.linear.values(), *self.quadratic.values()], "peak_lr": o.multiplier_lr}
        ascend = partial(AdamW, weight_decay=0.0) if o.ascent == "adamw" else partial(SGD, lr=o.multiplier_lr)
        climbing = ascend([{**multipliers, "clip": False}], maximize=True, fused=True)
        return [_adamw(self.location, o.rate), climbing]

    def soft_values(self, axis: str) -> Tensor:
        return hard_concrete.soft_value(self.log_alpha(axis))

    def expected(self, axis: str, step: int) -> Tensor:
        return hard_concrete.keep_probability(self.log_alpha(axis)).sum(-1)

    def opened(self, axis: str) -> Tensor:
        return hard_concrete.keep_probability(self.log_alpha(axis)) > 0.5


class SoftTopKGates(Gates):
    """Location is a score. As many are open as the sliding target asks, at every step; the temperature falls."""

    def __init__(
        self,
        source: Shape,
        target: Shape,
        *,
        start: Mapping[str, Tensor],
        closed: Mapping[str, Tensor],
        slide: Slide,
        options: Options,
        steps: int,
    ):
        super().__init__(source, target, start=start, closed=closed)
        self.slide, self.options, self.steps = slide, options, steps
        # Looked at once: at each step it would have the host wait for the device.
        fewest = {axis: int((~closed[axis]).sum(-1).min()) for axis in self.learned}
        self.most = {axis: fewest[axis] - 0.01 for axis in self.learned if bool(closed[axis].any())}

    def size(self, axis: str, step: int) -> float:
        """The sliding target's number of entries at a step, strictly less than the source's."""
        source, target = self.source.axes[axis], self.target.axes[axis]
        return min(source + (target - source) * self.slide.progress(step + 1), source - 0.01)

    def temperature(self, step: int) -> float:
        first, last = self.options.temperature, self.options.temperature_end
        return first * (last / first) ** min(1.0, (step + 1) / self.steps)

    def scores(self, axis: str) -> Tensor:
        """Closed entries far below all others: their masks and their gradients are exactly 0."""
        return self.location[axis].masked_fill(self.closed[axis], -100.0)

    def values(self, step: int, *axes: str) -> dict[str, Tensor]:
        ks = [min(self.size(axis, step), self.most.get(axis, inf)) for axis in axes]
        scores = [self.scores(axis) for axis in axes]
        return dict(zip(axes, soft_topks(scores, ks=ks, temperature=self.temperature(step)), strict=True))

    def draw(self, step: int) -> dict[str, Tensor]:
        return {**self.settled, **self.values(step, *self.learned)}

    def support(self, masks: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The masks themselves, whose sum is the target's number now.

        Nothing is exactly zero, and counting what isn't makes the loss jump later.
        """
        return masks

    def penalty(self, step: int) -> None:
        return None

    def end(self, step: int) -> None:
        return None

    def optimizers(self) -> list[Optimizer]:
        return [_adamw(self.location, self.options.rate)]

    def soft_values(self, axis: str) -> Tensor:
        return self.values(self.steps - 1, axis)[axis]

    def expected(self, axis: str, step: int) -> Tensor:
        return self.values(step, axis)[axis].sum(-1)

    def opened(self, axis: str) -> Tensor:
        return self.soft_values(axis) > 0.5


def make_gates(
    source: Shape, target: Shape, *, scores: Mapping[str, Tensor], options: Options, steps: int, seed: int
) -> Gates:
    """Gates of the relaxation and start that `options` name, for a run of `steps`; scores are one-shot importances.

    From a ranked start, units that the scores found exactly dead are closed for good.
    """
    ranked = options.start == "ranked"
    closed = dead(source, target, scores=scores) if ranked else none_closed(source, target)
    slide = Slide(round(options.slide * steps))
    generator = torch.Generator().manual_seed(seed)
    if options.relaxation == "soft_topk":
        start = unit_start(source, target, scores=scores) if ranked else open_start(source, target, 0.5, generator)
        return SoftTopKGates(source, target, start=start, closed=closed, slide=slide, options=options, steps=steps)
    start = (
        ranked_start(source, target, scores=scores, level=options.level, spread=options.spread)
        if ranked
        else open_start(source, target, options.level, generator)
    )
    return HardConcreteGates(source, target, start=start, closed=closed, slide=slide, options=options, seed=seed)


def _adamw(location: nn.ParameterDict, lr: float) -> Optimizer:
    params = list(location.values())
    return AdamW([{"params": params, "peak_lr": lr, "clip": False}], weight_decay=0.0, fused=True)
