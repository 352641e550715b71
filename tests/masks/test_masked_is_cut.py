"""The property that everything leans on: a masked model and its cut are the same function."""

import json
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import DENSE, MODEL_TYPES, Small, small, tokens
from transformers import AutoModelForCausalLM

from shearling.arch import family_of
from shearling.arch.config import config_at
from shearling.axes.axis import mask_shape
from shearling.axes.shape import Shape, shape_of
from shearling.axes.target import resolve_target
from shearling.conformance.exact import cut_model, masked_logits
from shearling.conformance.finding import TOLERANCE
from shearling.conformance.model import relative
from shearling.conformance.targets import random_cut
from shearling.cut.extract import Cut
from shearling.masks.attach import Attached
from shearling.weights.model import load_model, reader, save_model


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
        # Over one or two values that are nearly nothing a norm multiplies fp32's rounding by up to eps ** -0.5. With
        # 1e-5 one cut of a thousand would round by more than is allowed, masks or none.
        eps=1e-2,
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
    kept, masks = random_cut(made.shape, target, seed=seed)
    ids = tokens(made.shape["vocab_size"])
    with torch.no_grad():
        logits = cut_model(made, Cut(made.family, made.config, target, kept, masks))(ids).logits
    assert relative(masked_logits(made, masks, ids), logits) < TOLERANCE


def test_masked_equals_cut_saved_and_reloaded_on_a_trained_model(shared, tmp_path) -> None:
    folder = shared / "models" / "stories260K"
    config = json.loads((folder / "config.json").read_text())
    family = family_of(config)
    shape = shape_of(family, config)
    wanted = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "num_key_value_heads": 3}
    target, _ = resolve_target(family, shape, {**wanted, "intermediate_size": 100})
    kept, masks = random_cut(shape, target, seed=0)
    model = load_model(folder)
    ids = tokens(512, length=64)
    made = Small("stories260K", family, config, shape, model)
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


def test_attaching_keeps_names_and_removing_brings_the_model_back() -> None:
    made = small("qwen3", tied=True)
    ids = tokens(made.shape["vocab_size"])
    with torch.no_grad():
        before = made.model(ids).logits
    names = list(made.model.state_dict())
    attached = Attached(made.model, made.family, config=made.config, axes=DENSE)
    attached.set({axis: torch.full(mask_shape(axis, made.shape.axes), 0.5) for axis in DENSE})
    assert sorted(made.model.state_dict()) == sorted(names)
    with torch.no_grad():
        assert relative(made.model(ids).logits, before) > 0.01
    attached.remove()
    with torch.no_grad():
        assert torch.equal(made.model(ids).logits, before)
