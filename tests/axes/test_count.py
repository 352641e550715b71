import json
from pathlib import Path

import pytest

from shearling.arch import family_of
from shearling.axes.cost import memory_bytes
from shearling.axes.count import (
    cache_bytes_per_token,
    flops_per_token,
    parameters,
    parameters_by_group,
)
from shearling.axes.shape import shape_of

GOLDEN = json.loads((Path(__file__).parents[1] / "golden.json").read_text())["models"]


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


def test_flops_grow_with_the_context_by_the_attention_alone():
    """Kaplan et al. 2020, table 1: 2N of the matrices, and 2 * 2 * layers * heads * head_dim for each position."""
    config = GOLDEN["Llama-2-7B"]["config"]
    family = family_of(config)
    embedding, norms = 32000 * 4096, (2 * 32 + 1) * 4096
    assert flops_per_token(family, config, context=0) == 2 * (6738415616 - embedding - norms)
    difference = flops_per_token(family, config, context=100) - flops_per_token(family, config, context=0)
    assert difference == 100 * 4 * 32 * 4096


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
