"""What is known of families and of their configs' layers. What each table claims is tried in tests/conformance/."""

from typing import Any

import pytest
from transformers import AutoConfig

from shearling.arch import family_of
from shearling.arch.config import config_at
from shearling.axes.shape import shape_of
from shearling.axes.target import resolve_target
from shearling.errors import UserError

SIZES = {
    "hidden_size": 24,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "num_hidden_layers": 4,
    "intermediate_size": 7,
    "vocab_size": 50,
}
WINDOWS = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
WINDOWED = ("qwen2", "qwen3")


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_head_dim_that_was_derived_is_written_out_when_it_can_no_longer_be(model_type: str) -> None:
    source = {"model_type": model_type, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    source |= {"num_hidden_layers": 1, "intermediate_size": 5, "vocab_size": 9}
    family = family_of(source)
    before = shape_of(family, source)
    target, _ = resolve_target(family, before, {"hidden_size": 16})
    config = config_at(family, source, target, layers=(0,), dtype="float32")
    assert AutoConfig.for_model(**config).head_dim == before["head_dim"]


@pytest.mark.parametrize("named", [(), ("dtype",), ("torch_dtype",), ("dtype", "torch_dtype")])
def test_the_dtype_is_written_wherever_the_config_names_one(named: tuple[str, ...]) -> None:
    source = {"model_type": "llama", **SIZES, **dict.fromkeys(named, "float32")}
    family = family_of(source)
    config = config_at(family, source, shape_of(family, source), layers=(0, 1, 2, 3), dtype="bfloat16")
    assert {key: config.get(key) for key in named or ("dtype",)} == dict.fromkeys(named or ("dtype",), "bfloat16")


def cut_to_the_middle(source: dict[str, Any]) -> dict[str, Any]:
    """The config of its second and third layer."""
    family = family_of(source)
    target, _ = resolve_target(family, shape_of(family, source), {"num_hidden_layers": 2})
    return config_at(family, source, target, layers=(1, 2), dtype="float32")


@pytest.mark.parametrize("spelled", [False, True])
@pytest.mark.parametrize("model_type", WINDOWED)
def test_per_layer_lists_follow_the_kept_layers(model_type: str, spelled: bool) -> None:
    source = {"model_type": model_type, **SIZES, **WINDOWS}
    types = AutoConfig.for_model(**source).layer_types
    assert types == ["full_attention"] * 2 + ["sliding_attention"] * 2
    if spelled:
        source["layer_types"] = types = [*reversed(types)]
    assert AutoConfig.for_model(**cut_to_the_middle(source)).layer_types == types[1:3]


@pytest.mark.parametrize("without", [{"sliding_window": None}, {"use_sliding_window": False}])
@pytest.mark.parametrize("model_type", WINDOWED)
def test_without_a_window_all_layers_are_alike(model_type: str, without: dict[str, Any]) -> None:
    source = {"model_type": model_type, **SIZES, **WINDOWS, **without}
    assert set(AutoConfig.for_model(**source).layer_types) == {"full_attention"}
    assert family_of(source).kinds(source) == [frozenset()] * 4
    cut = cut_to_the_middle(source)
    assert "layer_types" not in cut
    assert AutoConfig.for_model(**cut).layer_types == ["full_attention"] * 2


@pytest.mark.parametrize("model_type", WINDOWED)
def test_a_per_layer_list_of_another_length_is_refused(model_type: str) -> None:
    config = {"model_type": model_type, "num_hidden_layers": 3, "layer_types": ["full_attention"] * 2}
    with pytest.raises(UserError, match="layer_types: found 2 entries; expected 3, one a layer"):
        family_of(config).kinds(config)


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(UserError, match=r"found 'qwen33'; expected one of .*llama.*inspect MODEL --draft"):
        family_of({"model_type": "qwen33"})


@pytest.mark.parametrize("model_type", [None, ["llama"], {"a": 1}, 3])
def test_a_model_type_that_is_no_word_is_refused(model_type: object) -> None:
    with pytest.raises(UserError, match=r"model_type: found .*; expected one of .*llama"):
        family_of({"model_type": model_type})


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"model_type": "llava", "vision_config": {}, "text_config": {"model_type": "llama"}},
            "found 'llava', a model with vision_config beside its text; .*: save that one alone, as llama",
        ),
        (
            {"model_type": "x", "vision_config": {}, "audio_config": {}, "text_config": {"model_type": "y"}},
            "found 'x', a model with vision_config and audio_config beside its text; .*, nor what it is made of",
        ),
    ],
)
def test_a_model_of_several_parts_is_refused_with_the_part(config: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        family_of(config)
