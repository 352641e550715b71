"""Gradients of weights, masks and multipliers, against a float64 reference: masks on activations, norms of its own."""

from typing import Any

import pytest
import torch
from small_models import MODEL_TYPES, Small, small, tokens
from torch import Tensor
from torch.nn import functional

from shearling.axes.axis import MASKABLE, mask_shape
from shearling.axes.shape import resolve_target
from shearling.loss.cross_entropy import next_token_loss
from shearling.masks.attach import Attached
from shearling.masks.hard_concrete import noise_seed
from shearling.masks.learned import LearnedMasks
from shearling.masks.options import Options
from shearling.masks.relaxations import HardConcreteGates, SoftTopKGates, make_gates

TOLERANCE = 2e-5  # of a gradient's norm: the model under test computes in fp32

WANTED = {
    "hidden_size": 18,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 9,
}


def rms_norm(x: Tensor, weight: Tensor, alive: float, eps: float) -> Tensor:
    """The norm of a model that has only the `alive` channels that aren't zero."""
    return weight * x / (x.square().sum(-1, keepdim=True) / alive + eps).sqrt()


def rotate(x: Tensor, theta: float) -> Tensor:
    """Rotary positions on x [B, H, T, d], halves paired."""
    d, length = x.shape[-1], x.shape[-2]
    frequencies = theta ** -(torch.arange(0, d, 2, dtype=torch.float64) / d)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies)
    a, b = x[..., : d // 2], x[..., d // 2 :]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


def reference_loss(made: Small, w: dict[str, Tensor], z: dict[str, Tensor], alive: float, ids: Tensor) -> Tensor:
    """The loss of the masked model written out, all in float64."""
    axes, eps = made.shape.axes, made.config["rms_norm_eps"]
    kv_heads, group, d = axes["kv_head"], axes["group"], axes["head_dim"]
    inputs, targets = ids[:, :-1], ids[:, 1:]
    batch, length = inputs.shape

    def linear(x: Tensor, name: str) -> Tensor:
        y = x @ w[f"{name}.weight"].T
        return y + w[f"{name}.bias"] if f"{name}.bias" in w else y

    def heads(x: Tensor, count: int, norm: str) -> Tensor:
        x = x.view(batch, length, count, d)
        if norm in w:
            x = rms_norm(x, w[norm], d, eps)
        return x.transpose(1, 2)

    x = w["model.embed_tokens.weight"][inputs] * z["hidden"]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    for i in range(axes["layer"]):
        p = f"model.layers.{i}"
        h = rms_norm(x, w[f"{p}.input_layernorm.weight"], alive, eps)
        q = rotate(heads(linear(h, f"{p}.self_attn.q_proj"), kv_heads * group, f"{p}.self_attn.q_norm.weight"), 10000.0)
        k = rotate(heads(linear(h, f"{p}.self_attn.k_proj"), kv_heads, f"{p}.self_attn.k_norm.weight"), 10000.0)
        v = heads(linear(h, f"{p}.self_attn.v_proj"), kv_heads, "")
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = (q @ k.transpose(-1, -2) / d**0.5).masked_fill(future, -torch.inf).softmax(-1)
        per_head = (z["kv_head"][i][:, None] * z["group"][i]).reshape(1, -1, 1, 1)
        mixed = (scores @ v * per_head).transpose(1, 2).reshape(batch, length, -1)
        x = x + z["layer"][i] * z["hidden"] * linear(mixed, f"{p}.self_attn.o_proj")
        h = rms_norm(x, w[f"{p}.post_attention_layernorm.weight"], alive, eps)
        h = functional.silu(linear(h, f"{p}.mlp.gate_proj")) * linear(h, f"{p}.mlp.up_proj") * z["intermediate"][i]
        x = x + z["layer"][i] * z["hidden"] * linear(h, f"{p}.mlp.down_proj")
    x = rms_norm(x, w["model.norm.weight"], alive, eps)
    head = w["model.embed_tokens.weight" if made.tied else "lm_head.weight"]
    return functional.cross_entropy((x @ head.T).flatten(0, 1), targets.flatten())


def copied(parameters: Any) -> dict[str, Tensor]:
    return {name: p.detach().double().requires_grad_() for name, p in parameters}


def assert_close(found: Tensor | None, expected: Tensor, what: str) -> None:
    assert found is not None, what
    difference = float((found.double() - expected).norm())
    assert difference <= TOLERANCE * max(float(expected.norm()), 1e-3), (what, difference, float(expected.norm()))


def soft_masks(made: Small, *, zeros: int) -> dict[str, Tensor]:
    """Random masks on every axis, with some exact zeros among the channels."""
    generator = torch.Generator().manual_seed(5)
    masks = {a: torch.rand(mask_shape(a, made.shape.axes), generator=generator) for a in MASKABLE}
    masks["hidden"][:zeros] = 0
    return {axis: mask.requires_grad_() for axis, mask in masks.items()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
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


def check_masked_gradients(made: Small) -> None:
    """Two micro-batches, so that gradients must add up, against one pass of the reference over both."""
    masks = soft_masks(made, zeros=6)
    ids = tokens(made.shape["vocab_size"], sequences=4)
    attached = Attached(made.model, made.family, sizes=made.shape.axes, axes=MASKABLE, tied=made.tied)
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
    scores = {axis: torch.rand(mask_shape(axis, made.shape.axes)) for axis in MASKABLE}
    options = Options(relaxation="hard_concrete", level=0.5, spread=3.0, slide=0.5)
    gates = make_gates(made.shape, target, scores=scores, options=options, steps=10, seed=7)
    assert isinstance(gates, HardConcreteGates)
    assert gates.axes == MASKABLE
    with torch.no_grad():
        for parameter in (*gates.linear.values(), *gates.quadratic.values()):
            parameter.uniform_(-2, 2)
    step = 2
    ids = tokens(made.shape["vocab_size"])
    term = LearnedMasks(Attached(made.model, made.family, sizes=made.shape.axes, axes=gates.axes, tied=False), gates)
    term.begin(step)
    next_token_loss(made.model, ids).backward()
    term.backward(step)

    location, l1, l2 = (copied(d.items()) for d in (gates.location, gates.linear, gates.quadratic))
    generator = torch.Generator().manual_seed(noise_seed(7, step))
    z, constraint = {}, torch.zeros((), dtype=torch.float64)
    for axis in MASKABLE:
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
    for axis in MASKABLE:
        assert_close(gates.location[axis].grad, location[axis].grad, f"location {axis}")
        assert_close(gates.linear[axis].grad, l1[axis].grad, f"l1 {axis}")
        assert_close(gates.quadratic[axis].grad, l2[axis].grad, f"l2 {axis}")


def test_soft_topk_gates() -> None:
    """Through the threshold: the reference solves for it in float64 and differentiates the solution implicitly."""
    made = small("qwen2", kv_heads=3, group=2)
    target, _ = resolve_target(made.family, made.shape, WANTED)
    scores = {axis: torch.rand(mask_shape(axis, made.shape.axes)) for axis in MASKABLE}
    options = Options(temperature=0.3, temperature_end=0.1)
    gates = make_gates(made.shape, target, scores=scores, options=options, steps=10, seed=0)
    assert isinstance(gates, SoftTopKGates)
    step = 4
    ids = tokens(made.shape["vocab_size"])
    term = LearnedMasks(Attached(made.model, made.family, sizes=made.shape.axes, axes=gates.axes, tied=False), gates)
    term.begin(step)
    next_token_loss(made.model, ids).backward()
    term.backward(step)

    temperature = gates.temperature(step)
    location = copied(gates.location.items())
    z = {axis: implicit_topk(location[axis], gates.size(axis, step), temperature) for axis in MASKABLE}
    w = copied(made.model.named_parameters())
    reference_loss(made, w, z, gates.size("hidden", step), ids).backward()
    for name, parameter in made.model.named_parameters():
        assert_close(parameter.grad, w[name].grad, name)
    for axis in MASKABLE:
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
