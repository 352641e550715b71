"""The masked model in float64, what gradients are held against.

Of the Llama kind it is written out, masks on activations, norms of its own; of any family it is transformers' own
model, the masks multiplied into its parameters by plain products that autograd differentiates.
"""

from copy import deepcopy
from typing import Any

import torch
from small_models import DENSE, Small
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional

from shearling.axes.axis import is_per_layer, mask_shape
from shearling.axes.factors import Factor, factors
from shearling.axes.index import positions
from shearling.axes.table import Tensor as Row
from shearling.cut.fold import spread_over

TOLERANCE = 2e-5  # of a gradient's norm: the model under test computes in fp32


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


def reference_logits(
    made: Small,
    w: dict[str, Tensor],
    z: dict[str, Tensor],
    alive: float,
    inputs: Tensor,
    *,
    streams: list[Tensor] | None = None,
) -> Tensor:
    """The masked model written out, all in float64: logits [B, T, V] of inputs [B, T].

    `streams` is given the residual stream [B, T, D] after each layer.
    """
    axes, eps = made.shape.axes, made.config["rms_norm_eps"]
    kv_heads, group, d = axes["kv_head"], axes["group"], axes["head_dim"]
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
        if streams is not None:
            streams.append(x)
    x = rms_norm(x, w["model.norm.weight"], alive, eps)
    head = w["model.embed_tokens.weight" if made.tied else "lm_head.weight"]
    return x @ head.T


def reference_streams(made: Small, inputs: Tensor) -> list[Tensor]:
    """The residual streams of the same model with no masks."""
    z = {axis: torch.ones(mask_shape(axis, made.shape.axes), dtype=torch.float64) for axis in DENSE}
    streams: list[Tensor] = []
    reference_logits(made, copied(made.model.named_parameters()), z, made.shape.axes["hidden"], inputs, streams=streams)
    return streams


def reference_loss(made: Small, w: dict[str, Tensor], z: dict[str, Tensor], alive: float, ids: Tensor) -> Tensor:
    """Its mean cross-entropy on ids [B, T + 1]."""
    logits = reference_logits(made, w, z, alive, ids[:, :-1])
    return functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def folded_loss(made: Small, w: dict[str, Tensor], z: dict[str, Tensor], k: dict[str, Tensor], ids: Tensor) -> Tensor:
    """The mean cross-entropy on ids [B, T + 1] of any family's model under masks z and their supports k."""
    model, found = deepcopy(made.model).double().eval(), factors(made.family, tied=made.tied)
    parameters = {**w, **{row.name: w[row.tied] for row in made.family.tensors if row.tied and made.tied}}
    for row, layer in made.family.named(made.config):
        kind = made.family.normalisation(row) if row.role in ("norm", "post") and not row.is_bias else None
        offset = kind.offset if kind else 0.0
        weight, share = w[row.at(layer)] + offset, torch.ones((), dtype=torch.float64)
        # That a router leaves removed experts out is no product with its weight: here it leaves out none.
        mine = {
            part: [f for f in found.get(row, ()) if f.part == part and f.when != "cut" and f.axis in z]
            for part in PARTS
            if row.role != "route" or part != "support"
        }
        for f in mine["soft"] + mine.get("support", []):
            weight = weight * _spread(made, row, f, z if f.part == "soft" else k, layer)
        for f in mine["count"]:
            share = share * _spread(made, row, f, k, layer).detach()
        for f in mine["centre"]:
            sums = weight.sum(0 if f.dim is None else f.dim, keepdim=True)
            weight = weight - _spread(made, row, f, k, layer) * sums / k[f.axis].detach().sum()
        if kind and mine["count"]:
            norm = model.get_submodule(row.at(layer).removesuffix(".weight"))
            setattr(norm, kind.eps_attribute, getattr(norm, kind.eps_attribute) * float(share.mean()))
        parameters[row.at(layer)] = weight * share.mean() ** 0.5 - offset
    logits = functional_call(model, parameters, (ids[:, :-1],), tie_weights=False).logits
    return functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


PARTS = ("soft", "support", "count", "centre")


def _spread(made: Small, row: Row, f: Factor, masks: dict[str, Tensor], layer: int | None) -> Tensor:
    """A mask along its dim of a row, shaped to multiply it."""
    mask = masks[f.axis] if layer is None or not is_per_layer(f.axis) else masks[f.axis][layer]
    if f.dim is None:
        return mask
    nested = row.nested(f.dim)
    along = spread_over(mask, positions(nested or row.dims[f.dim], f.axis, made.shape.axes))
    dims = (f.dim,) if nested is None else (0, f.dim)
    return along.reshape([size if dim in dims else 1 for dim, size in enumerate(row.shape(made.shape.axes))])


def copied(parameters: Any) -> dict[str, Tensor]:
    return {name: p.detach().double().requires_grad_() for name, p in parameters}


def assert_close(found: Tensor | None, expected: Tensor, what: str) -> None:
    assert found is not None, what
    difference = float((found.double() - expected).norm())
    assert difference <= TOLERANCE * max(float(expected.norm()), 1e-3), (what, difference, float(expected.norm()))
