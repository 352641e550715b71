"""Killed and gone on from: the same losses and the same weights, to the bit, as of a run that nobody disturbed."""

import errno
import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial, partialmethod
from pathlib import Path
from time import sleep
from types import SimpleNamespace

import pytest
import torch
from killed import apart, killed_at, losses, weights

from shearling.errors import Stopped, UserError
from shearling.recipe import Data, Recipe, validated
from shearling.record import Record, read, versions
from shearling.run import run
from shearling.train.checkpoint import Checkpoints
from shearling.verbs.data import make_store
from shearling.verbs.heal import heal
from shearling.verbs.prune import prune
from shearling.verbs.session import unwatched

pytestmark = pytest.mark.slow  # processes that are killed and begun again

EVERYTHING = {
    "steps": None,
    "phases": [{"steps": 6}, {"steps": 5, "seq_len": 16, "lr": 1e-3}],
    "mixture": {"schedule": "dynamic", "rule": "paper", "every": 2, "signal": "training"},
    "teacher": {"share": 0.5},
    "repeats": {"code": 1},
    "at_end": "redistribute",
    "compile": True,
    "save_every": 2,
    "workers": 2,
}


@pytest.fixture
def eager_backend(monkeypatch):
    """Compiled without code being generated, which takes a minute."""
    compiled = partialmethod(torch.nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", compiled)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


def chained(verb, out: Path, steps: list[int]) -> list[int]:
    """Runs a verb to its end, killed on the way after so many of its own steps each time; where it went on from.

    (The record has each of them: a checkpoint's part of it does.)
    """
    for step in steps:
        watch = killed_at(step, saved_in=out.with_name(f"{out.name}.partial"))
        assert apart(partial(verb, out=str(out), watch=watch)) == -signal.SIGKILL
        assert not out.exists()
    assert apart(partial(verb, out=str(out), watch=unwatched)) == 0
    return [event["step"] for event in read(out / "record.jsonl") if event["event"] == "resumed"]


def test_fault_01_04_healing_with_everything_on(tmp_path, cut, store_folder, ask_heal, eager_backend):
    """Two phases, a teacher, a mixture that follows losses, a domain that ends, compiled: killed three times."""
    verb = partial(heal, str(cut), data=str(store_folder), asked=ask_heal(**EVERYTHING))
    assert apart(partial(verb, out=str(tmp_path / "calm"))) == 0
    resumed = chained(verb, tmp_path / "killed", [3, 3, 3])
    assert len(set(resumed)) == 3
    assert weights(tmp_path / "killed") == weights(tmp_path / "calm")
    assert losses(tmp_path / "killed") == losses(tmp_path / "calm")
    assert not (tmp_path / "killed" / "checkpoints").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"masks": {"relaxation": "soft_topk"}},
        {"masks": {"relaxation": "hard_concrete"}},
        {"masks_only": True},
        {"lora_rank": 2},
    ],
)
def test_fault_03_masks_and_multipliers(tmp_path, model_folder, store_folder, ask_prune, options):
    asked = ask_prune(method="masks", steps=8, save_every=2, **options)
    verb = partial(prune, str(model_folder), data=str(store_folder), asked=asked)
    assert apart(partial(verb, out=str(tmp_path / "calm"))) == 0
    assert len(set(chained(verb, tmp_path / "killed", [3, 3, 3]))) == 3
    assert weights(tmp_path / "killed") == weights(tmp_path / "calm")
    assert losses(tmp_path / "killed") == losses(tmp_path / "calm")


def test_moments_in_8_bits(tmp_path, wide, store_folder, ask_heal, eager_backend):
    """Of a model with tensors that are large enough for them."""
    pytest.importorskip("torchao")
    asked = ask_heal(steps=5, save_every=1, optimizer="adamw8bit")
    verb = partial(heal, str(wide), data=str(store_folder), asked=asked)
    assert apart(partial(verb, out=str(tmp_path / "calm"))) == 0
    assert len(set(chained(verb, tmp_path / "killed", [2, 2]))) == 2
    assert weights(tmp_path / "killed") == weights(tmp_path / "calm")
    assert losses(tmp_path / "killed") == losses(tmp_path / "calm")


