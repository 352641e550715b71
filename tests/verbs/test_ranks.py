"""The verbs on two ranks: the same data in the same order, the same losses, whatever happens on the way."""

import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from killed import apart, killed_at, weights
from safetensors.torch import load_file, save_file
from two_ranks import on_ranks

from shearling.data.store import Store
from shearling.data.store_files import LocalFiles
from shearling.errors import UserError
from shearling.ranks.ranks import OnAnotherRank, Ranks, joined
from shearling.record import read
from shearling.train.checkpoint import numbers
from shearling.verbs import source as sources
from shearling.verbs.aim import source_of
from shearling.verbs.heal import heal
from shearling.verbs.prune import prune
from shearling.verbs.session import Session, batch_windows
from shearling.verbs.source import Source
from shearling.weights.checkpoint import Checkpoint

pytestmark = pytest.mark.slow  # processes that are killed and begun again

EVERYTHING = {
    "batch_tokens": 256,
    "mixture": {"schedule": "dynamic", "rule": "paper", "every": 3},
    "teacher": {"share": 0.5, "hidden": 0.1},
    "micro_sequences": 2,
    "save_every": 2,
}


def of(out: Path, event: str) -> list[dict[str, Any]]:
    return [found for found in read(out / "record.jsonl") if found["event"] == event]


def check_alike(one: Path, two: Path) -> None:
    """Steps, mixtures and held-out losses of two runs, to 1e-5."""
    for event, key in (("step", "loss"), ("step", "gradient_norm"), ("mixture", "weights"), ("held_out", "losses")):
        for a, b in zip(of(one, event), of(two, event), strict=True):
            assert a["step"] == b["step"]
            assert b[key] == pytest.approx(a[key], rel=1e-4 if key == "gradient_norm" else 1e-5)
    assert len(of(one, "step")) > 5


@pytest.mark.parametrize("options", [{"relaxation": "soft_topk"}, {"relaxation": "hard_concrete"}])
def test_masks_are_learned_alike(tmp_path, model_folder, store_folder, ask_prune, options):
    asked = ask_prune(method="masks", steps=8, masks=options, micro_sequences=1)
    verb = partial(prune, str(model_folder), data=str(store_folder), asked=asked)
    one = verb(out=str(tmp_path / "one"))
    both = on_ranks(lambda: verb(out=str(tmp_path / "two")))
    assert both[0].losses == both[1].losses == pytest.approx(dict(one.losses), rel=1e-5)
    check_alike(tmp_path / "one", tmp_path / "two")
    assert of(tmp_path / "two", "cut")[0]["kept"] == of(tmp_path / "one", "cut")[0]["kept"]


def test_adapters_learn_alike(tmp_path, model_folder, store_folder, ask_prune, ask_heal):
    """Weights are in bfloat16 on both sides, so as alike as that rounding leaves it."""
    options = {"steps": 8, "lora_rank": 4, "lr": 4e-3, "micro_sequences": 1}
    for name, verb, asked in (("prune", prune, ask_prune(**options)), ("heal", heal, ask_heal(**options))):
        verb = partial(verb, str(model_folder), data=str(store_folder), asked=asked)
        one = verb(out=str(tmp_path / name / "one"))
        both = on_ranks(lambda verb=verb, name=name: verb(out=str(tmp_path / name / "two")))
        assert both[0].losses == both[1].losses == pytest.approx(dict(one.losses), abs=0.02)
        steps = [of(tmp_path / name / ranks, "step") for ranks in ("one", "two")]
        assert steps[0][0]["loss"] == pytest.approx(steps[1][0]["loss"], rel=1e-3)


def test_fault_13_healing_goes_on_from_one_rank_to_two_to_one(tmp_path, cut, store_folder, ask_heal):
    """With a teacher that is sharded too, its streams and a mixture that follows losses, over twenty steps."""
    asked = ask_heal(steps=20, **EVERYTHING)
    verb = partial(heal, str(cut), data=str(store_folder), asked=asked)
    assert apart(partial(verb, out=str(tmp_path / "calm"))) == 0
    out, partly = tmp_path / "moved", tmp_path / "moved.partial"
    killed = killed_at(7, saved_in=partly)
    assert apart(partial(verb, out=str(out), watch=killed)) == -signal.SIGKILL
    on_ranks(lambda: verb(out=str(out), watch=killed_at(6, saved_in=partly)), code=-signal.SIGKILL)
    assert apart(partial(verb, out=str(out))) == 0
    check_alike(tmp_path / "calm", out)
    assert [event["ranks"] for event in of(out, "resumed")] == [2, 1]


def test_fault_04_the_same_two_ranks_end_with_the_same_bits(tmp_path, cut, store_folder, ask_heal):
    asked = ask_heal(steps=8, **EVERYTHING)
    verb = partial(heal, str(cut), data=str(store_folder), asked=asked)
    on_ranks(lambda: verb(out=str(tmp_path / "calm")) and None)
    out, partly = tmp_path / "killed", tmp_path / "killed.partial"
    for _ in range(2):
        on_ranks(lambda: verb(out=str(out), watch=killed_at(3, saved_in=partly)), code=-signal.SIGKILL)
    on_ranks(lambda: verb(out=str(out)) and None)
    assert weights(out) == weights(tmp_path / "calm")
    assert len(of(out, "resumed")) == 2


