"""Masks on experts: gradients against the same model in float64, its weights folded and its routers replaced."""

from typing import Any

import pytest
import torch
from masked_reference import assert_close, copied
from small_experts import SIZES, small_experts
from small_models import Small, tokens
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional

from shearling.axes.axis import mask_shape
from shearling.axes.target import resolve_target
from shearling.masks.attach import Attached
from shearling.masks.options import Options
from shearling.masks.relaxations import make_gates

AXES = ("layer", "expert", "moe_intermediate")


def soft_masks(made: Small) -> dict[str, Tensor]:
    """Soft values, two experts of each layer removed."""
    generator = torch.Generator().manual_seed(5)
    masks = {}
    for axis in AXES:
        mask = 0.1 + 0.9 * torch.rand(mask_shape(axis, made.shape.axes), generator=generator)
        if axis == "expert":
            mask[:, [1, 4]] = 0
        masks[axis] = mask.requires_grad_()
    return masks


def reference_loss(made: Small, w: dict[str, Tensor], z: dict[str, Tensor], ids: Tensor) -> Tensor:
    """In float64, by the plain loop over experts: soft values in the weights, routers that choose among the kept."""
    model = small_experts(made.config["model_type"], dtype=torch.float64).model
    model.config._experts_implementation = "eager"
    folded = {name: weight * 1 for name, weight in w.items()}
    for row, layer in made.family.named(made.config):
        name = row.at(layer)
        if row.role == "write":
            folded[name] = folded[name] * z["layer"][layer]
        if row.role == "write" and row.stacked:
            per_expert = z["expert"][layer].reshape([-1, *[1] * (len(row.dims) - 1)])
            folded[name] = folded[name] * per_expert
            if row.input is not None:
                folded[name] = folded[name] * z["moe_intermediate"][layer].unsqueeze(3 - row.input)
        if row.role == "route" and not row.is_bias:
            removed = z["expert"][layer].detach() == 0
            model.get_submodule(name.removesuffix(".weight")).register_forward_hook(_choosing(made.config, removed))
    logits = functional_call(model, folded, (ids[:, :-1],)).logits
    return functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def _choosing(config: dict[str, Any], removed: Tensor) -> Any:
    def choose(_: Any, args: Any, output: Any) -> Any:
        logits = output[0].masked_fill(removed, -torch.inf)
        over_chosen = config["model_type"] == "gpt_oss"
        top = (logits if over_chosen else logits.softmax(-1)).topk(2, dim=-1)
        values = top.values.softmax(-1) if over_chosen else top.values
        if config["model_type"] == "mixtral" or config.get("norm_topk_prob"):
            values = values / values.sum(-1, keepdim=True)
        return logits, values, top.indices

    return choose


def check(made: Small) -> None:
    masks, ids = soft_masks(made), tokens(40, sequences=4)
    attached = Attached(made.model, made.family, config=made.config, axes=AXES)
    attached.set(masks)
    for micro in ids.split(2):
        logits = made.model(micro[:, :-1]).logits
        (functional.cross_entropy(logits.flatten(0, 1), micro[:, 1:].flatten()) / 2).backward()
    attached.push()
    w, z = copied(made.model.named_parameters()), copied(masks.items())
    reference_loss(made, w, z, ids).backward()
    for name, parameter in made.model.named_parameters():
        assert_close(parameter.grad, w[name].grad, name)
    for axis, mask in masks.items():
        assert_close(mask.grad, z[axis].grad, axis)


@pytest.mark.parametrize("model_type", SIZES)
def test_gradients_of_weights_and_masks(model_type: str) -> None:
    check(small_experts(model_type))


def test_gradients_with_activation_checkpointing() -> None:
    made = small_experts("mixtral")
    made.model.train()
    made.model.activation_checkpointing_enable({"use_reentrant": False})
    check(made)


@pytest.mark.slow
def test_gradients_compiled() -> None:
    torch._dynamo.reset()
    made = small_experts("qwen3_moe")
    made.model.base_model.compile(backend="aot_eager")
    check(made)


def test_a_draw_keeps_as_many_experts_as_a_token_goes_to() -> None:
    made = small_experts("mixtral")
    target, notes = resolve_target(made.family, made.shape, {"num_experts": 3})
    assert notes == []
    scores = {"expert": torch.rand(mask_shape("expert", made.shape.axes))}
    options = Options(relaxation="hard_concrete", start="open", level=-4.0)
    gates = make_gates(made.shape, target, scores=scores, options=options, steps=10, seed=0)
    for step in range(5):
        assert ((gates.draw(step)["expert"] > 0).sum(-1) >= 2).all()


def test_fewer_experts_than_a_token_goes_to_are_said() -> None:
    made = small_experts("mixtral")
    _, notes = resolve_target(made.family, made.shape, {"num_experts": 1})
    assert notes == ["num_experts_per_tok is lowered to 1: no more experts are left"]
