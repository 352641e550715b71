"""Figures beside the record. The packages aren't installed here: a module of the same calls stands in for each."""

import logging
import sys
from types import SimpleNamespace

import pytest

from shearling.errors import UserError
from shearling.record import read
from shearling.verbs.heal import heal
from shearling.verbs.sinks import check_sinks


class FakeWriter:
    """What is used of TensorBoard's SummaryWriter."""

    made: list["FakeWriter"]

    def __init__(self, folder: str):
        self.folder, self.told, self.closed = folder, [], False
        self.made.append(self)

    def add_scalar(self, name: str, value: float, *, global_step: int) -> None:
        self.told.append((name, value, global_step))

    def close(self) -> None:
        self.closed = True


class FakeRun:
    """What is used of a run of W&B, which is down after so many calls."""

    def __init__(self, lasts: int):
        self.lasts, self.told, self.finished = lasts, [], 0

    def define_metric(self, name: str, *, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "tokens")

    def log(self, figures: dict) -> None:
        if len(self.told) == self.lasts:
            raise ConnectionError("no route to host")
        self.told.append(figures)

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def tensorboard(monkeypatch):
    FakeWriter.made = []
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=FakeWriter))
    return FakeWriter.made


@pytest.fixture
def wandb(monkeypatch):
    run = FakeRun(lasts=1000)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **options: run))
    return run


def test_the_numbers_of_steps_and_held_out_losses(tmp_path, model_folder, store_folder, ask_heal, tensorboard, wandb):
    asked = ask_heal(sinks=["tensorboard", "wandb"])
    heal(str(model_folder), data=str(store_folder), out=str(tmp_path / "out"), asked=asked)
    (writer,) = tensorboard
    assert writer.folder == str(tmp_path / "out.tensorboard")
    assert writer.closed
    assert wandb.finished == 1
    steps = [event for event in read(tmp_path / "out" / "record.jsonl") if event["event"] == "step"]
    assert [(v, at) for n, v, at in writer.told if n == "step/loss"] == [(s["loss"], s["tokens"]) for s in steps]
    names = {name for name, _, _ in writer.told}
    assert {"step/tokens_per_second", "step/memory_bytes", "step/data_wait_share", "held_out/losses/code"} <= names
    assert "held_out/healed/losses/code" in names
    assert [t["tokens"] for t in wandb.told if "step/loss" in t] == [s["tokens"] for s in steps]


def test_they_make_no_other_stage(ask_heal, ask_prune):
    for ask in (ask_heal, ask_prune):
        assert ask(sinks=["wandb"], log_every=7).identity() == ask().identity()


def test_fault_66_a_logger_that_is_down_is_left_out(tmp_path, model_folder, store_folder, ask_heal, wandb, caplog):
    wandb.lasts = 2
    call = {"data": str(store_folder)}
    calm = heal(str(model_folder), **call, out=str(tmp_path / "calm"), asked=ask_heal())
    with caplog.at_level(logging.WARNING):
        found = heal(str(model_folder), **call, out=str(tmp_path / "out"), asked=ask_heal(sinks=["wandb"]))
    assert found.losses == calm.losses
    said = [r.message for r in caplog.records if "sink" in r.message]
    assert said == ["sink wandb failed and is left out from here on (ConnectionError: no route to host)"]
    assert len(wandb.told) == 2
    assert len([event for event in read(tmp_path / "out" / "record.jsonl") if event["event"] == "step"]) == 4


def test_fault_66_one_that_cannot_be_reached_at_the_start(tmp_path, model_folder, store_folder, ask_heal, monkeypatch):
    def down(**options):
        raise TimeoutError

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=down))
    found = heal(str(model_folder), data=str(store_folder), out=str(tmp_path / "out"), asked=ask_heal(sinks=["wandb"]))
    assert found.out.is_dir()


def test_a_missing_package_is_told_before_anything_is_done(tmp_path, model_folder, store_folder, ask_heal, monkeypatch):
    for module in ("wandb", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=r"shearling\[wandb\]"):
        heal(str(model_folder), data=str(store_folder), out=str(tmp_path / "out"), asked=ask_heal(sinks=["wandb"]))
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"shearling\[tensorboard\]"):
        check_sinks(["tensorboard"])