def test_healing_by_adapters(tmp_path, cut, store_folder, ask_heal):
    verb = partial(heal, str(cut), data=str(store_folder), asked=ask_heal(steps=8, save_every=2, lora_rank=4))
    assert apart(partial(verb, out=str(tmp_path / "calm"))) == 0
    assert len(set(chained(verb, tmp_path / "killed", [3, 3, 3]))) == 3
    assert weights(tmp_path / "killed") == weights(tmp_path / "calm")
    assert losses(tmp_path / "killed") == losses(tmp_path / "calm")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_fault_05_a_signal_lets_the_step_end_and_saves(tmp_path, cut, store_folder, ask_heal, number):
    verb = partial(heal, str(cut), data=str(store_folder), asked=ask_heal(steps=6))

    def stopped() -> None:
        try:
            verb(out=str(tmp_path / "out"), watch=killed_at(3, number))
        except Stopped as told:
            os._exit(128 + told.signal)

    assert apart(stopped) == 128 + number
    assert apart(partial(verb, out=str(tmp_path / "out"))) == 0
    assert apart(partial(verb, out=str(tmp_path / "calm"))) == 0
    events = read(tmp_path / "out" / "record.jsonl")
    assert [event["step"] for event in events if event["event"] == "resumed"] == [3]
    assert weights(tmp_path / "out") == weights(tmp_path / "calm")
    assert losses(tmp_path / "out") == losses(tmp_path / "calm")


@pytest.mark.parametrize("save_every", [None, 100])
def test_fault_05_a_signal_while_the_masked_model_is_measured(
    tmp_path, model_folder, store_folder, ask_prune, monkeypatch, save_every
):
    """The last step is over then, and it is saved, however seldom that was asked for."""
    asked = ask_prune(method="masks", steps=4, save_every=save_every)
    verb = partial(prune, str(model_folder), data=str(store_folder), asked=asked)
    with signalled_at("masks", monkeypatch), pytest.raises(Stopped, match=r"goes on from .*/step-4"):
        verb(out=str(tmp_path / "out"))
    verb(out=str(tmp_path / "out"))
    verb(out=str(tmp_path / "calm"))
    assert [e["step"] for e in read(tmp_path / "out" / "record.jsonl") if e["event"] == "resumed"] == [4]
    assert weights(tmp_path / "out") == weights(tmp_path / "calm")


def test_fault_05_a_signal_where_nothing_trains(tmp_path, model_folder, store_folder, ask_prune, monkeypatch):
    out = str(tmp_path / "out")
    verb = partial(prune, str(model_folder), data=str(store_folder), out=out, asked=ask_prune(method="activation"))
    with signalled_at("held_out", monkeypatch), pytest.raises(Stopped, match="begins it again"):
        verb()
    assert not Path(out).exists()
    assert verb().out == Path(out)


def test_killed_while_the_result_is_written_no_step_is_lost(tmp_path, cut, store_folder, ask_heal, monkeypatch):
    out = tmp_path / "out"
    verb = partial(heal, str(cut), data=str(store_folder), out=str(out), asked=ask_heal(steps=5))
    with monkeypatch.context() as patched:
        patched.setattr("shearling.verbs.source.carry", lambda *args: os.kill(os.getpid(), signal.SIGKILL))
        assert apart(verb) == -signal.SIGKILL
    verb()
    assert [e["step"] for e in read(out / "record.jsonl") if e["event"] == "resumed"] == [5]


@contextmanager
def signalled_at(event: str, monkeypatch) -> Iterator[None]:
    """This process gets a SIGTERM when an event of this name is first recorded."""
    with monkeypatch.context() as patched:
        plain, seen = Record.write, []

        def write(self: Record, name: str, /, **fields) -> None:
            plain(self, name, **fields)
            if name == event and not seen:
                seen.append(name)
                os.kill(os.getpid(), signal.SIGTERM)

        patched.setattr(Record, "write", write)
        yield


