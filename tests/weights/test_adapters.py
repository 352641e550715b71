"""Adapters: masks lie on them as on the weights under them, they start from the seed, and nothing of them is lost."""

import sys

import pytest
import torch
from small_models import MODEL_TYPES, OTHERS, Small, small, small_of_any
from torch import Tensor, nn

from shearling.conformance.exact import config_of
from shearling.conformance.finding import TOLERANCE
from shearling.conformance.model import build, relative
from shearling.conformance.targets import alone, random_cut
from shearling.cut.extract import Cut
from shearling.errors import UserError
from shearling.masks.attach import Attached
from shearling.weights.adapters import ALPHA, Adapters, Read, merged
from shearling.weights.model import reader

RANK = 3
SOON = ("qwen3", "gpt2", "olmo2", "qwen3_moe")


def adapted(made: Small) -> frozenset[str]:
    """Puts adapters on a small model, as if they had learned something."""
    paths = Adapters(RANK, seed=0).add(made.model, made.family, made.config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in made.model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02, generator=generator)
    return paths


def logits_of(cut: Cut, read: Read, ids: Tensor) -> Tensor:
    model = build(config_of(cut)).double()
    model.load_state_dict({row.at(layer): cut.tensor(row, layer, read) for row, layer in cut.rows()}, strict=False)
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize(
    "model_type", [pytest.param(t, marks=[] if t in SOON else pytest.mark.slow) for t in (*MODEL_TYPES, *OTHERS)]
)
def test_masked_is_cut_with_adapters_merged_before_the_cut(model_type: str) -> None:
    made = small_of_any(model_type, tied=True)
    ids, read, targets = made.ids(), reader(made.model), alone(made)
    before = made.logits(ids)
    paths = adapted(made)
    made.model.double()  # but for the norms, which take a mean in float32 whatever they are given
    assert relative(made.logits(ids), before) > 1e-3
    for target in targets.values():
        kept, masks = random_cut(made.shape, target)
        attached = Attached(made.model, made.family, config=made.config, axes=tuple(masks), adapted=paths)
        attached.set(masks)
        masked = made.logits(ids)
        attached.remove()
        cut = Cut(made.family, made.config, target, kept, masks)
        assert relative(masked, logits_of(cut, merged(made.model, read), ids)) < TOLERANCE


def test_all_linears_in_layers_have_one_and_nothing_else_learns() -> None:
    made = small_of_any("qwen3_moe", tied=False)
    linears = {path for path, module in made.model.named_modules() if isinstance(module, nn.Linear)}
    paths = adapted(made)
    assert paths == linears - {"lm_head"}
    assert not any("gate" in path.split(".") for path in paths)  # a router
    learned = {name for name, parameter in made.model.named_parameters() if parameter.requires_grad}
    assert learned == {f"{path}.lora_{part}.default.weight" for path in paths for part in "AB"}


def test_they_start_from_the_seed_and_leave_the_global_state_alone() -> None:
    def start(seed: int) -> dict[str, Tensor]:
        made = small("llama", dtype=torch.bfloat16)
        before = torch.get_rng_state()
        Adapters(RANK, seed).add(made.model, made.family, made.config)
        assert torch.equal(torch.get_rng_state(), before)
        return {name: p.detach() for name, p in made.model.named_parameters() if p.requires_grad}

    one, same, other = start(0), start(0), start(1)
    assert all(torch.equal(one[name], same[name]) for name in one)
    for name, weight in one.items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, other[name]) is ("lora_B" in name)
        assert bool(weight.any()) is ("lora_A" in name)
    a = [weight for name, weight in one.items() if "lora_A" in name]
    assert not any(torch.equal(a[0], weight) for weight in a[1:] if weight.shape == a[0].shape)
    within = one["model.layers.0.mlp.down_proj.lora_A.default.weight"]
    assert within.abs().max() <= within.shape[1] ** -0.5


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_merged_in_float32_whatever_the_model_is_in(model_type: str) -> None:
    """What is added is far below the rounding of the weights in memory."""
    made = small_of_any(model_type, tied=False)
    plain = {name: parameter.detach().clone() for name, parameter in made.model.named_parameters()}
    made.model.to(torch.bfloat16)
    paths = adapted(made)
    for name, parameter in made.model.named_parameters():
        if "lora_B" in name:
            parameter.data *= 1e-4
    read = merged(made.model, lambda row, layer: plain[row.at(layer)])
    named = dict(made.model.named_parameters())
    for row, layer in made.family.named(made.config):
        name, path = row.at(layer), row.at(layer).removesuffix(".weight")
        found = read(row, layer)
        if path not in paths:
            assert found is plain[name]
            continue
        a, b = (named[f"{path}.lora_{part}.default.weight"].detach() for part in "AB")
        delta = ALPHA / RANK * (b @ a)
        assert found.dtype == torch.float32
        assert torch.equal(found, plain[name] + (delta.T if model_type == "gpt2" else delta))
        assert not torch.equal(found, plain[name])


def test_without_peft_the_extra_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    assert Adapters.asked(None, 0) is None
    with pytest.raises(UserError, match=r"pip install 'shearling\[lora\]'"):
        Adapters.asked(8, 0)
