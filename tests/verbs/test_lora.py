"""The verbs with adapters in the place of weights: what they leave, what they hold, and what is refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from shearling.data.store import Store
from shearling.errors import UserError
from shearling.record import read
from shearling.train.optim import default_adapters_lr, default_lr
from shearling.verbs.evaluate import evaluate
from shearling.verbs.heal import heal
from shearling.verbs.memory import Trained
from shearling.verbs.prune import prune
from shearling.verbs.session import Session
from shearling.verbs.source import Source
from shearling.weights.adapters import ALPHA, check_rank

RANK = 4
# Of each layer of the small model: q and o, k and v, gate and up, down.
ADAPTERS = RANK * 3 * (2 * (32 + 32) + 2 * (32 + 16) + 2 * (32 + 48) + (48 + 32))


def saved_in(out: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(out / "checkpoints" / f"step-{step}" / "rank-0" / "model.safetensors")


def test_healed_weights_are_the_sources_and_what_the_adapters_learned(tmp_path, model_folder, store_folder, ask_heal):
    out = tmp_path / "healed"
    asked = ask_heal(lora_rank=RANK, lr=4e-3, steps=60, save_every=60, keep_every=60)
    result = heal(str(model_folder), data=str(store_folder), out=str(out), asked=asked)
    for domain, loss in result.losses.items():
        assert loss < result.losses_before[domain] - 0.1
    saved = saved_in(out, 60)
    assert {name.partition(".")[0] for name in saved} == {"model", "optimizer", "state"}
    learned = {name.removeprefix("model."): w for name, w in saved.items() if name.startswith("model.")}
    assert sum(weight.numel() for weight in learned.values()) == ADAPTERS
    before, after = (load_file(folder / "model.safetensors") for folder in (model_folder, out))
    assert before.keys() == after.keys()
    for name, weight in before.items():
        path = name.removesuffix(".weight")
        a, b = (learned.pop(f"{path}.lora_{part}.default.weight", None) for part in "AB")
        if a is None or b is None:
            assert torch.equal(after[name], weight)
        else:
            assert torch.equal(after[name], weight + ALPHA / RANK * (b @ a))
            assert not torch.equal(after[name], weight)
    assert not learned
    _, told = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    found = evaluate(str(out), data=str(store_folder), seq_len=32, windows=8).losses
    assert result.losses == pytest.approx(found, abs=0.02)  # in bfloat16 here, in float32 there


@pytest.mark.parametrize("relaxation", ["soft_topk", "hard_concrete"])
def test_masks_and_adapters_learn_together(tmp_path, model_folder, store_folder, ask_prune, relaxation):
    """And what is cut is what was masked."""
    out = tmp_path / "cut"
    options = {"steps": 20, "save_every": 20, "keep_every": 20, "masks": {"relaxation": relaxation}}
    asked = ask_prune(lora_rank=RANK, **options)
    cut = prune(str(model_folder), data=str(store_folder), out=str(out), asked=asked)
    saved = saved_in(out, 20)
    assert {name.partition(".")[0] for name in saved} == {"model", "gates", "scores", "optimizer", "state"}
    assert all("lora_" in name for name in saved if name.startswith("model."))
    assert any(bool(weight.any()) for name, weight in saved.items() if "lora_B" in name)
    held_out = {e["of"]: e["losses"] for e in read(out / "record.jsonl") if e["event"] == "held_out" and "of" in e}
    if relaxation == "soft_topk":  # the other's masks are still between 0 and 1 after so few steps
        assert held_out["masked"] == pytest.approx(held_out["cut"], abs=0.02)  # in bfloat16, in float32
    alone = prune(
        str(model_folder),
        data=str(store_folder),
        out=str(tmp_path / "alone"),
        asked=ask_prune(masks_only=True, **options),
    )
    assert sum(cut.losses.values()) < sum(alone.losses.values())


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"compile": True}, {"activation_checkpointing": True}])
def test_compiled_and_checkpointed_it_learns_the_same(tmp_path, model_folder, store_folder, ask_heal, options):
    asked = {"lora_rank": RANK, "lr": 4e-3, "steps": 6}
    plain, other = (
        heal(str(model_folder), data=str(store_folder), out=str(tmp_path / name), asked=ask_heal(**asked, **more))
        for name, more in (("plain", {}), ("other", options))
    )
    assert other.losses == pytest.approx(plain.losses, abs=0.02)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"masks_only": True}, "lora_rank: found it with masks_only"),
        ({"method": "activation"}, "lora_rank: found it with one-shot scores"),
        ({"lora_rank": 0}, "lora_rank: found 0"),
    ],
)
def test_what_is_refused(ask_prune, options, told):
    with pytest.raises(UserError, match=told):
        ask_prune(**{"lora_rank": RANK, **options})


def test_a_rank_that_no_linear_has(tmp_path, model_folder, store_folder, ask_heal):
    """32 is that of q, o, gate, up and down; k and v have 16."""
    words = {"data": str(store_folder), "out": str(tmp_path / "out")}
    with pytest.raises(UserError) as told:
        heal(str(model_folder), **words, asked=ask_heal(lora_rank=100_000))
    assert str(told.value) == (
        "lora_rank: found 100000; expected at most 32, the highest rank of a linear in its layers; "
        "lower it: 16 is common"
    )
    assert list(tmp_path.iterdir()) == []
    source = Source.open(str(model_folder))
    check_rank(32, source.family, source.config, source.shape.axes)
    with pytest.raises(UserError):
        check_rank(33, source.family, source.config, source.shape.axes)


def test_memory_is_that_of_weights_in_bfloat16_and_of_adapters(model_folder, store_folder, ask_heal):
    source = Source.open(str(model_folder))
    asked = ask_heal(lora_rank=RANK, micro_sequences=1)
    session = Session.plan(asked, source, Store.open(store_folder), default_tokens=0, most_between_updates=1)
    for axes in ((), ("hidden", "layer", "kv_head", "group", "intermediate")):
        need = Trained(source, session, asked, 4, axes=axes).need()
        assert need.parts["weights"] == 2 * source.parameters + 4 * ADAPTERS
        assert need.parts["gradients"] == 4 * ADAPTERS
        assert need.parts["optimizer"] == 8 * ADAPTERS
        assert (need.saving == 12 * ADAPTERS) is (not axes)


def test_adapters_are_taught_faster_than_weights():
    assert default_adapters_lr(10**9) == 10 * default_lr(10**9)
    assert default_adapters_lr(10**5) == 1.6e-2
