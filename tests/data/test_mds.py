import json

import numpy as np
import pytest
import zstandard
from sources import documents_of, fault_of, texts_of

from shearling.data.documents import find_domains, parts

IDS = [[1, 2, 3], [4], [70, 80]]


def write(folder, columns, records, *, compression=None, shard_records=2):
    """Writes shards as the format is described: `columns` are encodings, `records` lists of encoded values."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = [8 if encoding == "int" else None for encoding in columns.values()]
    head = {"column_names": list(columns), "column_encodings": list(columns.values()), "column_sizes": sizes}
    head |= {"version": 2, "format": "mds", "compression": compression, "hashes": [], "size_limit": 1 << 26}
    shards = []
    for number, start in enumerate(range(0, len(records), shard_records)):
        bodies = [
            b"".join(np.uint32(len(value)).tobytes() for value, size in zip(record, sizes, strict=True) if size is None)
            + b"".join(record)
            for record in records[start : start + shard_records]
        ]
        settings = json.dumps(head).encode()
        first = 4 + 4 * (len(bodies) + 1) + len(settings)
        offsets = np.cumsum([first, *map(len, bodies)]).astype("<u4")
        raw = np.uint32(len(bodies)).tobytes() + offsets.tobytes() + settings + b"".join(bodies)
        name = f"shard.{number:05d}.mds"
        shard = {**head, "samples": len(bodies), "raw_data": {"basename": name, "bytes": len(raw), "hashes": {}}}
        if compression:
            raw = zstandard.compress(raw)
            name += ".zstd"
            shard["zip_data"] = {"basename": name, "bytes": len(raw), "hashes": {}}
        else:
            shard["zip_data"] = None
        (folder / name).write_bytes(raw)
        shards.append(shard)
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": shards}))
    return folder / "index.json"


def shape(ids, *, dtype):
    return bytes([1 << 2, len(ids)]) + np.array(ids, dtype).tobytes()


ENCODINGS = {
    "bytes": lambda ids: np.array(ids, "<i8").tobytes(),
    "ndarray": lambda ids: bytes([32]) + shape(ids, dtype="<u4"),
    "ndarray:uint16": lambda ids: shape(ids, dtype="<u2"),
    "ndarray:int32": lambda ids: bytes([(1 << 2) | 2]) + np.uint32(len(ids)).tobytes() + np.array(ids, "<i4").tobytes(),
}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("compression", [None, "zstd:7"])
def test_ids_in_every_encoding(tmp_path, encoding, compression):
    columns = {"id": "int", "set": "str", "tokens": encoding}
    records = [[np.int64(1).tobytes(), "é".encode(), ENCODINGS[encoding](ids)] for ids in IDS]
    path = write(tmp_path / "web", columns, records, compression=compression)
    found = documents_of(path)
    assert [document.ids.tolist() for document in found] == IDS
    assert found[2].where.endswith("shard.00001.mds" + (".zstd, record 1" if compression else ", record 1"))
    assert len(parts(path)) == 2


def test_a_fixed_shape(tmp_path):
    path = write(tmp_path, {"tokens": "ndarray:int32:3"}, [[np.array(ids, "<i4").tobytes()] for ids in ([1, 2, 3],)])
    assert documents_of(path)[0].ids.tolist() == [1, 2, 3]


def test_the_type_of_bytes_is_said(tmp_path):
    path = write(tmp_path, {"tokens": "bytes"}, [[np.array(ids * 4, "<u2").tobytes()] for ids in IDS])
    assert [document.ids.tolist() for document in documents_of(path, tokens_dtype="uint16")] == [ids * 4 for ids in IDS]
    found = fault_of(documents_of, path)
    assert "when read as int64; expected token ids" in found
    assert "--tokens-dtype" in found
    path = write(tmp_path, {"tokens": "bytes"}, [[b"123"]])
    assert "3 bytes in 'tokens' that are no ids" in fault_of(documents_of, path)


def test_text_by_its_column(tmp_path):
    path = write(tmp_path, {"url": "str", "text": "str"}, [[b"u", text.encode()] for text in ("one", "é", "")])
    assert texts_of(path) == ["one", "é", ""]
    assert texts_of(path, text_column="url") == ["u"] * 3
    assert "no column 'body' among url, text" in fault_of(documents_of, path, text_column="body")
    write(tmp_path, {"text": "str"}, [[b"\xff"]])
    assert "record 1: found byte 0xff at byte 0 of the text" in fault_of(documents_of, path)


def test_a_folder_of_shards_is_a_domain_alone_or_among_others(tmp_path):
    write(tmp_path / "all/web", {"text": "str"}, [[b"x"]])
    write(tmp_path / "all/split/train", {"text": "str"}, [[b"x"]])
    write(tmp_path / "all/split/eval", {"text": "str"}, [[b"x"]])
    (tmp_path / "all/code").mkdir()
    (tmp_path / "all/code/index.json").write_text('{"shards": 1}')
    found = {domain.name: (domain.train, domain.eval) for domain in find_domains([tmp_path / "all"])}
    folder = tmp_path / "all"
    assert found == {
        "code": ((f"{folder}/code/index.json",), ()),
        "split": ((f"{folder}/split/train/index.json",), (f"{folder}/split/eval/index.json",)),
        "web": ((f"{folder}/web/index.json",), ()),
    }
    assert texts_of(f"{folder}/code/index.json") == ['{"shards": 1}']
    assert find_domains([tmp_path / "all/web"])[0].name == "web"


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_every_truncation_names_the_shard(tmp_path, compression):
    path = write(tmp_path, {"text": "str"}, [[b"one"], [b"two"]], compression=compression)
    (shard,) = tmp_path.glob("shard*")
    whole = shard.read_bytes()
    for length in range(len(whole)):
        shard.write_bytes(whole[:length])
        assert f"{shard}: found " in fault_of(documents_of, path)
    shard.write_bytes(whole + b"x")
    assert f"{shard}: found " in fault_of(documents_of, path)
    shard.unlink()
    assert shard.name in fault_of(documents_of, path)


def test_pickles_are_refused_without_being_read(tmp_path):
    path = write(tmp_path, {"text": "str", "meta": "pkl"}, [[b"one", b"cos\nsystem\n(S'touch canary'\ntR."]])
    found = fault_of(parts, path)
    assert "the column 'meta' pickled (encoding 'pkl')" in found
    assert "without running code" in found


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 1}, "versions"),
        ({"column_encodings": ["jpeg"]}, "the column 'text' encoded as 'jpeg'"),
        ({"samples": 7}, "2 records, where index.json names 7"),
    ],
)
def test_an_index_that_doesn_t_fit(tmp_path, change, words):
    path = write(tmp_path, {"text": "str"}, [[b"one"], [b"two"]])
    index = json.loads(path.read_text())
    index["shards"][0] |= change
    path.write_text(json.dumps(index))
    assert words in fault_of(documents_of, path)


def test_an_index_without_what_a_shard_needs(tmp_path):
    path = write(tmp_path, {"text": "str"}, [[b"one"]])
    index = json.loads(path.read_text())
    del index["shards"][0]["column_sizes"]
    path.write_text(json.dumps(index))
    assert "index.json: found a shard without column_sizes" in fault_of(parts, path)
