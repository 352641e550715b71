"""Memory before a run: estimated part by part, refused with what would fit, chosen, and held to in a real process."""

import logging
import os
import resource
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from killed import apart, killed_at, losses, weights

from shearling.data.store import Store
from shearling.errors import Stopped, UserError
from shearling.ranks.ranks import Ranks
from shearling.recipe import Heal, validated
from shearling.record import read
from shearling.stage import IDENTITY_FILE
from shearling.teacher.options import Options
from shearling.train.room import Room
from shearling.verbs import memory
from shearling.verbs.heal import heal
from shearling.verbs.keeping import micro_batches
from shearling.verbs.memory import Need, Trained
from shearling.verbs.session import Session
from shearling.verbs.source import Source
from shearling.verbs.teaching import Teaching

PLAIN = {"batch_tokens": 256, "micro_sequences": 4, "save_every": 1}  # eight windows of 32
AXES = ("hidden", "layer", "kv_head", "group", "intermediate")


@pytest.fixture(scope="module")
def source(model_folder) -> Source:
    return Source.open(str(model_folder))


@pytest.fixture(scope="module")
def trained(source, store_folder, ask_heal):
    """A healing as far as its memory goes."""

    def make(*, axes: tuple[str, ...] = (), teacher: Options | None = None, **options) -> Trained:
        asked = ask_heal(**{**PLAIN, **options})
        session = Session.plan(asked, source, Store.open(store_folder), default_tokens=0, most_between_updates=1)
        teaching = Teaching.plan(teacher, teacher=source, student=source) if teacher else None
        return Trained(source, session, asked, session.settings.steps, teaching, axes)

    return make


def parts(trained: Trained) -> dict[str, int]:
    return {name: nbytes for name, nbytes in trained.need().parts.items() if nbytes}


def test_what_lasts_follows_from_the_parameters(trained, source) -> None:
    found, weights = trained().need(), 4 * source.parameters
    assert {name: found.parts[name] for name in ("weights", "gradients", "optimizer")} == {
        "weights": weights,
        "gradients": weights,
        "optimizer": 2 * weights,
    }
    assert found.saving == 3 * weights
    assert found.on("cpu") == sum(found.parts.values()) + 3 * weights
    assert found.on("cuda") == found.total
    assert trained(save_every=5).need().saving == 0  # of a run of four steps


