"""A scaling law through losses measured at several sizes, L(N) = E + A / N^a.

N parameters, L nats per token or per byte, E the loss that no size gets below, A and a how fast it is come near to.
Nothing is constrained but a > 0: E may come out negative.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import exp, expm1, inf, log, log1p, sqrt

# a ln(largest / smallest size): from a law that can't be told from E - A ln N, to one that is flat after one size.
STEEPNESS = (1e-4, 1e2)
GRID = 300
LARGEST_POWER = 709.0  # e to it is about the largest float64
HALVINGS = 200  # more than a float64 has bits, at any start


@dataclass(frozen=True)
class Law:
    """E is `floor`, a is `exponent`, and A is kept as its logarithm, being out of range where a is large.

    `residuals` are the losses measured less the law's, by rising size.
    """

    floor: float
    log_scale: float
    exponent: float
    residuals: tuple[float, ...]

    def at(self, size: float) -> float:
        """The loss of a model of `size` parameters; infinite where a float64 can't hold it."""
        power = self.log_scale - self.exponent * log(size)
        return self.floor + (exp(power) if power < LARGEST_POWER else inf)


def fit(sizes: Sequence[float], losses: Sequence[float], *, exponent: float | None = None) -> Law | None:
    """The law through `losses` at rising `sizes`, each loss below the one before.

    Three points decide E, A and a; of more, the least squares. With the `exponent` given two decide, and of more, the
    least squares in E and A. None where no exponent above 0 fits best: then the losses fall faster than any such law.
    """
    assert len(sizes) == len(losses) >= (3 if exponent is None else 2)
    assert all(one < two for one, two in pairwise(sizes))
    assert all(one > two for one, two in pairwise(losses))
    if exponent is None:
        exponent = exact_exponent(sizes, losses) if len(sizes) == 3 else least_squares_exponent(sizes, losses)
    return None if exponent is None else at_exponent(sizes, losses, exponent)


def at_exponent(sizes: Sequence[float], losses: Sequence[float], exponent: float) -> Law:
    """The least squares in E and A, which are linear in (N / the smallest N)^-a."""
    x = [exp(-exponent * log(size / sizes[0])) for size in sizes]
    mean_x, mean_loss = sum(x) / len(x), sum(losses) / len(losses)
    covariance = sum((xi - mean_x) * (loss - mean_loss) for xi, loss in zip(x, losses, strict=True))
    scale = covariance / sum((xi - mean_x) ** 2 for xi in x)  # above 0: x falls with size, and so does the loss
    floor = mean_loss - scale * mean_x
    residuals = tuple(loss - floor - scale * xi for xi, loss in zip(x, losses, strict=True))
    return Law(floor, log(scale) + exponent * log(sizes[0]), exponent, residuals)


def exact_exponent(sizes: Sequence[float], losses: Sequence[float]) -> float | None:
    """The exponent of the law through three points: the one at which the two falls have the ratio that they have."""
    first, second = log(sizes[1] / sizes[0]), log(sizes[2] / sizes[1])
    ratio = (losses[0] - losses[1]) / (losses[1] - losses[2])

    def excess(a: float) -> float:
        return expm1(a * first) / -expm1(-a * second) - ratio

    # It rises with a, and the denominator stays below 1: at the upper end it can't be below 0.
    low, high = STEEPNESS[0] / (first + second), log1p(ratio) / first
    return None if low >= high or excess(low) >= 0 else root(excess, low, high)


def least_squares_exponent(sizes: Sequence[float], losses: Sequence[float]) -> float | None:
    """The exponent whose best law has the least sum of squares, to about eight digits."""
    span, (least, most) = log(sizes[-1] / sizes[0]), STEEPNESS

    def error(steepness: float) -> float:
        return sum(residual**2 for residual in at_exponent(sizes, losses, exp(steepness) / span).residuals)

    # In the logarithm, and from a grid: with noise the sum can have more than one valley.
    start, step = log(least), log(most / least) / GRID
    errors = [error(start + step * k) for k in range(GRID + 1)]
    best = errors.index(min(errors))
    if best == 0:
        return None
    middle = start + step * best
    return exp(lowest(error, middle - step, min(middle + step, log(most)))) / span


def root(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a rising function crosses 0 between `low` and `high`, to the last bit, by bisection."""
    for _ in range(HALVINGS):
        middle = low + (high - low) / 2
        if not low < middle < high:
            break
        low, high = (middle, high) if function(middle) < 0 else (low, middle)
    return low + (high - low) / 2


def lowest(function: Callable[[float], float], low: float, high: float) -> float:
    """The lowest point of a function with one valley between `low` and `high`, by golden sections."""
    golden = (sqrt(5) - 1) / 2
    left, right = high - golden * (high - low), low + golden * (high - low)
    at_left, at_right = function(left), function(right)
    width = inf
    while high - low < width:
        width = high - low
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - golden * (high - low)
            at_left = function(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + golden * (high - low)
            at_right = function(right)
        if width < 1e-12:
            break
    return (low + high) / 2
