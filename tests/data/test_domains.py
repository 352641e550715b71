"""All kinds of sources beside one another, through to a store."""

import json

import datasets
import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from sources import fault_of

from shearling.data.documents import find_domains
from shearling.data.prepare import prepare
from shearling.data.tokenise import load_tokenizer

TEXTS = ["the cat sat", "on the mat</s>", "a dog ran after"]


@pytest.fixture
def inputs(tmp_path, tokenizer_folder):
    """The same documents of text in every format, of ids in Megatron's."""
    tokenizer = load_tokenizer(tokenizer_folder)
    encoded = [tokenizer(text, split_special_tokens=True)["input_ids"] for text in TEXTS]
    ids = [np.array([*ids, tokenizer.eos_token_id], "<u2") for ids in encoded]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "table.parquet")
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved")
    (tmp_path / "mega.bin").write_bytes(b"".join(map(bytes, ids)))
    lengths = np.array([len(document) for document in ids], "<i4")
    counts = np.array([len(ids), len(ids) + 1], "<u8").tobytes()
    starts = np.cumsum([0, *lengths[:-1]]).astype("<i8") * 2
    header = b"MMIDIDX\0\0" + np.uint64(1).tobytes() + b"\x08" + counts
    tables = lengths.tobytes() + starts.tobytes() + np.arange(len(ids) + 1, dtype="<i8").tobytes()
    (tmp_path / "mega.idx").write_bytes(header + tables)
    return [tmp_path / name for name in ("lines.jsonl", "table.parquet", "saved", "mega")]


def test_the_same_documents_give_the_same_store(tmp_path, tokenizer_folder, inputs):
    (tmp_path / "out").mkdir()
    store = prepare(inputs, tokenizer=tokenizer_folder, out=tmp_path / "out", held_out=0.3)
    found = {}
    for domain in ("lines", "table", "saved", "mega"):
        both = np.concatenate([store.slice(domain, split) for split in ("train", "eval")])
        found[domain] = sorted(np.split(both, np.flatnonzero(both == store.eos_id) + 1), key=lambda ids: ids.tolist())
        sizes = [store.text_bytes(domain, split) for split in ("train", "eval")]
        assert sum(sizes) == sum(map(len, TEXTS))
    for other in ("table", "saved", "mega"):
        assert all(map(np.array_equal, found["lines"], found[other]))


def test_one_name_for_two_kinds_is_refused(tmp_path, inputs):
    (tmp_path / "lines.txt").write_text("x")
    found = fault_of(find_domains, [*inputs, str(tmp_path / "lines.txt")])
    assert f"domain 'lines': found two inputs of that name, {tmp_path}/lines.jsonl and {tmp_path}/lines.txt" in found


def test_ids_of_another_vocabulary_are_refused(tmp_path, tokenizer_folder, inputs):
    (tmp_path / "out").mkdir()
    (tmp_path / "mega.bin").write_bytes(b"\xff" * (tmp_path / "mega.bin").stat().st_size)
    found = fault_of(prepare, inputs[3:], tokenizer=tokenizer_folder, out=tmp_path / "out")
    assert f"{tmp_path}/mega.bin, document 1: found token id 65535; expected ids below" in found
