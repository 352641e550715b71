"""Checkpoints: whole or absent whenever the process dies, known by their sums, and never more than the disk holds."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from time import sleep
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from killed import apart
from torch.distributed.tensor import Shard, distribute_tensor
from two_ranks import on_ranks

from shearling.errors import UserError
from shearling.ranks.ranks import ALONE, OnAnotherRank, joined
from shearling.train.checkpoint import Checkpoints, Saved
from shearling.weights.writer import write

TENSORS = {
    "model.weight": torch.arange(12.0).reshape(3, 4),
    "model.half": torch.arange(5).bfloat16(),
    "gates.closed": torch.tensor([True, False, True]),
    "optimizer.0.0.step": torch.tensor(7.0),
    "state.counts": torch.tensor([3, 2**40]),
}
# Every call of Python's that changes what is on the disk while a checkpoint is written.
CALLS = ("fsync", "rename", "mkdir", "unlink", "rmdir")


def opened(folder: Path, **options) -> Checkpoints:
    return Checkpoints(folder, run="this", ranks=ALONE, **options)


def of(number: int) -> dict[str, torch.Tensor]:
    """The tensors that go into a checkpoint of this number."""
    return {name: tensor if tensor.dtype == torch.bool else tensor + number for name, tensor in TENSORS.items()}


def save(folder: Path, *numbers: int, **options) -> None:
    with opened(folder, **options) as checkpoints:
        for number in numbers:
            checkpoints.save(number, of(number), {"step": number, "third": 1 / 3})


def check(saved: Saved | None, number: int) -> None:
    """What `save` has saved, to the bit."""
    assert saved is not None
    assert (saved.number, saved.plain) == (number, {"step": number, "third": 1 / 3})
    found = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    saved.load(found, ALONE)
    for name, tensor in of(number).items():
        assert torch.equal(found[name], tensor), name


def test_what_was_saved_comes_back_and_the_last_two_stay(tmp_path):
    save(tmp_path, 1, 2, 3, 4, 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-4", "step-5"]
    check(opened(tmp_path).newest(), 5)


def test_those_asked_for_stay(tmp_path):
    save(tmp_path, 1, 2, 3, 4, 5, keep=1, keep_every=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-2", "step-4", "step-5"]


def test_tensors_are_copied_before_training_goes_on(tmp_path):
    tensors = {name: tensor.clone() for name, tensor in TENSORS.items()}
    with opened(tmp_path) as checkpoints:
        checkpoints.save(0, tensors, {"step": 0, "third": 1 / 3})
        for tensor in tensors.values():
            tensor.zero_()
    check(opened(tmp_path).newest(), 0)


def test_the_last_one_is_named_once_it_is_whole(tmp_path, monkeypatch):
    def slowly(*args, **options) -> None:
        sleep(0.3)
        write(*args, **options)

    monkeypatch.setattr("shearling.train.checkpoint.write", slowly)
    with opened(tmp_path) as checkpoints:
        assert checkpoints.last == "none yet"
        checkpoints.save(1, TENSORS, {})
        assert checkpoints.last == str(tmp_path / "step-1")


def killed_in_call(folder: Path, count: int) -> int:
    """Saves a second and a third checkpoint, killed before the count-th call; the exit code."""

    def work() -> None:
        left = count

        def counting(name: str):
            call = getattr(os, name)

            def counted(*args, **kwargs):
                nonlocal left
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **kwargs)

            return counted

        for name in CALLS:
            setattr(os, name, counting(name))
        save(folder, 2, 3)

    return apart(work)


def test_fault_02_killed_at_every_point_of_a_save(tmp_path):
    """Wherever it dies, the newest whole one is there, and saving goes on from it."""
    save(tmp_path / "first", 1)
    ended = []
    for count in range(100):
        folder = shutil.copytree(tmp_path / "first", tmp_path / str(count))
        code = killed_in_call(folder, count)
        newest = opened(folder).newest()
        assert newest is not None
        check(newest, newest.number)
        ended.append(newest.number)
        save(folder, 4)
        check(opened(folder).newest(), 4)
        assert sorted(path.name for path in folder.iterdir())[-1] == "step-4"
        if code == 0:
            break
        assert code == -signal.SIGKILL
    else:
        pytest.fail("a save of more than 100 calls")
    assert ended == sorted(ended)
    assert set(ended) == {1, 2, 3}


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("damage", ["empty", "missing", "short"])
@pytest.mark.parametrize("name", ["manifest.json", "state.json", "rank-0/model.safetensors", "rank-0/starts.json"])
def test_fault_10_a_damaged_one_is_passed_over_and_said(tmp_path, damage, name):
    save(tmp_path, 1, 2)
    path = tmp_path / "step-2" / name
    whole = path.read_bytes()
    path.unlink() if damage == "missing" else path.write_bytes(b"" if damage == "empty" else whole[:-1])
    checkpoints = opened(tmp_path)
    check(checkpoints.newest(), 1)
    assert len(checkpoints.notes) == 1
    assert f"{tmp_path}/step-2 isn't used" in checkpoints.notes[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1", "step-2.damaged"]


def test_fault_10_where_none_is_whole_nothing_is_touched(tmp_path):
    save(tmp_path, 1, 2)
    for number in (1, 2):
        (tmp_path / f"step-{number}" / "state.json").write_bytes(b"")
    before = files(tmp_path)
    with pytest.raises(UserError, match="none of 2 that can be used"):
        opened(tmp_path).newest()
    assert files(tmp_path) == before


def test_a_disk_out_of_reach_damages_nothing(tmp_path, monkeypatch):
    """What can't be read just now is no reason to give it up."""
    save(tmp_path, 1, 2)
    before = files(tmp_path)

    def fail(path: Path) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    with monkeypatch.context() as patched:
        patched.setattr("shearling.train.checkpoint.file_sum", fail)
        with pytest.raises(UserError, match=r"step-2.*Input/output error.*nothing was changed"):
            opened(tmp_path).newest()
    assert files(tmp_path) == before
    check(opened(tmp_path).newest(), 2)


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    save(folder, 1, 2)
    return folder


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_fault_11_every_flipped_bit_is_found(two, data):
    path = data.draw(st.sampled_from(files(two / "step-2")))
    whole = path.read_bytes()
    at, bit = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 7))
    spare = shutil.copytree(two / "step-2", two.with_name(f"{two.name}-spare"), dirs_exist_ok=True)
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
    try:
        check(opened(two).newest(), 1)
    finally:
        shutil.rmtree(two / "step-2.damaged", ignore_errors=True)
        shutil.copytree(spare, two / "step-2", dirs_exist_ok=True)


