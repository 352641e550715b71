"""Every table against transformers: names, sizes, ties, names on disk, defaults. Nothing here is written per family."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from shearling.arch import families, family_of
from shearling.arch.config import config_at
from shearling.axes.shape import KEYS, shape_of
from shearling.axes.spec import Family
from shearling.axes.target import resolve_target
from shearling.errors import UserError
from shearling.weights.header import read_header

TYPES = [(family, model_type) for family in families() for model_type in family.model_types]
ODD = {
    "grouped": {"hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10},
    "multi-head": {"hidden_size": 20, "num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 4},
    "one kv head": {"hidden_size": 30, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 2},
}


def on_meta(config: dict[str, Any]) -> Any:
    settings = dict(config)
    made = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(made)


def assert_table_is_model(family: Family, config: dict[str, Any]) -> None:
    model = on_meta(config)
    sizes = shape_of(family, config).axes
    expected = {row.at(layer): tuple(dim.size(sizes) for dim in row.dims) for row, layer in family.named(config)}
    rows = [row.at(layer) for row, layer in family.named(config)]
    assert len(rows) == len(set(rows))
    assert expected == {name: tuple(p.shape) for name, p in model.named_parameters()}
    for row in family.tensors:
        if row.tied and row not in family.present(config):
            assert model.get_parameter(row.name) is model.get_parameter(row.tied)
        elif row.tied:
            assert model.get_parameter(row.name) is not model.get_parameter(row.tied)
    for row, layer in family.named(config):
        if row.role == "norm":
            norm = model.get_submodule(row.at(layer).removesuffix(".weight"))
            eps = getattr(norm, family.normalisation(row).eps_attribute)
            assert eps == family.setting(config, family.normalisation(row).eps_key)


def small(model_type: str, **settings: Any) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "num_hidden_layers": 3,
        "intermediate_size": 7,
        "vocab_size": 50,
        **ODD["grouped"],
        **settings,
    }


def flags(family: Family) -> dict[str, bool]:
    """The config flags under which the table has more parameters."""
    return {flag: True for row in family.tensors for flag in row.when}


@pytest.mark.parametrize(("family", "model_type"), TYPES)
def test_the_table_is_the_default_model(family: Family, model_type: str) -> None:
    assert_table_is_model(
        family, {**AutoConfig.for_model(model_type).to_dict(), "num_hidden_layers": 2, "layer_types": None}
    )


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize(("family", "model_type"), TYPES)
def test_the_table_is_an_odd_model(family: Family, model_type: str, odd: str, tied: bool, biased: bool) -> None:
    config = small(model_type, **ODD[odd], tie_word_embeddings=tied)
    assert_table_is_model(family, {**config, **dict.fromkeys(flags(family), biased)})


def test_the_tables_are_the_real_models(shared: Path) -> None:
    found = 0
    for path in sorted((shared / "data" / "configs").glob("*/config.json")):
        config = json.loads(path.read_text())
        try:
            family = family_of(config)
        except UserError:
            continue
        assert_table_is_model(family, config)
        found += 1
    assert found >= 10


@pytest.mark.parametrize(("family", "model_type"), TYPES)
def test_names_on_disk(family: Family, model_type: str, tmp_path: Path) -> None:
    config = {**small(model_type), **flags(family)}
    settings = dict(config)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings))
    model.save_pretrained(tmp_path)
    on_disk = {name: tuple(info.shape) for name, info in read_header(tmp_path / "model.safetensors").items()}
    sizes = shape_of(family, config).axes
    rows = family.named(config)
    assert on_disk == {row.at_disk(layer): tuple(dim.size(sizes) for dim in row.dims) for row, layer in rows}


@pytest.mark.parametrize(("family", "model_type"), TYPES)
def test_what_a_config_leaves_out_is_what_transformers_fills_in(family: Family, model_type: str) -> None:
    """Each default of the table, in a config that has nothing but the sizes without one."""
    bare = {"model_type": model_type, "hidden_size": 1024, "num_attention_heads": 64, "num_hidden_layers": 2}
    made = AutoConfig.for_model(**bare).to_dict()
    for key in family.defaults:
        if key not in ("use_sliding_window", "sliding_window", "max_window_layers"):
            assert family.setting(bare, key) == made.get(key, family.setting(bare, key)), key


@pytest.mark.parametrize(("family", "model_type"), TYPES)
def test_the_config_of_a_cut_builds_the_cut(family: Family, model_type: str) -> None:
    source = small(model_type, max_position_embeddings=77)
    wanted = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    target, _ = resolve_target(family, shape_of(family, source), {**wanted, "intermediate_size": 5})
    config = config_at(family, source, target, layers=(0, 2), dtype="bfloat16")
    assert shape_of(family, config) == target
    assert {key: config[key] for key in source if key not in KEYS} == {k: source[k] for k in source if k not in KEYS}
    assert config["dtype"] == "bfloat16"
    assert_table_is_model(family, config)


@pytest.mark.parametrize(("family", "model_type"), TYPES)
def test_a_head_dim_that_was_derived_is_written_out_when_it_can_no_longer_be(family: Family, model_type: str) -> None:
    source = {"model_type": model_type, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    source |= {"num_hidden_layers": 1, "intermediate_size": 5, "vocab_size": 9}
    before = shape_of(family, source)
    target, _ = resolve_target(family, before, {"hidden_size": 16})
    config = config_at(family, source, target, layers=(0,), dtype="float32")
    assert AutoConfig.for_model(**config).head_dim == before["head_dim"]


WINDOWED = [(family, model_type) for family, model_type in TYPES if family.layer_rules]


@pytest.mark.parametrize("spelled", [False, True])
@pytest.mark.parametrize(("family", "model_type"), WINDOWED)
def test_per_layer_lists_follow_the_kept_layers(family: Family, model_type: str, spelled: bool) -> None:
    source = small(model_type, num_hidden_layers=4, use_sliding_window=True, sliding_window=8, max_window_layers=2)
    types = AutoConfig.for_model(**source).layer_types
    assert types == ["full_attention"] * 2 + ["sliding_attention"] * 2
    if spelled:
        source["layer_types"] = types = [*reversed(types)]
    target, _ = resolve_target(family, shape_of(family, source), {"num_hidden_layers": 2})
    config = config_at(family, source, target, layers=(1, 2), dtype="float32")
    assert AutoConfig.for_model(**config).layer_types == types[1:3]


def test_an_unknown_family_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"found 'qwen33'; expected one of .*llama.*did you mean 'qwen3'"):
        family_of({"model_type": "qwen33"})


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_a_per_layer_list_of_another_length_is_refused(model_type: str) -> None:
    config = {"model_type": model_type, "num_hidden_layers": 3, "layer_types": ["full_attention"] * 2}
    family = family_of(config)
    with pytest.raises(UserError, match="layer_types: found 2 entries; expected 3, one a layer"):
        family.kinds(config)
