import gzip
import json
import tracemalloc
from itertools import pairwise

import pytest
from sources import documents_of, fault_of, texts_of

from shearling.data import jsonl, records
from shearling.data.documents import Part, Reading, parts, read
from shearling.errors import UserError

RECORDS = [{"text": "é" * length, "n": length} for length in (0, 1, 40, 3, 200, 7, 7, 0, 31)]


def write(path, records, end="\n"):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + end for record in records))
    return path


@pytest.mark.parametrize("part_bytes", [1, 2, 13, 64, 100, 1 << 20])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n"])
def test_parts_hold_every_line_once_and_in_order(tmp_path, monkeypatch, part_bytes, end):
    monkeypatch.setattr(jsonl, "PART_BYTES", part_bytes)
    path = write(tmp_path / "a.jsonl", RECORDS, end)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    found = parts(path)
    assert (found[0].start, found[-1].end) == (0, path.stat().st_size)
    assert all(before.end == after.start for before, after in pairwise(found))
    assert texts_of(path) == [record["text"] for record in RECORDS]


def test_a_file_that_can_t_be_cut_is_one_part(tmp_path):
    (tmp_path / "empty.jsonl").write_bytes(b"")
    assert [(part.start, part.end) for part in parts(tmp_path / "empty.jsonl")] == [(0, None)]
    assert [(part.start, part.end) for part in parts(tmp_path / "a.jsonl.gz")] == [(0, None)]
    assert texts_of(tmp_path / "empty.jsonl") == []


def test_a_fault_in_a_later_part_names_line_and_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "PART_BYTES", 50)
    path = write(tmp_path / "a.jsonl", RECORDS)
    good = path.read_bytes()
    path.write_bytes(good + b'{"text": 7}\n')
    assert f"{path}, line {len(RECORDS) + 1} (byte {len(good)}): found a 'text' of type int" in fault_of(texts_of, path)
    whole = [document.where for document in documents_of(write(path, RECORDS))]
    assert whole[0] == f"{path}, line 1 (byte 0)"
    assert whole[-1].startswith(f"{path}, byte ")


def test_broken_records_are_passed_over_only_when_asked_and_told(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [
        b'{"text": "x"}',
        b"{",
        b"[]",
        b'{"text": "\xff"}',
        b'{"body": 1}',
        b'{"text": "\\ud800"}',
        b'{"text": "y"}',
    ]
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(UserError):
        texts_of(path)
    told = []
    found = list(read(Part(path), reading=Reading(skip_broken=True), broken=told.append))
    assert [document.text for document in found] == ["x", "y"]
    assert [str(error).partition(" (byte")[0] for error in told] == [f"{path}, line {n}" for n in range(2, 7)]


@pytest.mark.parametrize("name", ["a.json", "a.JSON", "a.json.gz"])
def test_a_json_file_is_json_lines(tmp_path, name):
    raw = b'\xef\xbb\xbf\n{"text": "x"}\n{"text": "y"}\n'
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    assert texts_of(tmp_path / name) == ["x", "y"]


def test_a_json_file_of_two_objects_is_json_lines_too(tmp_path):
    (tmp_path / "a.json").write_text('{"content": "x"}\n{"content": "y"}\n')
    assert "no 'text' among the keys (content)" in fault_of(texts_of, tmp_path / "a.json")
    assert texts_of(tmp_path / "a.json", text_column="content") == ["x", "y"]


@pytest.mark.parametrize("raw", ['[{"text": "x"}]', '\n [\n{"text": "x"}\n]'])
def test_a_list_of_documents_is_refused_whatever_is_passed_over(tmp_path, raw):
    (tmp_path / "a.json").write_text(raw)
    found = fault_of(lambda path: parts(path, reading=Reading(skip_broken=True)), tmp_path / "a.json")
    assert "a.json: found a list with 'text' in it; expected JSON lines, an object in each line" in found


def test_a_long_list_is_not_read_to_its_end(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text("[" + '{"text": "x"}, ' * 100_000)
    monkeypatch.setattr(records, "lines", lambda chunks: (pytest.fail("read on") for _ in chunks))
    assert "jq -c '.[]'" in fault_of(parts, tmp_path / "a.json")


def test_the_column_can_be_chosen(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "no", "body": "yes"}])
    assert texts_of(path, text_column="body") == ["yes"]
    assert "no 'content' among the keys (text, body)" in fault_of(texts_of, path, text_column="content")


def test_memory_is_bounded_by_the_longest_line(tmp_path):
    path = tmp_path / "a.jsonl"
    size = 8 << 20
    with open(path, "w") as file:
        for _ in range(4):
            file.write('{"text": "' + "x" * size + '"}\n')
    tracemalloc.start()
    try:
        assert [document.num_bytes for document in read(Part(path))] == [size] * 4
        assert tracemalloc.get_traced_memory()[1] < 6.5 * size
    finally:
        tracemalloc.stop()


def test_loss_on_the_assistant_needs_conversations():
    assert "no messages column" in fault_of(Reading, assistant_loss_only=True)
    assert "found int31; expected one of uint8" in fault_of(Reading, tokens_dtype="int31")
