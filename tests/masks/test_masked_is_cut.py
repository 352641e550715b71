"""The property that everything leans on: a masked model and its cut are the same function."""

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import MODEL_TYPES, Small, build, small, tokens
from transformers import AutoModelForCausalLM

from shearling.arch import family_of
from shearling.arch.config import config_at
from shearling.axes.axis import MASKABLE, mask_shape
from shearling.axes.index import Kept, places, select
from shearling.axes.shape import Shape, shape_of
from shearling.axes.target import resolve_target
from shearling.cut.extract import Cut
from shearling.masks.attach import Attached
from shearling.masks.gates import cut_axes
from shearling.weights.model import load_model, reader, save_model

TOLERANCE = 1e-5  # of the largest logit, in fp32: what rounding leaves


def random_cut(shape: Shape, target: Shape, seed: int) -> tuple[Kept, dict[str, torch.Tensor]]:
    """Random entries kept, with random soft values in [0.01, 1]."""
    generator = torch.Generator().manual_seed(seed)
    axes = cut_axes(shape, target)
    scores = {axis: torch.rand(mask_shape(axis, shape.axes), generator=generator) for axis in axes}
    kept = select({axis: score.tolist() for axis, score in scores.items()}, source=shape, target=target)
    masks = {}
    for axis in axes:
        soft = 0.01 + 0.99 * torch.rand(mask_shape(axis, shape.axes), generator=generator)
        masks[axis] = torch.zeros_like(soft)
        for place in places(axis, kept):
            chosen = list(kept.along(axis, place))
            masks[axis][place][chosen] = soft[place][chosen]
    return kept, masks