def test_fault_45_what_another_run_saved_is_not_used(tmp_path):
    save(tmp_path, 1)
    other = Checkpoints(tmp_path, run="another", ranks=ALONE)
    with pytest.raises(UserError, match="none of 1"):
        other.newest()
    assert "another run saved it" in other.notes[0]


def test_fault_12_a_save_that_fails_is_raised_at_the_next_and_leaves_the_old(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def fail(*args, **kwargs) -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setattr("shearling.train.checkpoint.write", fail)
    with pytest.raises(RuntimeError, match="no such luck"), opened(tmp_path) as checkpoints:
        checkpoints.save(2, TENSORS, {})
        checkpoints.save(3, TENSORS, {})
    check(opened(tmp_path).newest(), 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of one MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("no right to mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_fault_07_a_full_disk_keeps_the_old_and_names_the_bytes(small_disk):
    save(small_disk / "checkpoints", 1)
    large = {"model.weight": torch.zeros(200_000)}
    told = (
        rf"checkpoint {small_disk}/checkpoints/step-2: found \d+ bytes free; expected room for 8000\d\d bytes; .*"
        rf"the last checkpoint, {small_disk}/checkpoints/step-1, is as it was"
    )
    with pytest.raises(UserError, match=told), opened(small_disk / "checkpoints") as checkpoints:
        (small_disk / "other").write_bytes(bytes(500_000))
        checkpoints.save(2, large, {})
    check(opened(small_disk / "checkpoints").newest(), 1)


@pytest.mark.parametrize("noticed", ["before it", "in the midst of it"])
def test_fault_07_a_disk_that_fills_up_while_saving(small_disk, monkeypatch, noticed):
    folder = small_disk / "checkpoints"
    save(folder, 1)
    (small_disk / "other").write_bytes(bytes(800_000))
    frees = iter([10**9, 5 if noticed == "before it" else 10**9])  # as asked at the save, and by who writes tensors
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=next(frees)))
    found = "5 bytes free" if noticed == "before it" else "No space left on device .*"
    told = rf"^checkpoint {folder}/step-2: found {found}; expected room for 8000\d\d bytes; .*{folder}/step-1, is as it"
    with pytest.raises(UserError, match=told), opened(folder) as checkpoints:
        checkpoints.save(2, {"model.weight": torch.zeros(200_000)}, {})
    check(opened(folder).newest(), 1)
    assert [path.name for path in folder.iterdir()] == ["step-1"]


def test_a_full_disk_before_there_is_any(small_disk):
    (small_disk / "other").write_bytes(bytes(800_000))
    with pytest.raises(UserError, match="there is no checkpoint yet"), opened(small_disk / "checkpoints") as new:
        new.save(2, {"model.weight": torch.zeros(200_000)}, {})


@pytest.mark.parametrize("noticed", ["before it", "in the midst of it"])
def test_fault_07_two_ranks_need_room_together(small_disk, noticed):
    """Each one's share would fit."""
    folder = small_disk / "checkpoints"

    def work() -> str:
        if noticed == "in the midst of it":
            shutil.disk_usage = lambda path: SimpleNamespace(free=10**9)
        with joined("cpu") as (ranks, _), pytest.raises((UserError, OnAnotherRank)) as told:
            assert ranks.mesh is not None
            with Checkpoints(folder, run="this", ranks=ranks) as checkpoints:
                checkpoints.save(1, {"small": torch.zeros(3)}, {})
                checkpoints.wait()
                large = distribute_tensor(torch.zeros(200_000), ranks.mesh, [Shard(0)])
                if ranks.first:
                    (small_disk / "other").write_bytes(bytes(500_000))
                ranks.meet()
                checkpoints.save(2, {"model.weight": large}, {})
        return str(told.value)

    found = "No space left on device.*" if noticed == "in the midst of it" else r"\d+ bytes free"
    told = rf"checkpoint {folder}/step-2: found {found}; expected room for 8000\d\d bytes; .*{folder}/step-1, is as it"
    said = on_ranks(work)
    assert any(re.match(told, each) for each in said), said
    assert all(re.match(rf"{told}|another rank", each) for each in said), said
    assert [path.name for path in folder.iterdir()] == ["step-1"]


def test_fault_09_too_little_room_at_the_start(small_disk):
    with opened(small_disk / "checkpoints") as checkpoints:
        checkpoints.check_room(300_000, to_come=range(1, 10))
        with pytest.raises(UserError, match="bytes free; expected room for 1200000 bytes of checkpoints"):
            checkpoints.check_room(400_000, to_come=range(1, 10))
        checkpoints.check_room(400_000, to_come=[1, 2])
        checkpoints.check_room(4_000_000, to_come=[])
    with opened(small_disk / "checkpoints", keep_every=2) as checkpoints:
        with pytest.raises(UserError, match="expected room for 1800000 bytes"):  # 2, 4 and 6 stay
            checkpoints.check_room(300_000, to_come=range(1, 9))
        checkpoints.check_room(300_000, to_come=range(1, 9), by_clock=True)


def test_fault_09_too_little_room_for_two_ranks(small_disk):
    def work() -> str:
        with joined("cpu") as (ranks, _), Checkpoints(small_disk / "new", run="this", ranks=ranks) as checkpoints:
            checkpoints.check_room(150_000, to_come=range(1, 10))
            with pytest.raises(UserError) as told:
                checkpoints.check_room(200_000, to_come=range(1, 10))
        return str(told.value)

    assert all("expected room for 1200000 bytes" in said for said in on_ranks(work))


def test_all_of_it_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced, checked = {}, []
    fsync, rename = os.fsync, os.rename

    def syncing(descriptor: int) -> None:
        fsync(descriptor)
        stat = os.fstat(descriptor)
        synced[stat.st_ino] = stat.st_mtime_ns

    def renaming(old: Path, new: Path) -> None:
        for path in (old, *Path(old).rglob("*")):
            assert synced.get(path.stat().st_ino) == path.stat().st_mtime_ns, path
            checked.append(path.name)
        rename(old, new)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "rename", renaming)
    save(tmp_path, 1)
    assert {"step-1.new", "rank-0", "starts.json", "model.safetensors", "state.json", "manifest.json"} == set(checked)


def test_another_shape_is_refused(tmp_path):
    save(tmp_path, 1)
    saved = opened(tmp_path).newest()
    assert saved is not None
    with pytest.raises(UserError, match=r"model\.weight: found shape \(3, 4\); expected \(4, 4\)"):
        saved.load({"model.weight": torch.zeros(4, 4)}, ALONE)
    with pytest.raises(UserError, match=r"model\.bias: found no such tensor"):
        saved.load({"model.bias": torch.zeros(4)}, ALONE)


def test_no_pickle_is_ever_read(tmp_path):
    save(tmp_path, 1)
    kinds = {path.suffix for path in files(tmp_path)}
    assert kinds == {".json", ".safetensors"}
    manifest = json.loads((tmp_path / "step-1" / "manifest.json").read_text())
    assert len(manifest["sha256"]) == len(files(tmp_path)) - 1
