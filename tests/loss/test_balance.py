"""The load-balancing loss against transformers' own, and under removal."""

import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from shearling.loss.balance import load_balance, loads


def test_of_one_layer_it_is_transformers() -> None:
    logits = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    expected = load_balancing_loss_func((logits,), 6, 2)
    torch.testing.assert_close(load_balance([logits], 2), expected)
    assert loads(logits, 2).sum() == 2


def test_removed_experts_do_not_count() -> None:
    logits = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    masked = logits.clone()
    masked[:, [1, 4]] = -torch.inf
    torch.testing.assert_close(load_balance([masked], 2), load_balance([logits[:, [0, 2, 3, 5]]], 2))
