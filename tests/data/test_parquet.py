import builtins

import pyarrow
import pytest
from pyarrow import parquet as arrow_parquet
from sources import documents_of, fault_of, texts_of

from shearling.data import parquet
from shearling.data.documents import Part, Reading, find_domains, parts, read

TEXTS = [f"text {number} é" for number in range(1000)]


def write(path, columns, **settings):
    arrow_parquet.write_table(pyarrow.table(columns), path, **settings)
    return path


@pytest.mark.parametrize(
    "kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), "string")]
)
@pytest.mark.parametrize("part_bytes", [1, 9000, 1 << 25])
def test_rows_in_order_whatever_the_parts(tmp_path, monkeypatch, kind, part_bytes):
    monkeypatch.setattr(parquet, "PART_BYTES", part_bytes)
    path = write(tmp_path / "a.parquet", {"id": range(1000), "text": pyarrow.array(TEXTS, kind)}, row_group_size=90)
    found = documents_of(path)
    assert [document.text for document in found] == TEXTS
    assert [document.where for document in found] == [f"{path}, row {row}" for row in range(1, 1001)]
    ranges = [(part.start, part.end) for part in parts(path)]
    assert (ranges[0][0], ranges[-1][1]) == (0, 12)
    assert len(ranges) == 12 if part_bytes == 1 else len(ranges) <= 12


def test_parquet_files_are_splits_and_an_empty_table_has_no_documents(tmp_path):
    for name in ("train-0", "eval-0"):
        write(tmp_path / f"{name}.parquet", {"text": pyarrow.array([], pyarrow.string())})
    (domain,) = find_domains([tmp_path])
    assert [len(files) for files in (domain.train, domain.eval)] == [1, 1]
    assert texts_of(domain.train[0]) == []


def test_a_missing_column_names_those_there_are(tmp_path):
    path = write(tmp_path / "a.parquet", {"id": [1], "content": ["x"]})
    found = fault_of(parts, path)
    assert f"{path}: found no column 'text' among id, content; expected a column 'text'" in found
    assert "--text-column" in found
    assert texts_of(path, text_column="content") == ["x"]
    assert "--messages-column" in fault_of(parts, path, reading=Reading(messages_column="chat"))


@pytest.mark.parametrize(
    ("column", "words"),
    [
        (pyarrow.array(["x", None]), "row 2: found a 'text' of type NoneType"),
        (pyarrow.array([1, 2]), "row 1: found a 'text' of type int"),
        (pyarrow.array([b"x", b"y"], pyarrow.binary()), "row 1: found a 'text' of type bytes"),
        (
            pyarrow.array([b"x", b"ab\xff"], pyarrow.binary()).view(pyarrow.string()),
            "row 2: found byte 0xff at byte 2 of the text, which is not UTF-8",
        ),
    ],
)
def test_a_row_without_text(tmp_path, column, words):
    path = write(tmp_path / "a.parquet", {"text": column})
    assert words in fault_of(texts_of, path)
    told = []
    list(read(Part(path), reading=Reading(skip_broken=True), broken=told.append))
    assert words in str(told[0])


def test_a_file_that_isn_t_whole(tmp_path):
    path = write(tmp_path / "a.parquet", {"text": TEXTS})
    whole = path.read_bytes()
    for length in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert f"{path}: found " in fault_of(texts_of, path)
        assert "expected a whole Parquet file" in fault_of(texts_of, path)
    path.write_bytes(b"PAR1" + bytes(1500) + whole[1504:])  # the footer is whole, the pages are not
    assert "expected a whole Parquet file" in fault_of(texts_of, path)


def test_a_conversation_s_missing_fields_aren_t_part_of_it(tmp_path):
    chat = [[{"role": "user", "content": "hi", "name": "jo"}, {"role": "assistant", "content": "hello", "name": None}]]
    (document,) = documents_of(write(tmp_path / "a.parquet", {"chat": chat}), messages_column="chat")
    assert document.messages == [chat[0][0], {"role": "assistant", "content": "hello"}]


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", {"text": TEXTS})
    importing = builtins.__import__

    def refuse(name, *args):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return importing(name, *args)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert "pip install 'shearling[parquet]'" in fault_of(parts, path)