def test_fault_06_a_second_signal_leaves_at_once(tmp_path, cut, store_folder, ask_heal):
    verb = partial(
        heal, str(cut), data=str(store_folder), asked=ask_heal(steps=6, save_every=2), out=str(tmp_path / "out")
    )

    def impatient(title: str, steps: int):
        def on_step(step, figures, excess) -> None:
            if step == 5:
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)

        return on_step

    assert apart(partial(verb, watch=impatient)) == 143
    assert apart(verb) == 0
    assert [e["step"] for e in read(tmp_path / "out" / "record.jsonl") if e["event"] == "resumed"] in ([2], [4])


def test_fault_06_a_second_signal_in_a_save(tmp_path, cut, store_folder, ask_heal):
    """The checkpoint before is whole, and from there come the bits of a run that nobody disturbed."""
    verb = partial(heal, str(cut), data=str(store_folder), asked=ask_heal(steps=6, save_every=2))
    verb(out=str(tmp_path / "calm"))

    def saving(self, new: Path, number: int, text: str) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        sleep(60)

    def work() -> None:
        first = killed_at(4, signal.SIGTERM)

        def watch(title: str, steps: int):
            on_step = first(title, steps)

            def told(step, figures, excess) -> None:
                if step == 4:
                    Checkpoints._finish = saving
                on_step(step, figures, excess)

            return told

        verb(out=str(tmp_path / "out"), watch=watch)

    assert apart(work) == 143
    assert [path.name for path in (tmp_path / "out.partial" / "checkpoints").glob("step-?")] == ["step-2"]
    verb(out=str(tmp_path / "out"))
    assert weights(tmp_path / "out") == weights(tmp_path / "calm")
    assert losses(tmp_path / "out") == losses(tmp_path / "calm")


def test_fault_22_the_checkpoint_that_is_named_can_be_gone_on_from(tmp_path, cut, store_folder, ask_heal, monkeypatch):
    asked = ask_heal(steps=16, save_every=1, eval_every=0)
    verb = partial(heal, str(cut), data=str(store_folder), asked=asked, out=str(tmp_path / "out"))
    with monkeypatch.context() as patched:
        norm, calls = torch.nn.utils.clip_grad_norm_, []

        def broken(parameters, most) -> torch.Tensor:
            calls.append(None)
            return norm(parameters, most) * (float("nan") if len(calls) > 3 else 1)

        patched.setattr(torch.nn.utils, "clip_grad_norm_", broken)
        with pytest.raises(UserError, match=r"in 10 steps in a row up to step 13; .*last good checkpoint: .*/step-12"):
            verb()
    verb()
    assert [e["step"] for e in read(tmp_path / "out" / "record.jsonl") if e["event"] == "resumed"] == [12]


def test_going_on_with_other_versions_is_said(tmp_path, cut, store_folder, ask_heal, monkeypatch, caplog):
    verb = partial(heal, str(cut), data=str(store_folder), asked=ask_heal(save_every=1), out=str(tmp_path / "out"))
    with monkeypatch.context() as patched:
        patched.setattr("shearling.verbs.keeping.versions", lambda: {**versions(), "torch": "0.4"})
        assert apart(partial(verb, watch=killed_at(3))) == -signal.SIGKILL
    verb()
    assert "it was saved by torch 0.4" in caplog.text


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"batch_tokens": 64}, "batch_tokens: 128 there, 64 now"),
        ({"lr": 0.5}, "lr: null there, 0.5 now"),
        ({"seed": 1}, "seed: 0 there, 1 now"),
    ],
)
def test_fault_14_15_another_recipe_is_refused_with_what_differs(tmp_path, cut, store_folder, ask_heal, other, told):
    verb = partial(heal, str(cut), data=str(store_folder), out=str(tmp_path / "out"))
    assert apart(partial(verb, asked=ask_heal(save_every=1), watch=killed_at(3))) == -signal.SIGKILL
    with pytest.raises(UserError, match=told):
        verb(asked=ask_heal(save_every=1, **other))
    verb(asked=ask_heal(save_every=2))  # how often it saves changes nothing


