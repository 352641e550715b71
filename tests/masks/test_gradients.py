"""Gradients of weights, masks and multipliers, against a float64 reference: masks on activations, norms of its own."""

from collections.abc import Iterable

import pytest
import torch
from masked_reference import assert_close, copied, folded_loss, reference_loss
from small_models import DENSE, LLAMAS, OTHERS, Small, small, small_of_any, tokens
from torch import Tensor

from shearling.axes.axis import FOLLOWS, MASKABLE, mask_shape
from shearling.axes.target import resolve_target, uncut
from shearling.loss.cross_entropy import next_token_loss
from shearling.masks.attach import Attached
from shearling.masks.hard_concrete import noise_seed
from shearling.masks.learned import LearnedMasks
from shearling.masks.options import Options
from shearling.masks.relaxations import HardConcreteGates, SoftTopKGates, make_gates

WANTED = {
    "hidden_size": 18,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 9,
}


def soft_masks(made: Small, axes: Iterable[str], *, zeros: int) -> dict[str, Tensor]:
    """Random masks, with some exact zeros among the channels."""
    generator = torch.Generator().manual_seed(5)
    masks = {a: torch.rand(mask_shape(a, made.shape.axes), generator=generator) for a in axes}
    if "expert" in masks:  # none removed: what routers then choose among is tests/masks/test_experts.py's
        masks["expert"] = 0.1 + 0.9 * masks["expert"]
    masks["hidden"][:zeros] = 0
    return {axis: mask.requires_grad_() for axis, mask in masks.items()}


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("model_type", OTHERS)
def test_weights_and_masks_of_any_family(model_type: str, soft: bool) -> None:
    """Tied where `soft`, as soft_topk has it: the masks stand for their supports."""
    check_folded_gradients(small_of_any(model_type, tied=soft), soft=soft)


@pytest.mark.parametrize("model_type", ["gpt2", "gemma2", "olmo2"])
def test_any_family_with_activation_checkpointing(model_type: str) -> None:
    made = small_of_any(model_type, tied=True)
    made.model.train()
    made.model.activation_checkpointing_enable({"use_reentrant": False})
    check_folded_gradients(made, soft=True)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["gpt2", "gemma2", "olmo2"])
def test_any_family_compiled(model_type: str) -> None:
    torch._dynamo.reset()
    made = small_of_any(model_type, tied=True)
    made.model.base_model.compile(backend="aot_eager")
    check_folded_gradients(made, soft=True)


def check_folded_gradients(made: Small, *, soft: bool) -> None:
    whole = uncut(made.family, made.config)
    axes = (axis for axis in MASKABLE if axis in made.shape.axes and axis not in whole)
    masks = soft_masks(made, axes, zeros=0 if soft else 6)
    ids = tokens(made.shape["vocab_size"])
    attached = Attached(made.model, made.family, config=made.config, axes=tuple(masks))
    attached.set(masks, support=masks if soft else None)
    loss = next_token_loss(made.model, ids)
    loss.backward()
    attached.push()

    attached.remove()
    w, z = copied(made.model.named_parameters()), copied(masks.items())
    expected = folded_loss(made, w, z, z if soft else {a: (m != 0).double() for a, m in z.items()}, ids)
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for name, parameter in made.model.named_parameters():
        assert_close(parameter.grad, w[name].grad, name)
    for axis, mask in masks.items():
        if axis in FOLLOWS and not soft:  # only whether it is there counts
            assert mask.grad is None
            continue
        assert_close(mask.grad, z[axis].grad, axis)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", LLAMAS)
def test_weights_and_masks(model_type: str, tied: bool) -> None:
    check_masked_gradients(small(model_type, tied=tied, biases=True))


def test_weights_and_masks_with_activation_checkpointing() -> None:
    made = small("llama", tied=True, biases=True)
    made.model.train()
    made.model.activation_checkpointing_enable({"use_reentrant": False})
    check_masked_gradients(made)


@pytest.mark.slow
def test_weights_and_masks_compiled() -> None:
    torch._dynamo.reset()
    made = small("qwen3", tied=True, biases=True)
    made.model.base_model.compile(backend="aot_eager")
    check_masked_gradients(made)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["gpt2", "gemma2"])
def test_autocast_is_no_coarser_compiled(model_type: str) -> None:
    """Masks' gradients sum in single precision, though a compiled backward runs under its forward's autocast."""
    found = []
    for backend in ("", "aot_eager"):
        torch._dynamo.reset()
        made = small_of_any(model_type, tied=True)
        masks = soft_masks(made, (axis for axis in DENSE if axis in made.shape.axes), zeros=0)
        attached = Attached(made.model, made.family, config=made.config, axes=tuple(masks))
        attached.set(masks, support=masks)
        if backend:
            made.model.base_model.compile(backend=backend)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = next_token_loss(made.model, tokens(made.shape["vocab_size"]))
        loss.backward()
        attached.push()
        found.append({axis: mask.grad for axis, mask in masks.items()})
    for axis, gradient in found[0].items():
        assert_close(found[1][axis], gradient, axis)


