"""Extents at several sizes, explained as sums of products."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shearling.axes.axis import Dim
from shearling.draft.fit import fit, layouts

WORDS = ("kv_head", "group", "head_dim", "intermediate")


def samples(count: int = 14) -> list[dict[str, int]]:
    draw = random.Random(0)
    return [{word: draw.randint(1, 40) for word in WORDS} for _ in range(count)]


@pytest.mark.parametrize(
    "text",
    [
        "kv_head*group*head_dim",
        "kv_head*head_dim",
        "kv_head*group*head_dim + 2*kv_head*head_dim",
        "kv_head*3*head_dim",
        "2*intermediate",
        "intermediate*2",
        "head_dim",
        "intermediate + 64",
        "2050",
    ],
)
def test_a_dim_is_found_from_its_extents(text: str) -> None:
    dim, seen = Dim.parse(text), samples()
    found = fit(seen, [dim.size(s) for s in seen], WORDS)
    assert found is not None
    ways = [Dim.parse(way) for way in layouts(found)]
    assert all(way.size(s) == dim.size(s) for way in ways for s in seen)
    assert dim.products in [way.products for way in ways] or len(dim.products) > 1


def test_every_order_of_a_fused_projection_is_a_layout() -> None:
    seen = samples()
    dim = Dim.parse("kv_head*group*head_dim + kv_head*head_dim + kv_head*head_dim")
    found = fit(seen, [dim.size(s) for s in seen], WORDS)
    assert found is not None
    ways = list(layouts(found))
    assert ways[0] == "kv_head*group*head_dim+kv_head*head_dim+kv_head*head_dim"
    assert len(ways) == len(set(ways)) == 3


@pytest.mark.parametrize("wrong", [lambda s: s["head_dim"] ** 2, lambda s: s["group"] // 2, lambda s: 7 - s["kv_head"]])
def test_what_is_no_sum_of_products_is_not_explained(wrong) -> None:
    seen = samples()
    assert fit(seen, [wrong(s) for s in seen], WORDS) is None


@given(st.integers(0, 13), st.integers(1, 9))
def test_one_sample_that_differs_is_enough(where: int, by: int) -> None:
    seen = samples()
    extents = [s["kv_head"] * s["head_dim"] for s in seen]
    extents[where] += by
    assert fit(seen, extents, WORDS) is None


def test_few_samples_prove_nothing() -> None:
    seen = samples(9)
    assert fit(seen, [s["kv_head"] * s["group"] * s["head_dim"] for s in seen], WORDS) is None
