"""Counting, slicing and spreading agree, for any spec and any shape."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import LLAMAS

from shearling.arch import family_of
from shearling.axes.axis import AXES, MASKABLE, Dim, mask_shape
from shearling.axes.count import expected_parameters, parameters
from shearling.axes.index import Kept, cover, kept_shape, places, positions, select
from shearling.axes.shape import KEYS, Shape

SIZES = st.fixed_dictionaries(
    {axis: st.integers(1, 4) for axis in AXES if axis not in ("head_dim", "rotary")}
    | {"head_dim": st.sampled_from([2, 4, 6, 8])}
).map(lambda sizes: {**sizes, "rotary": sizes["head_dim"]})


@st.composite
def products(draw: Any) -> tuple[str | int, ...]:
    """Axes in an order in which outer ones come first, each once, constants between them."""
    axes = draw(st.lists(st.sampled_from(["kv_head", "hidden", "rotary", "intermediate", "vocab"]), unique=True))
    for inner in ("group", "head_dim"):
        if "kv_head" in axes and draw(st.booleans()):
            axes.insert(draw(st.integers(axes.index("kv_head") + 1, len(axes))), inner)
    factors: list[str | int] = list(axes)
    for _ in range(draw(st.integers(0, 2))):
        factors.insert(draw(st.integers(0, len(factors))), draw(st.integers(1, 3)))
    return tuple(factors) or (1,)


DIMS = st.lists(products(), min_size=1, max_size=3).map(lambda found: Dim(tuple(found)))


def shape(sizes: dict[str, int]) -> Shape:
    found = {key: dim.size(sizes) for key, dim in KEYS.items() if sizes.keys() >= set(dim.axes())}
    return Shape(found, rotary=("prefix", "stride"))


def nested(dims: tuple[int, ...], value: Any) -> Any:
    return [nested(dims[1:], value) for _ in range(dims[0])] if dims else value()


@st.composite
def cuts(draw: Any) -> tuple[Kept, Shape]:
    source = draw(SIZES)
    smaller = {axis: draw(st.integers(1, size)) if axis in MASKABLE else size for axis, size in source.items()}
    smaller["head_dim"] = smaller["rotary"] = 2 * draw(st.integers(1, source["head_dim"] // 2))
    random = draw(st.randoms(use_true_random=False))
    scores = {axis: nested(mask_shape(axis, source), random.random) for axis in MASKABLE}
    return select(scores, source=shape(source), target=shape(smaller)), shape(smaller)


@given(cuts(), DIMS)
def test_counting_agrees_with_slicing(cut: tuple[Kept, Shape], dim: Dim) -> None:
    kept, target = cut
    assert kept_shape(shape(dict(kept.source)), kept) == target
    for layer in kept.layers:
        rows = kept.rows(dim, layer)
        whole = range(dim.size(kept.source))
        assert len(whole if rows is None else rows) == dim.size(target.axes)
        assert rows is None or (rows == sorted(set(rows)) and set(rows) <= set(whole))


@given(cuts(), DIMS)
def test_what_is_kept_is_where_every_mask_is_open(cut: tuple[Kept, Shape], dim: Dim) -> None:
    """Slicing and spreading are two ways through the same order: an entry stays where all its axes' entries do."""
    kept, _ = cut
    for layer in kept.layers:
        stays = [True] * dim.size(kept.source)
        for axis in set(dim.axes()) & set(kept.choices):
            inner = tuple(outer for outer in AXES[axis].within if outer != "layer")
            support = []
            for place in [()] if not inner else [(h,) for h in range(kept.source["kv_head"])]:
                within = tuple(layer if o == "layer" else place[0] for o in AXES[axis].within)
                chosen = kept.choices[axis].get(within, ())
                support += [entry in chosen for entry in range(kept.source[axis])]
            for entry, flat in enumerate(positions(dim, axis, kept.source)):
                stays[entry] &= flat < 0 or support[flat]
        rows = kept.rows(dim, layer)
        assert [i for i, stay in enumerate(stays) if stay] == (list(range(len(stays))) if rows is None else rows)


@settings(max_examples=60)
@given(cuts(), st.sampled_from(LLAMAS), st.booleans(), st.booleans())
def test_expected_size_at_0_and_1_is_the_count_of_the_cut(
    cut: tuple[Kept, Shape], model_type: str, tied: bool, biases: bool
) -> None:
    kept, target = cut
    config: dict[str, Any] = {"model_type": model_type, "tie_word_embeddings": tied}
    config |= {"attention_bias": biases, "mlp_bias": biases}
    family = family_of(config)
    keep = {}
    for axis in kept.choices:
        keep[axis] = nested(mask_shape(axis, kept.source), lambda: 0)
        for place, chosen in kept.choices[axis].items():
            along = keep[axis]
            for outer in place:
                along = along[outer]
            for entry in chosen:
                along[entry] = 1
    expected = expected_parameters(family, config, kept.source, keep)
    count = parameters(family, config, target)
    assert expected == count
    sliced = 0
    for row, layer in family.named(config, range(target["num_hidden_layers"])):
        source_layer = None if layer is None else kept.layers[layer]
        size = 1
        for dim in row.dims:
            rows = kept.rows(dim, source_layer)
            size *= dim.size(kept.source) if rows is None else len(rows)
        sliced += size
    assert sliced == count