def test_ranks_share_what_lasts_and_have_a_block_whole(trained, source) -> None:
    alone, weights = trained(teacher=Options(share=0.5), micro_sequences=1), 4 * source.parameters
    found = replace(alone, session=replace(alone.session, ranks=Ranks(count=4))).need()
    d, inner, kv, vocab = 32, 48, 16, source.shape["vocab_size"]
    block = 2 * d * d + 2 * kv * d + 3 * inner * d + 2 * d
    quarters = {"weights": weights // 4, "gradients": weights // 4, "optimizer": weights // 2}
    quarters["teacher_weights"] = weights // 4
    assert found.parts == {**alone.need().parts, **quarters, "gathered": 4 * ((2 * vocab + 1) * d + 3 * block)}
    assert found.saving == 3 * weights // 4


def test_shards_compute_from_weights_in_bf16(trained, source) -> None:
    """Not from casts that are kept; and what the residual stream takes is half."""
    alone = trained(autocast="bfloat16", micro_sequences=1)
    sharded = replace(alone, session=replace(alone.session, ranks=Ranks(count=4))).need()
    whole, weights = alone.need(), 4 * source.parameters
    assert whole.parts["casts"] > 0
    assert "casts" not in sharded.parts
    assert sharded.parts["activations"] < whole.parts["activations"]
    assert [sharded.parts[part] for part in ("weights", "gradients", "optimizer")] == [
        weights // 4,
        weights // 4,
        weights // 2,
    ]


def test_masks_by_hand(trained, source) -> None:
    sizes = source.shape.axes
    layers, kv, group = sizes["layer"], sizes["kv_head"], sizes["group"]
    masks = sizes["hidden"] + layers * (1 + kv + kv * group + sizes["intermediate"])
    assert trained(axes=AXES).need().saving - trained().need().saving == 24 * masks
    assert parts(trained(axes=AXES))["masks"] > 24 * masks


def test_a_teacher_by_hand(trained, source) -> None:
    weights = 4 * source.parameters
    assert parts(trained(teacher=Options(share=0.5)))["teacher_weights"] == weights
    assert parts(trained(teacher=Options(share=0.5, dtype="bfloat16")))["teacher_weights"] == weights // 2
    # All linears but the head, a byte for each weight and a scale in fp32 for each row.
    d, inner, kv = 32, 48, 16
    linears = 2 * d * d + 2 * kv * d + 3 * inner * d
    rows = 2 * d + 2 * kv + 2 * inner + d
    packed = weights - 3 * (3 * linears - 4 * rows)
    assert parts(trained(teacher=Options(share=0.5, weights="int8")))["teacher_weights"] == packed


def test_what_is_offloaded_is_counted_apart(trained, source) -> None:
    plain, weights = trained(micro_sequences=1).need(), 4 * source.parameters
    whole = trained(micro_sequences=1)
    found = replace(whole, session=replace(whole.session, ranks=Ranks(offload=True))).need()
    assert found.offloaded == 4 * weights
    assert not {"weights", "gradients", "optimizer"} & set(found.parts)
    assert found.parts["activations"] == plain.parts["activations"]
    assert 0 < found.parts["gathered"] < 3 * weights
    assert "in the computer's memory" in str(found)


def test_activations_grow_by_the_window_and_checkpointing_keeps_layers_ends(trained) -> None:
    one, two, four = (parts(trained(micro_sequences=n))["activations"] for n in (1, 2, 4))
    assert four - two == pytest.approx(2 * (two - one), rel=0.02)
    assert parts(trained(activation_checkpointing=True))["activations"] < 0.7 * four
    half = parts(trained(autocast="bfloat16"))
    assert half["activations"] < four
    assert half["casts"] > 0


def test_refused_with_what_was_found_needed_and_would_fit(trained, monkeypatch) -> None:
    whole = trained(teacher=Options(share=0.5))
    all_of_it, others = whole.need().on("cpu"), [other.need().on("cpu") for _, other in whole._others()]
    there = Room(max(need for need in others if need < all_of_it) + 1000, "a test")
    monkeypatch.setattr(memory, "room_on", lambda device: there)
    with pytest.raises(UserError) as told:
        whole.within_memory()
    assert f"{there.nbytes} bytes) free, says a test" in told.value.found
    assert f"({whole.need().on('cpu')} bytes): " in told.value.expected
    for part in ("weights", "gradients", "optimizer", "activations", "teacher weights", "checkpoint"):
        assert part in told.value.expected
    change = told.value.change
    assert change.startswith(
        "any of these would fit: --micro-batch 2 (0.00 GB); --activation-checkpointing full (0.00 GB)"
    )
    assert "a teacher in bfloat16 (teacher.dtype) (0.00 GB); no teacher" in change
    assert "--save-every 5 (no checkpoints)" in change
    assert "--lora-rank 16" in change


def test_where_only_all_together_or_nothing_fits(trained, monkeypatch) -> None:
    all_of_it = trained(micro_sequences=1, activation_checkpointing=True, save_every=5)
    least = replace(all_of_it, session=replace(all_of_it.session, settings=_in_bfloat16(all_of_it)))
    for nbytes, so in ((least.need().on("cpu"), "would fit"), (1000, "isn't enough")):
        monkeypatch.setattr(memory, "room_on", lambda device, nbytes=nbytes: Room(nbytes, "a test"))
        with pytest.raises(UserError, match=so) as told:
            trained().within_memory()
        assert told.value.change.startswith(
            "--micro-batch 1 and --activation-checkpointing full and --optimizer adamw8bit and --autocast bfloat16"
        )


def _in_bfloat16(trained: Trained):
    return replace(trained.session.settings, autocast=torch.bfloat16)


def test_auto_takes_the_most_that_leaves_a_tenth(trained, monkeypatch) -> None:
    auto = trained(micro_sequences="auto")
    assert auto.session.settings.halves
    for asked, chosen in ((8, 8), (4, 4), (2, 2), (1, 1)):
        nbytes = round(trained(micro_sequences=asked).need().on("cpu") / 0.9) + 1000
        monkeypatch.setattr(memory, "room_on", lambda device, nbytes=nbytes: Room(nbytes, "a test"))
        session = auto.within_memory()
        assert session.settings.micro_sequences == chosen
        assert session.describe()["memory"]["total_bytes"] == trained(micro_sequences=asked).need().total
    monkeypatch.setattr(memory, "room_on", lambda device: None)
    assert auto.within_memory().settings.micro_sequences == 8


def test_what_cannot_be_rehearsed_is_said_and_not_refused(trained, monkeypatch, caplog) -> None:
    monkeypatch.setattr(memory, "rehearse", lambda *args, **options: 1 / 0)
    caplog.set_level(logging.WARNING)
    session = trained().within_memory()
    assert session.memory == {}
    assert session.settings.micro_sequences == 4
    assert "memory can't be estimated (ZeroDivisionError" in caplog.text


def test_a_computer_too_small_for_a_copy(trained, monkeypatch) -> None:
    elsewhere = trained()
    monkeypatch.setattr(memory, "room_on", lambda device: Room(1000 if device == "cpu" else 10**9, "a test"))
    monkeypatch.setattr(Trained, "need", lambda self: Need({"weights": 10}, 5000))
    with pytest.raises(UserError, match="memory for checkpoints"):
        replace(elsewhere, session=replace(elsewhere.session, device="cuda")).within_memory()


def test_recorded_and_only_the_word_is_in_the_identity(tmp_path, model_folder, store_folder, ask_heal) -> None:
    asked = ask_heal(micro_sequences="auto", steps=2)
    out = heal(str(model_folder), data=str(store_folder), out=str(tmp_path / "out"), asked=asked).out
    said = next(event for event in read(out / "record.jsonl") if event["event"] == "heal")
    assert said["micro_sequences"] == 4
    assert said["memory"]["total_bytes"] > 0
    assert '"micro_sequences": "auto"' in (out / IDENTITY_FILE).read_text()


def test_an_automatic_micro_batch_stays_while_it_fits(
    tmp_path, monkeypatch, model_folder, store_folder, ask_heal, trained
) -> None:
    """With another come other bits: here two windows fit with some to spare, and the run was begun with four."""
    asked = ask_heal(micro_sequences="auto", batch_tokens=128, save_every=1)  # four windows
    needs = {n: trained(micro_sequences=n, batch_tokens=128).need().on("cpu") for n in (4, 2)}
    verb = partial(heal, str(model_folder), data=str(store_folder), asked=asked)

    def with_room(nbytes: float, out: str, **options) -> Path:
        monkeypatch.setattr(memory, "room_on", lambda device: Room(round(nbytes), "a test"))
        return verb(out=str(tmp_path / out), **options).out

    calm = with_room(10**9, "calm")
    for out in ("same", "fewer"):
        with pytest.raises(Stopped):
            with_room(10**9, out, watch=killed_at(2, signal.SIGTERM))
    same = with_room(needs[4] + 1, "same")
    assert (weights(same), losses(same)) == (weights(calm), losses(calm))
    fewer = with_room(needs[4] - 1, "fewer")
    told = [event for event in read(fewer / "record.jsonl") if event["event"] == "micro_batch"]
    assert [(event["before"], event["micro_sequences"]) for event in told] == [(4, 2)]


def test_it_stays_in_phases_yet_to_come(tmp_path, monkeypatch, model_folder, store_folder, ask_heal, trained) -> None:
    asked = ask_heal(
        micro_sequences="auto", batch_tokens=128, save_every=1, steps=None, phases=[{"steps": 3}, {"steps": 3}]
    )
    need = trained(micro_sequences=4, batch_tokens=128).need().on("cpu")
    verb = partial(heal, str(model_folder), data=str(store_folder), asked=asked)

    def with_room(nbytes: int, out: str, **options) -> Path:
        monkeypatch.setattr(memory, "room_on", lambda device: Room(nbytes, "a test"))
        return verb(out=str(tmp_path / out), **options).out

    calm = with_room(10**9, "calm")
    with pytest.raises(Stopped):
        with_room(10**9, "out", watch=killed_at(2, signal.SIGTERM))
    out = with_room(need + 1, "out")  # four windows just fit, to begin with it would take two
    assert (weights(out), losses(out)) == (weights(calm), losses(calm))


def test_a_damaged_checkpoint_has_no_say_in_it(tmp_path, model_folder, store_folder, ask_heal) -> None:
    asked = ask_heal(micro_sequences="auto", batch_tokens=128, save_every=1)
    verb = partial(heal, str(model_folder), data=str(store_folder), asked=asked, out=str(tmp_path / "out"))
    with pytest.raises(Stopped):
        verb(watch=killed_at(3, signal.SIGTERM))
    state = tmp_path / "out.partial" / "checkpoints" / "step-3" / "state.json"
    assert micro_batches(tmp_path / "out.partial") == [4]
    state.write_text(state.read_text().replace('"micro_sequences": 4', '"micro_sequences": 3'), encoding="utf-8")
    (tmp_path / "out.partial" / "checkpoints" / "step-2" / "manifest.json").unlink()
    assert micro_batches(tmp_path / "out.partial") == []


@pytest.mark.parametrize("value", [0, "-2", "all", 1.5, True])
def test_other_micro_batches_are_refused(value) -> None:
    told = r"micro_sequences \(--micro-batch\): .*; expected a number of windows, or auto"
    with pytest.raises(UserError, match=told):
        validated(Heal, {"micro_sequences": value})


def test_fault_64_too_little_memory_is_told_before_the_start(tmp_path, wide, store_folder, ask_heal) -> None:
    out, partial_ = tmp_path / "out", tmp_path / "out.partial"
    verb = partial(heal, str(wide), data=str(store_folder), out=str(out), asked=ask_heal(save_every=1))
    assert apart(partial(verb, watch=killed_at(2, saved_in=partial_))) == -signal.SIGKILL
    before = {path: path.read_bytes() for path in partial_.rglob("*") if path.is_file()}
    assert any("checkpoints" in str(path) for path in before)

    def with_little() -> None:
        lines = Path("/proc/self/status").read_text().splitlines()
        taken = next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmSize"))
        resource.setrlimit(resource.RLIMIT_AS, (taken + (120 << 20), resource.RLIM_INFINITY))
        try:
            verb()
        except UserError as told:
            os._exit(2 if "RLIMIT_AS" in str(told) and "memory for training" in str(told) else 3)

    assert apart(with_little) == 2
    assert {path: path.read_bytes() for path in partial_.rglob("*") if path.is_file()} == before
    assert apart(verb) == 0
    assert [event["event"] for event in read(out / "record.jsonl")].count("resumed") == 1