def masked_logits(made: Small, masks: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    attached = Attached(made.model, made.family, sizes=made.shape.axes, axes=tuple(masks), tied=made.tied)
    attached.set(masks)
    with torch.no_grad():
        logits = made.model(ids).logits
    attached.remove()
    return logits


def cut_model(made: Small, target: Shape, kept: Kept, masks: dict[str, torch.Tensor]) -> Any:
    cut = Cut(made.family, made.config, target, kept, masks)
    read = reader(made.model)
    state = {row.at(layer): cut.tensor(row, layer, read) for row, layer in cut.rows()}
    model = build(config_at(made.family, made.config, target, layers=kept.layers, dtype="float32"))
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if made.tied else [])
    return model


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@st.composite
def cases(draw: Any) -> tuple[Small, Shape, int]:
    model_type = draw(st.sampled_from(MODEL_TYPES))
    kv_heads, group = draw(st.sampled_from([(1, 4), (2, 2), (4, 1), (3, 2), (3, 3)]))
    hidden = kv_heads * group * draw(st.integers(2, 4))
    made = small(
        model_type,
        hidden=hidden,
        layers=draw(st.integers(1, 4)),
        kv_heads=kv_heads,
        group=group,
        head_dim=draw(st.sampled_from([2, 8])),
        intermediate=draw(st.integers(1, 24)),
        tied=draw(st.booleans()),
        biases=draw(st.booleans()),
        seed=draw(st.integers(0, 9)),
    )
    new_kv, new_group = draw(st.integers(1, kv_heads)), draw(st.integers(1, group))
    heads = new_kv * new_group
    wanted = {
        "hidden_size": heads * draw(st.integers(1, hidden // heads)),  # a multiple, which Llama's config insists on
        "num_hidden_layers": draw(st.integers(1, made.shape["num_hidden_layers"])),
        "num_attention_heads": heads,
        "num_key_value_heads": new_kv,
        "intermediate_size": draw(st.integers(1, made.shape["intermediate_size"])),
    }
    target, _ = resolve_target(made.family, made.shape, wanted)
    return made, target, draw(st.integers(0, 1000))


@settings(max_examples=60)
@given(cases())
def test_masked_equals_cut_on_random_models(case: tuple[Small, Shape, int]) -> None:
    made, target, seed = case
    kept, masks = random_cut(made.shape, target, seed)
    ids = tokens(made.shape["vocab_size"])
    with torch.no_grad():
        logits = cut_model(made, target, kept, masks)(ids).logits
    assert relative(masked_logits(made, masks, ids), logits) < TOLERANCE


SMALLER = {
    "hidden": {"hidden_size": 12},
    "layer": {"num_hidden_layers": 2},
    "kv_head": {"num_key_value_heads": 1, "num_attention_heads": 2},
    "group": {"num_attention_heads": 2},
    "intermediate": {"intermediate_size": 7},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("axis", MASKABLE)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_masked_equals_cut_on_each_axis_alone(model_type: str, axis: str, tied: bool) -> None:
    made = small(model_type, tied=tied, biases=True)
    target, _ = resolve_target(made.family, made.shape, SMALLER[axis])
    assert cut_axes(made.shape, target) == (axis,)
    kept, masks = random_cut(made.shape, target, 3)
    ids = tokens(made.shape["vocab_size"])
    with torch.no_grad():
        logits = cut_model(made, target, kept, masks)(ids).logits
    assert relative(masked_logits(made, masks, ids), logits) < TOLERANCE


def test_a_mask_is_not_without_effect() -> None:
    """The comparison above could not pass with masks that do nothing."""
    made = small("llama")
    target, _ = resolve_target(made.family, made.shape, {"intermediate_size": 7})
    _, masks = random_cut(made.shape, target, 3)
    ids = tokens(made.shape["vocab_size"])
    with torch.no_grad():
        plain = made.model(ids).logits
    assert relative(masked_logits(made, masks, ids), plain) > 0.01


def test_masked_equals_cut_saved_and_reloaded_on_a_trained_model(shared, tmp_path) -> None:
    folder = shared / "models" / "stories260K"
    config = json.loads((folder / "config.json").read_text())
    family = family_of(config)
    shape = shape_of(family, config)
    wanted = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "num_key_value_heads": 3}
    target, _ = resolve_target(family, shape, {**wanted, "intermediate_size": 100})
    kept, masks = random_cut(shape, target, 0)
    model = load_model(folder)
    ids = tokens(512, length=64)
    made = Small(config, family, shape, True, model)
    masked = masked_logits(made, masks, ids)
    cut = Cut(family, config, target, kept, masks)
    save_model(
        tmp_path,
        family=family,
        config=config_at(family, config, target, layers=kept.layers, dtype="float32"),
        shape=target,
        dtype=torch.float32,
        tensor=lambda row, layer: cut.tensor(row, layer, reader(model)),
    )
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert again.lm_head.weight.data_ptr() == again.model.embed_tokens.weight.data_ptr()
    with torch.no_grad():
        assert relative(masked, again(ids).logits) < TOLERANCE


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_an_identity_cut_gives_back_every_bit(model_type: str, tied: bool) -> None:
    made = small(model_type, tied=tied, biases=True)
    for dtype in (torch.float32, torch.bfloat16):
        model = made.model.to(dtype)
        cut = Cut(made.family, made.config, made.shape, Kept({}, made.shape.axes))
        read = reader(model)
        rows = list(cut.rows())
        assert {row.at(layer) for row, layer in rows} == set(dict(model.named_parameters()))
        for row, layer in rows:
            found = cut.tensor(row, layer, read)
            assert found.dtype == dtype
            assert torch.equal(found, model.get_parameter(row.at(layer)))


def test_attaching_keeps_names_and_removing_brings_the_model_back() -> None:
    made = small("qwen3", tied=True)
    ids = tokens(made.shape["vocab_size"])
    with torch.no_grad():
        before = made.model(ids).logits
    names = list(made.model.state_dict())
    attached = Attached(made.model, made.family, sizes=made.shape.axes, axes=MASKABLE, tied=True)
    attached.set({axis: torch.full(mask_shape(axis, made.shape.axes), 0.5) for axis in MASKABLE})
    assert sorted(made.model.state_dict()) == sorted(names)
    with torch.no_grad():
        assert relative(made.model(ids).logits, before) > 0.01
    attached.remove()
    with torch.no_grad():
        assert torch.equal(made.model(ids).logits, before)
