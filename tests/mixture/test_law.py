"""Laws of loss by size: the paper's references come out again, and so does any law that points were taken from."""

import json
from math import log
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shearling.mixture.law import Law, fit, lowest, root

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())
SIZES = [int(size) for size in GOLDEN["measured"]]


def measured(domain: str) -> list[float]:
    return [row[GOLDEN["domains"].index(domain)] for row in GOLDEN["measured"].values()]


def law_of(domain: str, **options: float) -> Law:
    law = fit(SIZES, measured(domain), **options)
    assert law is not None
    return law


@pytest.mark.parametrize("size", GOLDEN["references"])
def test_the_papers_references_to_all_four_decimals(size):
    for domain, expected in zip(GOLDEN["domains"], GOLDEN["references"][size], strict=True):
        assert law_of(domain).at(int(size)) == pytest.approx(expected, abs=0.5e-4), domain


def test_the_floor_may_be_below_zero():
    law = law_of("cc")
    assert law.floor == pytest.approx(GOLDEN["cc"]["floor"], abs=0.005)
    assert law.exponent == pytest.approx(GOLDEN["cc"]["exponent"], abs=0.0005)


@pytest.mark.parametrize("domain", GOLDEN["domains"])
def test_three_points_are_met(domain):
    law = law_of(domain)
    assert [law.at(size) for size in SIZES] == pytest.approx(measured(domain), abs=1e-12)
    assert max(map(abs, law.residuals)) < 1e-12


# Steep and shallow, floors of either sign; falls that stay above rounding.
laws = st.builds(
    lambda floor, fall, exponent: Law(floor, log(fall) + exponent * log(1e8), exponent, ()),
    st.floats(-3, 3),
    st.floats(0.1, 5),
    st.floats(0.02, 1.5),
)


@settings(max_examples=60)
@given(laws, st.lists(st.floats(1.3, 4), min_size=2, max_size=6), st.floats(0.3, 3))
def test_a_law_comes_back_from_its_points(law, ratios, share):
    sizes = [1e8]
    for ratio in ratios:
        sizes.append(sizes[-1] * ratio)
    losses = [law.at(size) for size in sizes]
    found = fit(sizes, losses)
    assert found is not None
    # At a size near those measured the losses agree, even where E and a are hardly decided.
    assert found.at(1e8 * share) == pytest.approx(law.at(1e8 * share), abs=2e-5)
    known = fit(sizes, losses, exponent=law.exponent)
    assert known is not None
    assert (known.floor, known.log_scale) == pytest.approx((law.floor, law.log_scale), rel=1e-6, abs=1e-6)


def test_two_points_and_an_exponent():
    law = fit(SIZES[:2], measured("wiki")[:2], exponent=0.2)
    assert law is not None
    assert [law.at(size) for size in SIZES[:2]] == pytest.approx(measured("wiki")[:2], abs=1e-12)
    assert law.exponent == 0.2


def test_more_points_are_least_squares():
    """No law near it does better, and the residuals are what it leaves."""
    sizes, losses = [1e8, 3e8, 1e9, 3e9, 1e10], [3.11, 2.79, 2.52, 2.36, 2.19]
    law = fit(sizes, losses)
    assert law is not None
    assert law.residuals == pytest.approx([loss - law.at(size) for size, loss in zip(sizes, losses, strict=True)])
    least = sum(residual**2 for residual in law.residuals)
    for floor, scale, exponent in [
        (1e-3, 0, 0),
        (-1e-3, 0, 0),
        (0, 1e-3, 0),
        (0, -1e-3, 0),
        (0, 0, 1e-4),
        (0, 0, -1e-4),
    ]:
        other = Law(law.floor + floor, law.log_scale + scale, law.exponent + exponent, ())
        assert sum((loss - other.at(size)) ** 2 for size, loss in zip(sizes, losses, strict=True)) > least


@pytest.mark.parametrize("count", [3, 5])
def test_losses_that_fall_faster_than_any_law(count):
    sizes = [1e9 * 2**k for k in range(count)]
    assert fit(sizes, [3 - 0.01 * k**2 - 0.01 * k for k in range(count)]) is None
    assert fit(sizes, [3 - 0.01 * k**2 - 0.01 * k for k in range(count)], exponent=0.1) is not None


def test_the_searches_find():
    assert root(lambda x: x**3 - 2, 0.0, 2.0) == pytest.approx(2 ** (1 / 3), abs=1e-15)
    assert lowest(lambda x: (x - 0.3) ** 2, -1.0, 5.0) == pytest.approx(0.3, abs=1e-7)
