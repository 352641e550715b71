"""Learning-rate schedules: the share of the peak rate at a step, as pure functions."""

from collections.abc import Callable
from math import cos, pi

Schedule = Callable[[int, int], float]  # (step, steps) -> share of the peak rate


def cosine(step: int, steps: int, *, warmup: float, floor: float = 0.1) -> float:
    """Linear warm-up over the share `warmup` of all steps, then a cosine to `floor` (Sheared-LLaMA, appendix)."""
    rising = _rising(step, steps, warmup)
    if rising < 1:
        return rising
    done = (step - warmup * steps) / max(1.0, (1 - warmup) * steps)
    return floor + (1 - floor) * (1 + cos(pi * min(1.0, done))) / 2


def trapezoid(step: int, steps: int, *, warmup: float, decay: float) -> float:
    """Warm-up, stable, and a linear decay to about 0 over the last share `decay` (Hu et al. 2024, arXiv 2404.06395).

    With decay=0 it stays up, for a stage that another goes on from.
    """
    falling = (steps - step) / (decay * steps) if decay else 1.0
    return min(_rising(step, steps, warmup), falling, 1.0)


def _rising(step: int, steps: int, warmup: float) -> float:
    return (step + 1) / (warmup * steps) if step + 1 < warmup * steps else 1.0