def test_expected_size_by_hand() -> None:
    """Two neurons at 1/2 and 1/4 of one layer at 1/2: a Mistral's feed-forward weights, weighed."""
    config = {"model_type": "mistral", "tie_word_embeddings": True}
    sizes = {
        "vocab": 3,
        "hidden": 2,
        "layer": 1,
        "kv_head": 1,
        "group": 1,
        "head_dim": 1,
        "rotary": 1,
        "intermediate": 2,
    }
    found = expected_parameters(family_of(config), config, sizes, {"layer": [0.5], "intermediate": [[0.5, 0.25]]})
    attention, norms, neurons = 4 * 2, 2 * 2, 3 * 0.75 * 2
    assert found == 3 * 2 + 2 + 0.5 * (attention + norms + neurons)


def test_select_keeps_the_highest_and_the_first_of_equals() -> None:
    sizes = dict.fromkeys(AXES, 2) | {"hidden": 4}
    scores = {"hidden": [1.0, 3.0, 1.0, 1.0]}
    kept = select(scores, source=shape(sizes), target=shape({**sizes, "hidden": 2}))
    assert kept.choices == {"hidden": {(): (0, 1)}}


def test_each_kept_kv_head_of_each_kept_layer_chooses_its_own_groups() -> None:
    sizes = dict.fromkeys(AXES, 2)
    scores = {"layer": [0, 1], "kv_head": [[0, 0], [1, 0]], "group": [[[0, 0]] * 2, [[0, 1], [1, 0]]]}
    target = shape({**sizes, "layer": 1, "kv_head": 1, "group": 1})
    kept = select(scores, source=shape(sizes), target=target)
    assert kept.choices == {"layer": {(): (1,)}, "kv_head": {(1,): (0,)}, "group": {(1, 0): (1,)}}
    assert places("group", kept) == [(1, 0)]
    assert kept.rows(Dim.parse("kv_head*group*head_dim"), 1) == [2, 3]
    assert kept.to_json()["group"] == [{"within": [1, 0], "kept": [1]}]


def test_a_selection_that_differs_from_place_to_place_has_no_shape() -> None:
    kept = Kept({"intermediate": {(0,): (0,), (1,): (0, 1)}}, dict.fromkeys(AXES, 2))
    with pytest.raises(ValueError, match="intermediate"):
        kept.counts()


def test_a_sum_of_products_lies_one_after_the_other() -> None:
    dim = Dim.parse("kv_head*2*head_dim+kv_head")
    sizes = {**dict.fromkeys(AXES, 1), "kv_head": 2, "head_dim": 2}
    assert positions(dim, "kv_head", sizes) == [0, 0, 0, 0, 1, 1, 1, 1, 0, 1]
    assert positions(dim, "head_dim", sizes) == [0, 1, 0, 1, 2, 3, 2, 3, -1, -1]
    kept = Kept({"kv_head": {(0,): (1,)}}, sizes)
    assert kept.rows(dim, 0) == [4, 5, 6, 7, 9]


def test_of_layers_some_of_every_kind_stay() -> None:
    kinds = tuple(frozenset({word}) for word in ("local", "local", "global", "local", "global"))
    source = Shape({"num_hidden_layers": 5}, kinds=kinds)
    scores = {"layer": [5, 4, 1, 3, 2]}
    kept = {n: select(scores, source=source, target=source.of({"num_hidden_layers": n})).layers for n in (4, 3, 2)}
    assert kept == {4: (0, 1, 3, 4), 3: (0, 1, 4), 2: (0, 4)}


def test_as_few_layers_as_can_be_are_of_every_kind() -> None:
    """Though the one that comes first has as many kinds as those that are enough."""
    assert cover([frozenset("ab"), frozenset("ac"), frozenset("bd")], range(3)) == (1, 2)


@given(st.lists(st.frozensets(st.sampled_from("abcd"), min_size=1), min_size=1, max_size=8), st.randoms())
def test_whatever_the_kinds_are_all_of_them_stay(kinds: list[frozenset[str]], random: Any) -> None:
    source = Shape({"num_hidden_layers": len(kinds)}, kinds=tuple(kinds))
    scores = {"layer": [random.random() for _ in kinds]}
    least = len(cover(source.kinds, range(len(kinds))))
    for n in range(least, len(kinds)):
        kept = select(scores, source=source, target=source.of({"num_hidden_layers": n})).layers
        assert len(kept) == n
        assert frozenset().union(*(kinds[layer] for layer in kept)) == frozenset().union(*kinds)