def check_masked_gradients(made: Small) -> None:
    """Two micro-batches, so that gradients must add up, against one pass of the reference over both."""
    masks = soft_masks(made, DENSE, zeros=6)
    ids = tokens(made.shape["vocab_size"], sequences=4)
    attached = Attached(made.model, made.family, config=made.config, axes=DENSE)
    attached.set(masks)
    total = 0.0
    for micro in ids.split(2):
        loss = next_token_loss(made.model, micro) / 2
        loss.backward()
        total += float(loss.detach())
    attached.push()

    w = copied(made.model.named_parameters())
    z = copied(masks.items())
    expected = reference_loss(made, w, z, made.shape.axes["hidden"] - 6, ids)
    expected.backward()
    assert total == pytest.approx(float(expected.detach()), rel=1e-5)
    for name, parameter in made.model.named_parameters():
        assert_close(parameter.grad, w[name].grad, name)
    for axis, mask in masks.items():
        # Where a mask is exactly 0 its gradient counts too: that is how a shut channel opens again.
        assert_close(mask.grad, z[axis].grad, axis)


def test_hard_concrete_gates_and_multipliers() -> None:
    """From the draw to the Lagrangian, the formulas of FACTS written once more."""
    made = small("llama", kv_heads=3, group=2, biases=True)
    target, _ = resolve_target(made.family, made.shape, WANTED)
    scores = {axis: torch.rand(mask_shape(axis, made.shape.axes)) for axis in DENSE}
    options = Options(relaxation="hard_concrete", level=0.5, spread=3.0, slide=0.5)
    gates = make_gates(made.shape, target, scores=scores, options=options, steps=10, seed=7)
    assert isinstance(gates, HardConcreteGates)
    assert gates.axes == DENSE
    with torch.no_grad():
        for parameter in (*gates.linear.values(), *gates.quadratic.values()):
            parameter.uniform_(-2, 2)
    step = 2
    ids = tokens(made.shape["vocab_size"])
    term = LearnedMasks(Attached(made.model, made.family, config=made.config, axes=gates.axes), gates)
    term.begin(step)
    next_token_loss(made.model, ids).backward()
    term.backward(step)

    location, l1, l2 = (copied(d.items()) for d in (gates.location, gates.linear, gates.quadratic))
    generator = torch.Generator().manual_seed(noise_seed(7, step))
    z, constraint = {}, torch.zeros((), dtype=torch.float64)
    for axis in DENSE:
        u = torch.rand(location[axis].shape, generator=generator).double().clamp(1e-6, 1 - 1e-6)
        s = torch.sigmoid((u.log() - (1 - u).log() + location[axis]) / (2 / 3))
        z[axis] = (s * 1.2 - 0.1).clamp(0, 1)
        keep = torch.sigmoid(location[axis] - 2 / 3 * torch.tensor(0.1 / 1.1, dtype=torch.float64).log())
        sparsity = 1 - keep.sum(-1) / made.shape.axes[axis]
        wanted = (1 - target.axes[axis] / made.shape.axes[axis]) * (step + 1) / 5
        constraint = constraint + (l1[axis] * (sparsity - wanted) + l2[axis] * (sparsity - wanted) ** 2).sum()
    w = copied(made.model.named_parameters())
    alive = float((z["hidden"] != 0).sum())
    (reference_loss(made, w, z, alive, ids) + constraint).backward()
    for name, parameter in made.model.named_parameters():
        assert_close(parameter.grad, w[name].grad, name)
    for axis in DENSE:
        assert_close(gates.location[axis].grad, location[axis].grad, f"location {axis}")
        assert_close(gates.linear[axis].grad, l1[axis].grad, f"l1 {axis}")
        assert_close(gates.quadratic[axis].grad, l2[axis].grad, f"l2 {axis}")


def test_soft_topk_gates() -> None:
    """Through the threshold: the reference solves for it in float64 and differentiates the solution implicitly."""
    made = small("qwen2", kv_heads=3, group=2)
    target, _ = resolve_target(made.family, made.shape, WANTED)
    scores = {axis: torch.rand(mask_shape(axis, made.shape.axes)) for axis in DENSE}
    options = Options(temperature=0.3, temperature_end=0.1)
    gates = make_gates(made.shape, target, scores=scores, options=options, steps=10, seed=0)
    assert isinstance(gates, SoftTopKGates)
    step = 4
    ids = tokens(made.shape["vocab_size"])
    term = LearnedMasks(Attached(made.model, made.family, config=made.config, axes=gates.axes), gates)
    term.begin(step)
    next_token_loss(made.model, ids).backward()
    term.backward(step)

    temperature = gates.temperature(step)
    location = copied(gates.location.items())
    z = {axis: implicit_topk(location[axis], gates.size(axis, step), temperature) for axis in DENSE}
    w = copied(made.model.named_parameters())
    reference_loss(made, w, z, gates.size("hidden", step), ids).backward()
    for name, parameter in made.model.named_parameters():
        assert_close(parameter.grad, w[name].grad, name)
    for axis in DENSE:
        assert_close(gates.location[axis].grad, location[axis].grad, f"location {axis}")


def implicit_topk(scores: Tensor, k: float, temperature: float) -> Tensor:
    """sigmoid((s - tau) / T) with d tau = sum z (1 - z) ds / sum z (1 - z), which is what sum z = k asks."""
    low, high = scores.detach().amin(-1, keepdim=True) - 50, scores.detach().amax(-1, keepdim=True) + 50
    for _ in range(200):
        tau = (low + high) / 2
        over = torch.sigmoid((scores.detach() - tau) / temperature).sum(-1, keepdim=True) > k
        low, high = torch.where(over, tau, low), torch.where(over, high, tau)
    z = torch.sigmoid((scores.detach() - tau) / temperature)
    share = z * (1 - z) / (z * (1 - z)).sum(-1, keepdim=True)
    moving = tau + (share * scores).sum(-1, keepdim=True) - (share * scores.detach()).sum(-1, keepdim=True)
    return torch.sigmoid((scores - moving) / temperature)
