"""Scores of experts, against the same sums written out."""

import torch
from small_experts import small_experts
from small_models import tokens
from torch.nn import functional

from shearling.cut.importance import measure


def test_scores_are_gate_times_norm_and_dead_units_score_nothing() -> None:
    made = small_experts("mixtral", layers=1)
    experts = made.model.model.layers[0].mlp.experts
    with torch.no_grad():
        experts.down_proj[2] = 0
        experts.down_proj[0, :, 5] = 0
    ids = tokens(40)
    seen = []
    handle = experts.register_forward_pre_hook(lambda _, args: seen.append(args))
    importance = measure(made.model, made.family, config=made.config, batches=[ids])
    handle.remove()
    (x, which, weights) = seen[0]
    score, inner = importance.scores["expert"][0], importance.scores["moe_intermediate"][0]
    assert score[2] == 0
    assert inner[0, 5] == 0
    with torch.no_grad():
        for expert in (0, 3):
            token, slot = torch.where(which == expert)
            gate_up = experts.gate_up_proj[expert] @ x[token].T
            a = (functional.silu(gate_up[:24]) * gate_up[24:]).T
            norms = (a @ experts.down_proj[expert].T).norm(dim=-1)
            torch.testing.assert_close(score[expert], (weights[token, slot] * norms).mean().double(), rtol=1e-5, atol=0)
            squares = (weights[token, slot, None] * a).square().sum(0) / len(x)
            expected = (squares * experts.down_proj[expert].square().sum(0)).double()
            torch.testing.assert_close(inner[expert], expected, rtol=1e-4, atol=1e-9)