def test_fault_15_another_store_or_model_is_refused(tmp_path, cut, model_folder, store_folder, corpus, ask_heal):
    asked, out = ask_heal(save_every=1), str(tmp_path / "out")
    killed = partial(heal, str(cut), data=str(store_folder), out=out, asked=asked, watch=killed_at(3))
    assert apart(killed) == -signal.SIGKILL
    other = str(tmp_path / "store")
    make_store(validated(Data, {"inputs": [str(corpus)], "held_out": 0.4}), tokenizer=str(model_folder), out=other)
    with pytest.raises(UserError, match=r"a stage with other settings .*data: "):
        heal(str(cut), data=other, out=out, asked=asked)
    with pytest.raises(UserError, match=r"a stage with other settings .*model: "):
        heal(str(model_folder), data=str(store_folder), out=out, asked=asked)


def test_fault_16_another_number_of_workers_changes_nothing(tmp_path, cut, store_folder, ask_heal):
    heal(str(cut), data=str(store_folder), out=str(tmp_path / "calm"), asked=ask_heal(steps=9, workers=0))
    out = tmp_path / "out"
    verb = partial(heal, str(cut), data=str(store_folder), out=str(out))
    for workers in (1, 2):
        watch = killed_at(3, saved_in=out.with_name("out.partial"))
        asked = ask_heal(steps=9, workers=workers, save_every=1)
        assert apart(partial(verb, asked=asked, watch=watch)) == -signal.SIGKILL
    verb(asked=ask_heal(steps=9, workers=4))
    assert losses(out) == losses(tmp_path / "calm")
    assert weights(out) == weights(tmp_path / "calm")


@pytest.mark.parametrize("boundary", ["run", "data", "prune", "heal"])
def test_fault_59_a_run_killed_between_stages_goes_on_with_the_next(tmp_path, model_folder, corpus, boundary):
    """And does nothing again that is finished."""
    stage = {"steps": 3, "seq_len": 32, "batch_tokens": 128, "eval_windows": 4, "device": "cpu"}
    asked = {
        "model": str(model_folder),
        "data": {"inputs": [str(corpus)], "held_out": 0.2},
        "prune": {**stage, "to": {"hidden_size": 24}, "method": "masks", "calibration_windows": 4},
        "heal": stage,
    }

    def killed() -> None:
        plain = Record.write

        def write(self: Record, event: str, /, **fields) -> None:
            plain(self, event, **fields)
            if boundary in (event, fields.get("name")) and self.path.parent.name == "run":
                os.kill(os.getpid(), signal.SIGKILL)

        Record.write = write
        run(Recipe.model_validate({**asked, "out": str(tmp_path / "run")}))

    assert apart(killed) == -signal.SIGKILL
    done = {path.parent.name: path.stat().st_mtime_ns for path in tmp_path.glob("run/*/stage.json")}
    assert len(done) == ["run", "data", "prune", "heal"].index(boundary)
    for name in ("run", "calm"):
        run(Recipe.model_validate({**asked, "out": str(tmp_path / name)}))
    assert {name: (tmp_path / "run" / name / "stage.json").stat().st_mtime_ns for name in done} == done
    assert weights(tmp_path / "run" / "model") == weights(tmp_path / "calm" / "model")


@pytest.mark.parametrize("kept", [0, 0.5])
def test_a_record_that_a_power_loss_has_shortened(tmp_path, cut, store_folder, ask_heal, kept):
    """Some of its lines are gone, and those that are there can be read."""
    out, record = tmp_path / "out", tmp_path / "out.partial" / "record.jsonl"
    verb = partial(heal, str(cut), data=str(store_folder), asked=ask_heal(steps=6, save_every=2), out=str(out))
    assert apart(partial(verb, watch=killed_at(4, saved_in=record.parent))) == -signal.SIGKILL
    whole = record.read_bytes()
    record.write_bytes(whole[: int(kept * len(whole))])
    lines = record.read_bytes().count(b"\n")
    verb()
    events = read(out / "record.jsonl")
    assert [event["event"] for event in events[lines : lines + 2]] == ["record_cut_short", "resumed"]
    assert events[lines]["found_bytes"] <= kept * len(whole) < events[lines]["expected_bytes"] <= len(whole)


