"""How masks are learned. The defaults healed best in our own runs (benchmarks/); PAPER is Sheared-LLaMA."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from shearling.errors import check_ranges


@dataclass(frozen=True)
class Options:
    """Shares are of the pruning steps. What belongs to one relaxation is ignored by the other.

    `relaxation`: `soft_topk` keeps exactly as many as the sliding target asks at each step and draws no noise;
    `hard_concrete` draws its masks and is held to the target by multipliers. `start`: `ranked` by one-shot importance,
    or `open`, all alike.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    relaxation: Literal["soft_topk", "hard_concrete"] = "soft_topk"
    start: Literal["ranked", "open"] = "ranked"
    lr: float | None = None  # AdamW on the gates; left out, RATES
    slide: float = 0.6  # share of the steps in which the target goes from the source's size to its own
    temperature: float = 0.03  # soft_topk: of scores that start evenly over (0, 1), at the first step ...
    temperature_end: float = 3e-4  # ... and at the last, geometrically in between: warmer ends lose more at the cut
    level: float = 0.0  # hard_concrete: log alpha halfway between the last kept and the first cut
    spread: float = 4.0  # hard_concrete, ranked: log alpha from the best entry to the worst
    multiplier_lr: float = 1.0
    quadratic: float = 300.0  # where l2 starts: from 0 the sizes swing about their targets in a run of few steps
    ascent: Literal["plain", "adamw"] = "plain"

    def __post_init__(self) -> None:
        tiny = 1e-9
        ranges = {"lr": (tiny, None), "slide": (0, 1), "temperature": (tiny, None), "temperature_end": (tiny, None)}
        check_ranges(
            self,
            {**ranges, "spread": (0, None), "multiplier_lr": (0, None), "quadratic": (0, None), "level": (-100, 100)},
        )

    @property
    def rate(self) -> float:
        return RATES[self.relaxation] if self.lr is None else self.lr


# Scores span 1, log alphas some 9.
RATES = {"soft_topk": 0.01, "hard_concrete": 0.3}


# arXiv 2310.06694 and its code: N(5, 0.01) starts, AdamW at 1.0 on gates and multipliers, a slide of 640 in 3,200.
PAPER = Options(
    relaxation="hard_concrete",
    start="open",
    lr=1.0,
    slide=0.2,
    level=5.0,
    multiplier_lr=1.0,
    quadratic=0.0,
    ascent="adamw",
)
