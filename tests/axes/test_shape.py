"""What may be asked for, and what is said otherwise."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from shearling.arch import family_of
from shearling.axes.shape import Shape, shape_of
from shearling.axes.target import parse_target, resolve_target
from shearling.errors import UserError, UserErrors

LLAMA, QWEN3 = family_of({"model_type": "llama"}), family_of({"model_type": "qwen3"})
SOURCE = Shape(
    {
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "intermediate_size": 1536,
        "vocab_size": 49152,
    },
    rotary=("stride",),
)


def refusal(family=LLAMA, source=SOURCE, **wanted: int) -> str:
    with pytest.raises(UserError) as caught:
        resolve_target(family, source, wanted)
    return str(caught.value)


def test_axes_of_a_shape() -> None:
    assert SOURCE.axes == {
        "hidden": 576,
        "layer": 30,
        "kv_head": 3,
        "group": 3,
        "head_dim": 64,
        "rotary": 64,
        "intermediate": 1536,
        "vocab": 49152,
    }
    assert {key: dim.size(SOURCE.axes) for key, dim in SOURCE.dims.items()} == dict(SOURCE)


def test_parse() -> None:
    assert parse_target("hidden_size=384, num_hidden_layers=20") == {"hidden_size": 384, "num_hidden_layers": 20}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hidden_size=3,hidden_size=4", "found hidden_size twice"),
        ("hidden_size=4.5", "target hidden_size: found '4.5'; expected a whole number"),
        ("hidden_size", "target: found 'hidden_size'; expected sizes by name; write it as hidden_size=384"),
        ("", "found nothing; expected sizes"),
    ],
)
def test_parse_refuses(text: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_target(text)
    assert said in str(caught.value)


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(UserErrors) as caught:
        parse_target("layers=x,hidden_size=y")
    assert len(caught.value.errors) == 2
    assert refusal(hidden_size=0, num_hidden_layers=31).count("\n") == 1


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"hiden_size": 3}, "found 'hiden_size'; expected a size of a Llama: hidden_size, num_hidden_layers"),
        ({"hiden_size": 3}, "did you mean 'hidden_size'?"),
        ({"hidden_size": 577}, "target hidden_size: found 577; expected 1 to 576, the source's"),
        ({"hidden_size": 0}, "found 0; expected 1 to 576"),
        ({"num_hidden_layers": -1}, "found -1; expected 1 to 30"),
        ({"vocab_size": 100}, "cutting the vocabulary is not supported yet"),
        (
            {"head_dim": 33},
            "found 33; expected an even divisor of 64: no rope_theta in config; choose head_dim=32 or 64",
        ),
        ({"num_attention_heads": 7}, "found 7 on num_key_value_heads=3; expected 1 to 3 heads for each kv head"),
        ({"num_attention_heads": 7}, "choose num_attention_heads=6 or 9"),
        ({"num_key_value_heads": 2}, "found 9 on num_key_value_heads=2"),
        ({"num_key_value_heads": 2}, "choose num_attention_heads=6, or num_key_value_heads=3"),
        ({"hidden_size": 100}, "found 100 with num_attention_heads=9; expected a multiple of num_attention_heads"),
        ({"hidden_size": 100}, "choose hidden_size=99 or 108"),
    ],
)
def test_refusals(wanted: dict[str, int], said: str) -> None:
    assert said in refusal(**wanted)


def test_a_rule_of_one_family_is_not_another_s() -> None:
    target, _ = resolve_target(QWEN3, SOURCE, {"hidden_size": 100})
    assert target["hidden_size"] == 100


def test_heads_alone_take_their_kv_heads_along_on_a_multi_head_source() -> None:
    source = Shape({**SOURCE, "num_key_value_heads": 9})
    target, notes = resolve_target(LLAMA, source, {"num_attention_heads": 6})
    assert target["num_key_value_heads"] == 6
    assert notes == ["num_key_value_heads follows num_attention_heads: 6"]


def test_the_source_itself_is_a_target() -> None:
    assert resolve_target(LLAMA, SOURCE, dict(SOURCE)) == (SOURCE, [])


@given(
    st.integers(1, 8),
    st.integers(1, 4),
    st.integers(1, 6),
    st.fixed_dictionaries({"hidden_size": st.integers(1, 192), "num_attention_heads": st.integers(1, 32)}),
    st.integers(1, 8),
)
def test_the_values_that_a_refusal_names_are_valid(
    kv_heads: int, group: int, per_head: int, wanted: dict[str, int], new_kv: int
) -> None:
    heads = kv_heads * group
    sizes = {"hidden_size": heads * per_head, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    source = Shape({**SOURCE, **sizes})
    asked = {**wanted, "num_key_value_heads": new_kv}
    assume(all(asked[key] <= source[key] for key in asked))
    try:
        target, _ = resolve_target(LLAMA, source, asked)
    except UserError as error:
        errors = getattr(error, "errors", (error,))
        # Where one size alone can put all right, only such values are named.
        mendable = len(errors) == 1 and any(
            _tried(source, {**asked, key: value}) is None
            for key in ("hidden_size", "num_attention_heads", "num_key_value_heads")
            if key in errors[0].change or key in f"{errors[0].what} {errors[0].found}"
            for value in range(1, source[key] + 1)
        )
        for one in errors:
            for choice in one.change.removeprefix("choose ").split(", or "):
                key, values = choice.split("=")
                for value in values.split(" or "):
                    mended = {**asked, key: int(value)}
                    if mendable:
                        assert _tried(source, mended) is None
                    with_rest = getattr(_tried(source, mended), "errors", (_tried(source, mended),))
                    assert not any(e is not None and e.what == one.what and e.found == one.found for e in with_rest)
    else:
        assert target["num_attention_heads"] == target["num_key_value_heads"] * target.axes["group"]
        assert target["hidden_size"] % target["num_attention_heads"] == 0


def _tried(source: Shape, wanted: dict[str, int]) -> UserError | None:
    try:
        resolve_target(LLAMA, source, wanted)
    except UserError as error:
        return error
    return None


@pytest.mark.parametrize(("key", "value"), [("hidden_size", None), ("hidden_size", "64"), ("vocab_size", True)])
def test_a_config_without_its_sizes_is_refused(key: str, value: object) -> None:
    config = {**SOURCE, "model_type": "llama", key: value}
    with pytest.raises(UserError, match=f"config.json: {key}: found {value!r}"):
        shape_of(LLAMA, config)


def test_a_config_whose_heads_don_t_share_evenly_is_refused() -> None:
    config = {**SOURCE, "model_type": "llama", "num_key_value_heads": 2}
    with pytest.raises(UserError, match="not a multiple of num_key_value_heads=2"):
        shape_of(LLAMA, config)