def test_fault_18_data_that_ends_ends_on_all_ranks(tmp_path, cut, store_folder, ask_heal):
    asked = ask_heal(steps=400, eval_every=0, repeats=1, at_end="stop")
    both = on_ranks(lambda: heal(str(cut), data=str(store_folder), out=str(tmp_path / "out"), asked=asked).tokens)
    assert both[0] == both[1] < 400 * 128
    assert len(of(tmp_path / "out", "data_ended")) == 1


def test_fault_05_a_signal_to_one_rank_stops_both(tmp_path, cut, store_folder, ask_heal):
    verb = partial(heal, str(cut), data=str(store_folder), asked=ask_heal(steps=8))

    def work() -> None:
        from shearling.errors import Stopped

        only_one = killed_at(3, signal.SIGTERM) if os.environ["RANK"] == "1" else killed_at(10**9)
        try:
            verb(out=str(tmp_path / "out"), watch=only_one)
        except Stopped as told:
            os._exit(128 + told.signal)

    on_ranks(work, code=143)
    on_ranks(lambda: verb(out=str(tmp_path / "out")) and None)
    assert [event["step"] for event in of(tmp_path / "out", "resumed")] == [3]


def test_fault_12_a_save_that_fails_on_one_rank_fails_on_both(tmp_path, cut, store_folder, ask_heal):
    verb = partial(
        heal, str(cut), data=str(store_folder), asked=ask_heal(steps=8, save_every=2), out=str(tmp_path / "out")
    )

    def work() -> str:
        import shearling.train.checkpoint as module

        def fail(*args: Any, **kwargs: Any) -> None:
            raise RuntimeError("no such luck")

        if os.environ["RANK"] == "1":
            module.write = fail
        with pytest.raises(RuntimeError) as told:
            verb()
        return str(told.value)

    assert on_ranks(work) == ["another rank could not do its part: see what it said", "no such luck"]
    assert not list((tmp_path / "out.partial" / "checkpoints").iterdir())


def test_fault_10_what_is_damaged_of_one_rank_damages_the_checkpoint(tmp_path, cut, store_folder, ask_heal):
    """The one before is used, and the run ends with the bits of one that nobody disturbed."""
    verb = partial(heal, str(cut), data=str(store_folder), asked=ask_heal(steps=6, save_every=1))
    on_ranks(lambda: verb(out=str(tmp_path / "calm")) and None)
    out, partly = tmp_path / "out", tmp_path / "out.partial"
    on_ranks(lambda: verb(out=str(out), watch=killed_at(4, saved_in=partly)), code=-signal.SIGKILL)
    newest = max(numbers(partly / "checkpoints"))
    shard = partly / "checkpoints" / f"step-{newest}" / "rank-1" / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    on_ranks(lambda: verb(out=str(out)) and None)
    assert [event["step"] for event in of(out, "resumed")] == [newest - 1]
    assert f"step-{newest} isn't used" in of(out, "checkpoint")[0]["note"]
    assert weights(out) == weights(tmp_path / "calm")


def test_fault_21_gradients_of_one_rank_that_are_not_finite(tmp_path, cut, store_folder, ask_heal):
    """Both leave that step out; what it counts for, and the steps after it, are as if one process had seen it."""
    asked = ask_heal(steps=8, log_every=4)
    verb = partial(heal, str(cut), data=str(store_folder), asked=asked)

    def work(out: str) -> None:
        import shearling.train.loop as module

        plain, calls = module.inside, []

        def broken(model: Any, objective: Any, batch: Any) -> Any:
            losses = plain(model, objective, batch)
            calls.append(None)
            if len(calls) != 3 or os.environ.get("RANK", "1") == "0":
                return losses
            nan = losses.total.detach() * float("nan")
            return replace(losses, total=losses.total * nan, sums={**losses.sums, "loss": losses.sums["loss"] * nan})

        module.inside = broken
        verb(out=out)

    assert apart(partial(work, str(tmp_path / "one"))) == 0
    on_ranks(work, str(tmp_path / "two"))
    for out in (tmp_path / "one", tmp_path / "two"):
        (told,) = of(out, "skipped")
        assert (told["step"], told["in_a_row"], told["in_all"]) == (3, 0, 1)
        assert told["domains"]
    for one, two in zip(of(tmp_path / "one", "step")[1:], of(tmp_path / "two", "step")[1:], strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("verb", "options"),
    [
        ("prune", {"method": "activation"}),
        ("prune", {"masks_only": True, "teacher": {"share": 0.5}}),
        ("prune", {"method": "masks", "lora_rank": 2}),
        ("heal", {"teacher": {"share": 0.5, "hidden": 0.1}, "mixture": {"schedule": "dynamic"}}),
    ],
)
def test_what_is_read_before_training_is_dealt_out(
    tmp_path, model_folder, cut, store_folder, ask_prune, ask_heal, verb, options
):
    """Of the models the second rank reads no more than its share of tensors, to see whether they are finite."""
    model, asked = (model_folder, ask_prune(**options)) if verb == "prune" else (cut, ask_heal(**options))

    def work() -> tuple[list[str], list[str], list[str], list[str]]:
        tensors, checked, files, prints = [], [], [], []

        def noting(owner: Any, name: str, seen: list[str], said: Callable[..., str]) -> None:
            plain = getattr(owner, name)

            def noted(*args: Any, **options: Any) -> Any:
                seen.append(said(*args))
                return plain(*args, **options)

            setattr(owner, name, noted)

        noting(Checkpoint, "read", tensors, lambda checkpoint, name: name)
        noting(LocalFiles, "digest", files, lambda files, name: name)
        noting(sources, "fingerprint", prints, str)
        plain = Source.check_finite

        def checking(source: Source, **options: int) -> None:
            before = len(tensors)
            plain(source, **options)
            checked.extend(tensors[before:])

        Source.check_finite = checking
        {"prune": prune, "heal": heal}[verb](str(model), data=str(store_folder), out=str(tmp_path / "out"), asked=asked)
        return tensors, checked, files, prints

    first, second = on_ranks(work)
    assert sorted(first[1] + second[1]) == sorted(Checkpoint.open(model).names)
    assert min(len(first[1]), len(second[1])) >= len(first[1] + second[1]) // 2
    assert second[0] == second[1]
    assert sorted(first[2] + second[2]) == sorted(
        str(path.relative_to(store_folder)) for path in store_folder.glob("*/*.*")
    )
    assert min(len(first[2]), len(second[2])) > 0
    assert (len(set(first[3])), second[3]) == (1 if verb == "prune" else 2, [])


