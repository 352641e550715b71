"""Adapters: what they add is what is merged, under masks and in every kind of family; only they learn."""

import copy
import sys

import pytest
import torch
from small_models import DENSE, Small, small_of_any, tokens

from shearling.conformance.exact import masked_logits
from shearling.conformance.model import relative
from shearling.conformance.targets import alone, random_cut, together
from shearling.errors import UserError
from shearling.ranks.ranks import ALONE, Ranks
from shearling.recipe import Heal, Prune, validated
from shearling.train import lora
from shearling.train.lora import adapt, check_lora, merging
from shearling.weights.model import reader

FAMILIES = ("llama", "gpt2", "gemma2", "qwen3_moe", "phi3", "gpt_neox")


def adapted(made: Small) -> Small:
    """A copy of a model with adapters that have learned something."""
    other = copy.deepcopy(made.model)
    adapt(other, made.family, made.config, rank=3, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return Small(made.name, made.family, made.config, made.shape, other)


def merged(made: Small, other: Small) -> Small:
    """A plain model of what the other one is saved as."""
    plain = copy.deepcopy(made.model)
    read, named = merging(reader(made.model), other.model), dict(plain.named_parameters())
    with torch.no_grad():
        for row, layer in made.family.named(made.config):
            if row.at(layer) in named:  # tied, it is there under its other name
                named[row.at(layer)].copy_(read(row, layer))
    return Small(made.name, made.family, made.config, made.shape, plain)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_merged_is_the_same_function_with_and_without_masks(model_type: str) -> None:
    pytest.importorskip("peft")
    made = small_of_any(model_type, tied=True)
    other = adapted(made)
    plain, ids = merged(made, other), tokens(made.shape["vocab_size"])
    with torch.no_grad():
        before, found, expected = (each.model(ids).logits for each in (made, other, plain))
    assert relative(found, expected) < 1e-5
    assert relative(before, expected) > 1e-2
    for target in (
        together(made, axes=[axis for axis in DENSE if axis in made.shape.axes]).values() or alone(made).values()
    ):
        _, masks = random_cut(made.shape, target, seed=0)
        assert relative(masked_logits(other, masks, ids), masked_logits(plain, masks, ids)) < 1e-5


def test_only_adapters_learn_and_their_start_follows_from_the_seed() -> None:
    pytest.importorskip("peft")
    made = small_of_any("llama", tied=True)
    starts = []
    for seed, state in ((0, 0), (0, 1), (1, 0)):
        torch.manual_seed(state)
        model = copy.deepcopy(made.model).bfloat16()
        adapt(model, made.family, made.config, rank=2, seed=seed)
        learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert {p.dtype for p in learning.values()} == {torch.float32}
        assert all("lora_" in name for name in learning)
        assert len(learning) == 2 * 7 * made.shape["num_hidden_layers"]
        starts.append(torch.cat([p.detach().flatten() for p in learning.values()]))
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def test_where_adapters_cannot_be_had(monkeypatch) -> None:
    monkeypatch.setattr(lora, "find_spec", lambda name: object())
    check_lora(ALONE)
    with pytest.raises(UserError, match="lora_rank: found 2 ranks; expected one process"):
        check_lora(Ranks(count=2, mesh=object()))  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="lora_rank: found offload"):
        check_lora(Ranks(mesh=object()))  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"shearling\[lora\]"):
        check_lora(ALONE)
    monkeypatch.setitem(sys.modules, "peft", None)
    for values, part in (
        ({"lora_rank": 2, "method": "activation"}, "lora_rank: found it with one-shot scores"),
        ({"lora_rank": 2, "masks_only": True}, "lora_rank: found it with masks_only"),
        ({"lora_rank": 0}, "lora_rank"),
    ):
        with pytest.raises(UserError, match=part):
            validated(Prune, {"to": "hidden_size=8", **values})
    assert validated(Heal, {"lora_rank": 4}).frozen
