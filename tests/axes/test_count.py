import json
from pathlib import Path

import pytest
import torch
from small_models import small, tokens
from torch.utils.flop_counter import FlopCounterMode

from shearling.arch import families, family_of
from shearling.axes.cost import memory_bytes
from shearling.axes.count import (
    cache_bytes_per_token,
    flops_per_token,
    parameters,
    parameters_by_group,
)
from shearling.axes.shape import shape_of

GOLDEN = json.loads((Path(__file__).parents[1] / "golden.json").read_text())["models"]
MODEL_TYPES = [model_type for family in families() for model_type in family.model_types]


@pytest.mark.parametrize("name", GOLDEN)
def test_published_counts(name):
    entry = GOLDEN[name]
    family, config = family_of(entry["config"]), entry["config"]
    shape = shape_of(family, config)
    assert entry["source"]
    assert parameters(family, config) == entry["parameters"]
    assert parameters(family, config, shape) == entry["parameters"]
    assert shape["head_dim"] == entry["head_dim"]
    assert cache_bytes_per_token(family, config, shape) == entry["kv_cache_bytes_per_token"]
    by_hand = 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * entry["head_dim"] * 2
    assert by_hand == entry["kv_cache_bytes_per_token"]


@pytest.mark.parametrize("name", [name for name in GOLDEN if "parameters_without_embedding_and_head" in GOLDEN[name]])
def test_published_counts_without_embedding_and_head(name):
    entry = GOLDEN[name]
    family, config = family_of(entry["config"]), entry["config"]
    tables = 2 * config["vocab_size"] * config["hidden_size"]
    assert parameters(family, config) - tables == entry["parameters_without_embedding_and_head"]


@pytest.mark.parametrize("name", [name for name in GOLDEN if "shared" in GOLDEN[name]])
def test_real_configs_have_the_published_counts(name, shared):
    config = json.loads((shared / "data" / "configs" / GOLDEN[name]["shared"] / "config.json").read_text())
    family = family_of(config)
    assert parameters(family, config) == GOLDEN[name]["parameters"]
    assert dict(shape_of(family, config)) == dict(shape_of(family, GOLDEN[name]["config"]))


def test_a_cut_of_llama_2_7b_has_the_papers_sizes():
    source = GOLDEN["Llama-2-7B"]["config"]
    for name in ("Sheared-LLaMA-2.7B", "Sheared-LLaMA-1.3B"):
        family = family_of(source)
        shape = shape_of(family, GOLDEN[name]["config"])
        assert parameters(family, source, shape) == GOLDEN[name]["parameters"]


@pytest.mark.parametrize("name", GOLDEN)
def test_groups_sum_to_the_total(name):
    config = GOLDEN[name]["config"]
    groups = parameters_by_group(family_of(config), config)
    assert sum(groups.values()) == GOLDEN[name]["parameters"]
    assert groups["embedding"] == config["vocab_size"] * config["hidden_size"]
    head = 0 if config.get("tie_word_embeddings") else config["vocab_size"] * config["hidden_size"]
    assert groups["head"] == head + config["hidden_size"]  # with the last norm
    three_matrices = 3 * config["hidden_size"] * config["intermediate_size"]
    assert groups["feed_forward"] == config["num_hidden_layers"] * (three_matrices + config["hidden_size"])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_counts_are_the_real_models(model_type, biases, tied):
    source = small(model_type, tied=tied, biases=biases)
    real = {name: parameter.numel() for name, parameter in source.model.named_parameters()}
    assert parameters(source.family, source.config) == sum(real.values())
    groups = parameters_by_group(source.family, source.config)
    assert sum(groups.values()) == sum(real.values())
    assert groups["attention"] == sum(
        n for name, n in real.items() if ".self_attn." in name or ".input_layernorm." in name
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_flops_are_those_of_torchs_counter(model_type, group, tied):
    """Of T tokens in one forward, each attends to T positions: eager attention computes what it masks, too."""
    source = small(model_type, group=group, tied=tied, biases=True)
    length, sequences = 13, 2
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        source.model(tokens(40, sequences=sequences, length=length), use_cache=False)
    expected = flops_per_token(source.family, source.config, context=length)
    assert counter.get_total_flops() == sequences * length * expected


def test_flops_grow_with_the_context_by_the_attention_alone():
    """Kaplan et al. 2020, table 1: 2N of the matrices, and 2 * 2 * layers * heads * head_dim for each position."""
    config = GOLDEN["Llama-2-7B"]["config"]
    family = family_of(config)
    embedding, norms = 32000 * 4096, (2 * 32 + 1) * 4096
    assert flops_per_token(family, config, context=0) == 2 * (6738415616 - embedding - norms)
    difference = flops_per_token(family, config, context=100) - flops_per_token(family, config, context=0)
    assert difference == 100 * 4 * 32 * 4096


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_cache_bytes_are_those_of_the_real_cache(model_type, dtype):
    source = small(model_type, kv_heads=3, group=2, dtype=dtype)
    length, sequences = 11, 2
    with torch.no_grad():
        cache = source.model(tokens(40, sequences=sequences, length=length), use_cache=True).past_key_values
    held = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    found = sum(tensor.numel() * tensor.element_size() for tensor in held)
    each = cache_bytes_per_token(source.family, source.config, bytes_per_entry=dtype.itemsize)
    assert found == sequences * length * each
    if dtype == torch.bfloat16:
        assert each == cache_bytes_per_token(source.family, source.config)


def test_memory_bytes():
    config = GOLDEN["SmolLM2-135M"]["config"]
    family = family_of(config)
    expected = {
        "weights_float32_bytes": 4 * 134515008,
        "weights_bfloat16_bytes": 2 * 134515008,
        "kv_cache_bfloat16_bytes": 23040 * 2048,
        "training_adamw_bytes": 16 * 134515008,
    }
    assert memory_bytes(family, config, context=2048) == expected
    half = shape_of(family, {**config, "num_hidden_layers": 15})
    assert memory_bytes(family, config, context=2048, shape=half)["kv_cache_bfloat16_bytes"] == 23040 * 1024
