import struct
from itertools import chain

import numpy as np
import pytest
from sources import documents_of, fault_of

from shearling.data import megatron
from shearling.data.documents import find_domains, parts

TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
# Documents of sequences of ids: most have one, as Megatron's own preprocessing writes them.
DOCUMENTS = [[[1, 2, 3]], [[4], [5, 6]], [], [[7, 8]], [[]], [[9]]]


def write(folder, documents, *, code=8, name="corpus_text_document"):
    """Writes an indexed dataset as Megatron's documentation describes it."""
    sequences = [np.array(ids, TYPES.get(code, "<f4")) for document in documents for ids in document]
    lengths = np.array([len(ids) for ids in sequences], "<i4")
    pointers = np.cumsum([0, *(ids.nbytes for ids in sequences)])[:-1].astype("<i8")
    firsts = np.cumsum([0, *(len(document) for document in documents)]).astype("<i8")
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(sequences), len(firsts))
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.idx").write_bytes(header + lengths.tobytes() + pointers.tobytes() + firsts.tobytes())
    (folder / f"{name}.bin").write_bytes(b"".join(ids.tobytes() for ids in sequences))
    return folder / f"{name}.bin"


@pytest.mark.parametrize("code", TYPES)
@pytest.mark.parametrize("part_bytes", [1, 4, 1 << 25])
def test_documents_of_any_type_and_any_parts(tmp_path, monkeypatch, code, part_bytes):
    monkeypatch.setattr(megatron, "PART_BYTES", part_bytes)
    path = write(tmp_path, DOCUMENTS, code=code)
    found = documents_of(path)
    assert [document.ids.tolist() for document in found] == [[*chain(*document)] for document in DOCUMENTS]
    assert found[1].where == f"{path}, document 2"
    assert len(parts(path)) == 1 if part_bytes > 100 else len(parts(path)) > 1


def test_the_pair_is_one_source_however_it_is_named(tmp_path):
    path = write(tmp_path / "code", DOCUMENTS)
    expected = (str(path),)
    assert find_domains([tmp_path / "code"])[0].train == expected
    for given in (path, path.with_suffix(".idx"), path.with_suffix("")):
        (domain,) = find_domains([given])
        assert (domain.name, domain.train) == ("corpus_text_document", expected)
    write(tmp_path / "split", DOCUMENTS, name="train_text_document")
    write(tmp_path / "split", DOCUMENTS, name="eval_text_document")
    (domain,) = find_domains([tmp_path / "split"])
    assert [len(domain.train), len(domain.eval)] == [1, 1]


def test_a_lone_index_is_refused(tmp_path):
    path = write(tmp_path, DOCUMENTS)
    path.unlink()
    found = fault_of(find_domains, [path.with_suffix(".idx")])
    assert "no corpus_text_document.bin beside it; expected the two files" in found


def test_every_truncation_is_seen(tmp_path):
    path = write(tmp_path, DOCUMENTS)
    index = path.with_suffix(".idx")
    for file in (path, index):
        whole = file.read_bytes()
        for length in range(len(whole)):
            file.write_bytes(whole[:length])
            found = fault_of(documents_of, path)
            assert str(file) in found
            assert "expected the whole .bin and .idx" in found
        file.write_bytes(whole)
    assert len(documents_of(path)) == len(DOCUMENTS)


@pytest.mark.parametrize(
    ("at", "raw", "words"),
    [
        (0, b"TNTIDX\0\0", ["starts with b'TNTIDX", "mmap format"]),
        (9, b"\x02", ["version 2", "expected version 1"]),
        (17, b"\x06", ["ids of type float64", "integers"]),
        (17, b"\x63", ["the code 99"]),
        (34, b"\xff\xff\xff\xff", ["negative length"]),
        (-8, b"\x63", ["after the last sequence"]),
        (-16, b"\x00", ["end before they start"]),
    ],
)
def test_an_index_that_makes_no_sense(tmp_path, at, raw, words):
    path = write(tmp_path, DOCUMENTS)
    index = bytearray(path.with_suffix(".idx").read_bytes())
    at %= len(index)
    index[at : at + len(raw)] = raw
    path.with_suffix(".idx").write_bytes(index)
    found = fault_of(documents_of, path)
    assert [word for word in words if word not in found] == []


def test_ids_can_t_be_conversations(tmp_path):
    found = fault_of(documents_of, write(tmp_path, DOCUMENTS), messages_column="messages")
    assert "found token ids; expected records with a column 'messages'" in found