def test_what_a_checkpoint_says_of_the_record_is_on_the_disk_before_it(
    tmp_path, cut, store_folder, ask_heal, monkeypatch
):
    synced, found = {}, []
    fsync, rename = os.fsync, os.rename

    def syncing(descriptor: int) -> None:
        fsync(descriptor)
        synced[os.fstat(descriptor).st_ino] = os.fstat(descriptor).st_size

    def renaming(old: Path, new: Path) -> None:
        if Path(new).name.startswith("step-") and Path(old).suffix == ".new":
            said = json.loads((Path(old) / "state.json").read_bytes())["record_bytes"]
            record = Path(old).parents[1] / "record.jsonl"
            found.append(said > 0 and synced.get(record.stat().st_ino, 0) >= said)
        rename(old, new)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "rename", renaming)
    heal(str(cut), data=str(store_folder), out=str(tmp_path / "out"), asked=ask_heal(steps=6, save_every=2))
    assert found == [True, True, True]


def test_fault_09_room_is_asked_for_as_many_checkpoints_as_will_be_written(
    tmp_path, model_folder, store_folder, ask_heal, monkeypatch
):
    """One takes three times the weights' 200 kB."""
    verb = partial(heal, str(model_folder), data=str(store_folder))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    for every in (2, 3):  # the last step is saved too
        with pytest.raises(UserError, match=r"found 1000000 bytes free; expected room for \d+ bytes of checkpoints"):
            verb(out=str(tmp_path / "out"), asked=ask_heal(save_every=every))
    for every in (4, 1000):
        verb(out=str(tmp_path / f"every {every}"), asked=ask_heal(save_every=every))


def test_a_full_disk_at_a_line_of_the_record(tmp_path, cut, store_folder, ask_heal, monkeypatch):
    """Said as such, and the same command goes on from the last checkpoint once there is room."""
    verb = partial(
        heal, str(cut), data=str(store_folder), out=str(tmp_path / "out"), asked=ask_heal(steps=6, save_every=2)
    )
    plain, lines, record = os.fsync, [], tmp_path / "out.partial" / "record.jsonl"

    def full(descriptor: int) -> None:
        if record.exists() and os.path.samestat(os.fstat(descriptor), os.stat(record)):
            lines.append(descriptor)
            if len(lines) == 2:
                raise OSError(errno.ENOSPC, "No space left on device")
        plain(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        told = r"record .*record.jsonl: found No space left on device; expected room for its lines"
        with pytest.raises(UserError, match=told):
            verb()
    verb()
    assert [event["step"] for event in read(tmp_path / "out" / "record.jsonl") if event["event"] == "resumed"] == [2]


def test_checkpoints_asked_for_stay(tmp_path, cut, store_folder, ask_heal):
    """Whatever a later command on the finished stage asks."""
    verb = partial(heal, str(cut), data=str(store_folder), out=str(tmp_path / "out"))
    for keep_every in (2, None, 3, 1):
        out = verb(asked=ask_heal(steps=6, save_every=1, keep_every=keep_every)).out
        assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-2", "step-4", "step-6"]


@pytest.mark.parametrize(("keep_every", "kept"), [(None, []), (2, ["step-2", "step-4"])])
def test_killed_once_the_stage_has_its_name_the_other_checkpoints_go_the_next_time(
    tmp_path, cut, store_folder, ask_heal, monkeypatch, keep_every, kept
):
    verb = partial(heal, str(cut), data=str(store_folder), out=str(tmp_path / "out"))
    with monkeypatch.context() as patched:
        patched.setattr("shearling.verbs.heal.tidy", lambda out: os.kill(os.getpid(), signal.SIGKILL))
        assert apart(partial(verb, asked=ask_heal(steps=5, save_every=1, keep_every=keep_every))) == -signal.SIGKILL
    assert {"step-2", "step-4", "step-5"} & {path.name for path in (tmp_path / "out" / "checkpoints").iterdir()}
    assert verb(asked=ask_heal(steps=5)).done_before
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoints/*")) == kept
    assert (tmp_path / "out" / "checkpoints").exists() == bool(kept)
