"""What is kept of activations: the same gradients whatever it is, and products made once where they are kept."""

import pytest
import torch
from small_experts import small_experts
from small_models import small, tokens
from torch.utils._python_dispatch import TorchDispatchMode

from shearling.errors import UserError
from shearling.loss.cross_entropy import next_token_loss
from shearling.recipe import Heal, validated
from shearling.train.checkpointing import checkpointing
from shearling.weights.model import load_model


class Products(TorchDispatchMode):
    """Counts products of matrices, and what else is made."""

    def __init__(self):
        super().__init__()
        self.products = self.others = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        product = func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)
        self.products, self.others = self.products + product, self.others + (not product)
        return func(*args, **(kwargs or {}))


def gone_through(mode: str) -> tuple[dict[str, torch.Tensor], Products]:
    torch.manual_seed(0)
    model = small("llama", vocab=64, tied=True).model.float().train()
    if mode != "none":
        model.activation_checkpointing_enable(checkpointing(mode))
    ids = torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(1))
    with Products() as seen:
        next_token_loss(model, ids).backward()
    return {name: p.grad for name, p in model.named_parameters()}, seen


def test_selective_recomputes_no_products_and_full_all() -> None:
    (plain, none), (_, full), (found, selective) = (gone_through(mode) for mode in ("none", "full", "selective"))
    for name, gradient in plain.items():
        torch.testing.assert_close(found[name], gradient)
    assert selective.products == none.products < full.products
    assert none.others < selective.others


def test_in_training_mode_a_router_draws_nothing(tmp_path) -> None:
    """Which checkpointing asks for; a draw would be another one where the block is gone through again."""
    small_experts("mixtral", router_jitter_noise=0.5).model.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    with torch.no_grad():
        assert torch.equal(model.train()(tokens(40)).logits, model.eval()(tokens(40)).logits)


@pytest.mark.parametrize(("given", "taken"), [(True, "full"), (False, "none"), ("selective", "selective")])
def test_a_recipe_says_which(given, taken) -> None:
    assert validated(Heal, {"activation_checkpointing": given}).activation_checkpointing == taken


def test_compiled_blocks_hide_what_selective_keeps() -> None:
    with pytest.raises(UserError, match="selective with compile"):
        validated(Heal, {"activation_checkpointing": "selective", "compile": True})
