"""What a head does besides its product with the weight, in losses that never hold all logits."""

import pytest
import torch
from small_models import small
from torch.nn import functional

from shearling.loss.cross_entropy import next_token_loss, token_losses


def test_a_bias_of_the_head_is_in_the_loss_and_gets_its_gradient() -> None:
    made = small("llama", vocab=80)
    head = made.model.lm_head
    head.bias = torch.nn.Parameter(torch.randn(80, generator=torch.Generator().manual_seed(0)))
    ids = made.ids(seed=3)
    loss = next_token_loss(made.model, ids)
    loss.backward()
    found, head.bias.grad = head.bias.grad.clone(), None
    logits = made.model(ids[:, :-1], use_cache=False).logits
    expected = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    torch.testing.assert_close(found, head.bias.grad)
    assert float(token_losses(made.model, ids).mean()) == pytest.approx(float(expected.detach()), rel=1e-6)