@pytest.mark.parametrize("damaged", ["model", "store"])
def test_what_one_rank_finds_damaged_ends_all(tmp_path, model_folder, store_folder, ask_prune, damaged):
    model, store = shutil.copytree(model_folder, tmp_path / "model"), shutil.copytree(store_folder, tmp_path / "store")
    if damaged == "model":
        weights = load_file(model / "model.safetensors")
        weights[Checkpoint.open(model).names[1]].view(-1)[3] = torch.nan
        save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    else:
        path = store / "code" / "train-00000.offsets"  # the second of its files
        path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])

    def work() -> str:
        asked = ask_prune(method="activation")
        with pytest.raises((UserError, OnAnotherRank)) as told:
            prune(str(model), data=str(store), out=str(tmp_path / "out"), asked=asked)
        return str(told.value)

    said = on_ranks(work)
    assert said[0].startswith("another rank could not do its part")
    assert "1 NaN and 0 Inf" in said[1] if damaged == "model" else f"{store}/code/train-00000.offsets: found" in said[1]


def test_a_source_that_one_rank_cannot_open_is_gone_for_all(cut):
    def work() -> tuple[Any, str]:
        source, plain = Source.open(str(cut)), Source.open

        def fails(*args: Any, **options: Any) -> Source:
            raise UserError("model", found="nothing", expected="it", change="find it")

        Source.open = fails if os.environ["RANK"] == "1" else plain
        with joined("cpu") as (ranks, _):
            return source_of(source, ranks)

    first, second = on_ranks(work)
    assert first[0] is second[0] is None
    assert "another rank says why" in first[1]
    assert "found nothing" in second[1]


def test_two_groups_that_each_hold_a_model(tmp_path, cut, store_folder, ask_heal):
    verb = partial(heal, str(cut), data=str(store_folder))
    verb(out=str(tmp_path / "one"), asked=ask_heal(steps=6))
    on_ranks(lambda: verb(out=str(tmp_path / "two"), asked=ask_heal(steps=6, replicate=2, save_every=2)) and None)
    check_alike(tmp_path / "one", tmp_path / "two")


def test_a_batch_that_ranks_can_not_share_names_those_that_they_can():
    windows = partial(batch_windows, seq_len=128, by_default=1000)
    with pytest.raises(
        UserError, match=r"a multiple of 4 windows; 1024 tokens \(8 windows\) or 1536 tokens \(12 windows\)"
    ):
        windows(1280, ranks=Ranks(0, 4))
    with pytest.raises(UserError, match=r"512 by default, 4 windows on 8 ranks; .*; 1024 tokens \(8 windows\)"):
        windows(None, ranks=Ranks(0, 8))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_batch_nobody_asked_for_is_the_same_on_any_number_of_ranks(count):
    assert batch_windows(None, seq_len=128, by_default=1000, ranks=Ranks(0, count)) == 4


def test_a_batch_is_whole_windows_and_says_so(cut, store_folder, ask_heal):
    source, store = Source.open(str(cut)), Store.open(store_folder)
    planned = partial(Session.plan, source=source, store=store, default_tokens=0, most_between_updates=1, device="cpu")
    assert planned(ask_heal(batch_tokens=100)).notes == ("a batch has 3 windows, 96 tokens; asked for were 100",)
    assert planned(ask_heal(batch_tokens=96)).notes == ()
