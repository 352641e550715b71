import json
import math
from datetime import datetime, timedelta

import pytest

from shearling.errors import UserError
from shearling.record import Record, read, versions


def test_events_come_back_in_order(tmp_path):
    record = Record(tmp_path / "record.jsonl")
    record.write("start", seed=3, shape={"hidden": 8, "heads": (2, 4)})
    record.write("step", loss=0.1, text="naïve\n√")
    events = read(tmp_path / "record.jsonl")
    assert [event["event"] for event in events] == ["start", "step"]
    assert events[0]["shape"] == {"hidden": 8, "heads": [2, 4]}
    assert events[1]["loss"] == 0.1
    assert events[1]["text"] == "naïve\n√"


def test_a_line_starts_with_the_event_and_has_utc_time(tmp_path):
    Record(tmp_path / "r").write("end")
    line = (tmp_path / "r").read_text()
    assert line.startswith('{"event": "end", "time": "')
    assert json.loads(line).keys() == {"event", "time"}
    assert datetime.fromisoformat(json.loads(line)["time"]).utcoffset() == timedelta(0)


def test_non_finite_numbers_are_strings(tmp_path):
    Record(tmp_path / "r").write("step", loss=math.nan, nested=[math.inf, {"low": -math.inf}])
    (event,) = read(tmp_path / "r")
    assert event["loss"] == "nan"
    assert event["nested"] == ["inf", {"low": "-inf"}]
    json.loads((tmp_path / "r").read_text(), parse_constant=pytest.fail)


def test_opening_again_appends(tmp_path):
    Record(tmp_path / "r").write("one")
    Record(tmp_path / "r").write("two")
    assert [event["event"] for event in read(tmp_path / "r")] == ["one", "two"]


@pytest.mark.parametrize("torn", ['{"event": "hal', "x" * 10_000])
@pytest.mark.parametrize("before", [0, 1, 200])
def test_a_line_torn_by_a_kill_is_dropped(tmp_path, torn, before):
    record = Record(tmp_path / "r")
    for step in range(before):
        record.write("step", step=step)
    with open(tmp_path / "r", "a") as file:
        file.write(torn)
    assert len(read(tmp_path / "r")) == before
    Record(tmp_path / "r").write("after")
    assert [event["event"] for event in read(tmp_path / "r")] == ["step"] * before + ["after"]


def test_a_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
    record = Record(tmp_path / "r")
    record.write("one")
    with monkeypatch.context() as patch, open(tmp_path / "r", "ab", buffering=0) as real:
        patch.setattr("builtins.open", lambda *args, **kwargs: _FullDisk(real))
        with pytest.raises(UserError, match=r"record .*/r: found No space left on device; expected room for its lines"):
            record.write("two")
    record.write("three")
    assert [event["event"] for event in read(tmp_path / "r")] == ["one", "three"]


def test_cut_forgets_what_came_later(tmp_path):
    record = Record(tmp_path / "r")
    record.write("one")
    nbytes = record.nbytes
    record.write("two")
    record.cut(nbytes)
    record.write("three")
    assert [event["event"] for event in read(tmp_path / "r")] == ["one", "three"]


@pytest.mark.parametrize("left", [0, 1])
def test_a_record_that_lost_lines_keeps_the_others_and_says_so(tmp_path, caplog, left):
    record = Record(tmp_path / "r")
    for _ in range(left):
        record.write("one")
    found = record.nbytes
    with caplog.at_level("WARNING"):
        record.cut(found + 1000)
    record.write("after")
    events = read(tmp_path / "r")
    assert [event["event"] for event in events] == ["one"] * left + ["record_cut_short", "after"]
    assert (events[left]["found_bytes"], events[left]["expected_bytes"]) == (found, found + 1000)
    assert f"has lost lines: {found} bytes of {found + 1000} are there" in caplog.text


class _FullDisk:
    """Takes ten bytes of a write, and then nothing."""

    def __init__(self, file):
        self.file, self.full = file, False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def write(self, content):
        if self.full:
            raise OSError(28, "No space left on device")
        self.full = True
        return self.file.write(content[:10])

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_the_record_sets_its_own_fields(tmp_path):
    with pytest.raises(AssertionError):
        Record(tmp_path / "r").write("end", time=3)


def test_a_broken_line_is_named(tmp_path):
    (tmp_path / "r").write_text('{"event": "one"}\n{"event"\n{"event": "three"}\n')
    with pytest.raises(UserError, match="line 2"):
        read(tmp_path / "r")


def test_a_missing_record_or_folder_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read(tmp_path / "absent")
    with pytest.raises(UserError, match="a folder that exists"):
        Record(tmp_path / "absent" / "record.jsonl")


def test_versions_name_what_results_depend_on():
    found = versions()
    assert {"python", "platform", "shearling", "torch", "transformers"} <= found.keys()
    assert all(isinstance(version, str) for version in found.values())
