import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap

import pytest

from shearling.errors import UserError
from shearling.stage import Stage

IDENTITY = {"verb": "prune", "settings": {"lr": 0.001, "steps": 10}}


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def finish(out, identity=IDENTITY):
    with Stage(out, identity) as folder:
        (folder / "model").mkdir()
        (folder / "model" / "weights").write_text("w")
    return tree(out)


def interrupted(out, fault, work):
    with Stage(out, IDENTITY) as folder:
        work(folder)
        raise fault


def holder(out, ending):
    """A second process that takes the stage, writes half of it, says so, and then does `ending`."""
    code = f"""
        import os, signal, sys
        from pathlib import Path
        from shearling.stage import Stage
        with Stage(Path({str(out)!r}), {IDENTITY!r}) as folder:
            (folder / "half").write_text("half")
            print("held", flush=True)
            {ending}
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout.readline() == b"held\n"
    return process


def test_the_folder_appears_whole_under_its_name(tmp_path):
    out = tmp_path / "runs" / "out"
    stage = Stage(out, IDENTITY)
    assert not stage.done
    with stage as folder:
        assert folder == tmp_path / "runs" / "out.partial"
        assert [path.name for path in folder.iterdir()] == ["stage.json"]
        (folder / "a").write_text("a")
        assert not out.exists()
    assert stage.done
    assert sorted(path.name for path in out.iterdir()) == ["a", "stage.json"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert json.loads((out / "stage.json").read_text())["identity"] == IDENTITY


def test_an_empty_folder_is_no_obstacle(tmp_path):
    (tmp_path / "out").mkdir()
    finish(tmp_path / "out")
    assert Stage(tmp_path / "out", IDENTITY).done


def test_done_again_is_refused_without_touching_it(tmp_path):
    before = finish(tmp_path / "out")
    with pytest.raises(UserError, match="finished already"), Stage(tmp_path / "out", IDENTITY):
        pytest.fail("entered")
    assert tree(tmp_path / "out") == before


def test_identity_is_plain_json_and_not_pythons_equality(tmp_path):
    finish(tmp_path / "out", {"n": 1, "axes": ("a", "b")})
    assert Stage(tmp_path / "out", {"axes": ["a", "b"], "n": 1}).done
    assert not Stage(tmp_path / "out", {"n": True, "axes": ["a", "b"]}).done


def test_another_identity_names_what_differs(tmp_path):
    before = finish(tmp_path / "out")
    other = Stage(tmp_path / "out", {"verb": "prune", "settings": {"lr": 0.002}})
    assert not other.done
    with pytest.raises(UserError) as caught, other:
        pytest.fail("entered")
    message = str(caught.value)
    assert "settings.lr: 0.001 there, 0.002 now" in message
    assert "settings.steps: 10 there, absent now" in message
    assert "another --out" in message
    assert tree(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_only_the_first_differences_are_shown(tmp_path):
    finish(tmp_path / "out", {f"k{n}": n for n in range(9)})
    with pytest.raises(UserError, match="k2: 2 there, 3 now; and 6 more"):
        Stage(tmp_path / "out", {f"k{n}": n + 1 for n in range(9)}).__enter__()


@pytest.mark.parametrize("name", ["out", "out.partial"])
@pytest.mark.parametrize("kind", ["file", "folder", "link", "broken stage.json"])
def test_what_isnt_ours_is_left_alone(tmp_path, name, kind):
    thing = tmp_path / name
    if kind == "file":
        thing.write_text("mine")
    elif kind == "link":
        thing.symlink_to(tmp_path / "nowhere")
    else:
        thing.mkdir()
        (thing / ("stage.json" if kind == "broken stage.json" else "thesis.tex")).write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(UserError, match="isn't a stage"), Stage(tmp_path / "out", IDENTITY):
        pytest.fail("entered")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("fault", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_interrupted_nothing_has_the_final_name(tmp_path, fault):
    with pytest.raises(fault):
        interrupted(tmp_path / "out", fault, lambda folder: (folder / "half").write_text("half"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.partial"]
    assert (tmp_path / "out.partial" / "half").exists()
    finish(tmp_path / "out")  # the same command starts over
    assert "half" not in tree(tmp_path / "out")


def test_partial_of_another_identity_is_left_alone(tmp_path):
    with pytest.raises(KeyboardInterrupt), Stage(tmp_path / "out", IDENTITY):
        raise KeyboardInterrupt
    before = tree(tmp_path)
    with pytest.raises(UserError, match='verb: "prune" there, "heal" now'), Stage(tmp_path / "out", {"verb": "heal"}):
        pytest.fail("entered")
    assert tree(tmp_path) == before


def test_fault_20_a_second_process_is_refused_and_told_who_holds_it(tmp_path):
    process = holder(tmp_path / "out", "sys.stdin.read()")
    try:
        with pytest.raises(UserError) as caught, Stage(tmp_path / "out", IDENTITY):
            pytest.fail("entered")
        assert str(process.pid) in str(caught.value)
        assert socket.gethostname() in str(caught.value)
        assert (tmp_path / "out.partial" / "half").exists()
    finally:
        process.communicate()
    assert process.returncode == 0
    assert Stage(tmp_path / "out", IDENTITY).done
    assert sorted(tree(tmp_path / "out")) == ["half", "stage.json"]


def test_the_same_process_cant_take_it_twice(tmp_path):
    with Stage(tmp_path / "out", IDENTITY), pytest.raises(UserError, match=str(os.getpid())):
        Stage(tmp_path / "out", IDENTITY).__enter__()
    assert Stage(tmp_path / "out", IDENTITY).done


def test_fault_19_a_killed_predecessor_is_taken_over(tmp_path):
    process = holder(tmp_path / "out", "os.kill(os.getpid(), signal.SIGKILL)")
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.partial", "out.partial.lock"]
    finish(tmp_path / "out")
    assert sorted(tree(tmp_path / "out")) == ["model/weights", "stage.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("left", [[], ["stage.json.new"]])
def test_a_predecessor_killed_in_its_first_moments_is_taken_over(tmp_path, left):
    (tmp_path / "out.partial").mkdir()
    for name in left:
        (tmp_path / "out.partial" / name).write_text('{"ide')
    finish(tmp_path / "out")


def test_a_parent_that_is_a_file_is_refused_before_work(tmp_path):
    (tmp_path / "parent").write_text("a file")
    with pytest.raises(UserError, match="can't be written"), Stage(tmp_path / "parent" / "out", IDENTITY):
        pytest.fail("entered")
    with pytest.raises(UserError, match="can't be written"), Stage(tmp_path / "parent" / "deep" / "out", IDENTITY):
        pytest.fail("entered")


def test_a_read_only_parent_is_refused_before_work(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("shearling.stage.os.open", refuse)  # root isn't held by permissions
    with pytest.raises(UserError, match="Permission denied"), Stage(tmp_path / "out", IDENTITY):
        pytest.fail("entered")


def test_a_lock_unlinked_in_between_is_tried_again(tmp_path, monkeypatch):
    flock, calls = fcntl.flock, []

    def flock_late(descriptor, operation):
        calls.append(descriptor)
        if len(calls) == 1:
            (tmp_path / "out.partial.lock").unlink()  # its holder has finished just now
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock_late)
    finish(tmp_path / "out")
    assert len(calls) == 2


def test_the_identity_is_on_the_disk_before_work_begins(tmp_path, monkeypatch):
    """Names last: of the folder in its parent, of the file in the folder."""
    synced, fsync = [], os.fsync

    def syncing(descriptor):
        fsync(descriptor)
        synced.append(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", syncing)
    with Stage(tmp_path / "out", IDENTITY) as folder:
        assert synced == [path.stat().st_ino for path in (folder / "stage.json", folder, tmp_path)]


def test_links_are_emptied_without_following_them(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("kept")
    with pytest.raises(KeyboardInterrupt):
        interrupted(
            tmp_path / "out", KeyboardInterrupt, lambda folder: (folder / "link").symlink_to(tmp_path / "precious")
        )
    finish(tmp_path / "out")
    assert (tmp_path / "precious" / "file").read_text() == "kept"


@pytest.mark.parametrize(
    ("error", "left"), [(KeyError("x"), True), (UserError("x", found="a", expected="b", change="c"), False)]
)
def test_what_leaves_nothing_to_go_on_from_leaves_nothing(tmp_path, error, left):
    def work():
        with Stage(tmp_path / "out", IDENTITY, discard=UserError) as folder:
            (folder / "half").write_text("done")
            raise error

    with pytest.raises(type(error)):
        work()
    assert (tmp_path / "out.partial" / "half").is_file() == left
    assert list(tmp_path.iterdir()) == ([tmp_path / "out.partial"] if left else [])
