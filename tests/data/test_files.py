"""Sources behind fsspec: memory, and an S3 server of our own."""

import gzip
import json
import os

import fsspec
import pyarrow
import pytest
import zstandard
from moto.server import ThreadedMotoServer
from pyarrow import parquet as arrow_parquet
from sources import documents_of, fault_of, texts_of

from shearling.data import jsonl
from shearling.data.documents import Part, find_domains, parts, read
from shearling.data.files import place, without_secrets

KEY, SECRET = "AKIATESTTESTTESTTEST", "s3cret/s3cret/s3cret"


@pytest.fixture(scope="module")
def server():
    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(server, monkeypatch):
    """The URL of an empty bucket."""
    settings = {"AWS_ENDPOINT_URL": server, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
    for name, value in {**settings, "AWS_DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    filesystem = fsspec.filesystem("s3", skip_instance_cache=True)
    if filesystem.exists("bucket"):
        filesystem.rm("bucket", recursive=True)
    filesystem.mkdir("bucket")
    type(filesystem).clear_instance_cache()
    yield "s3://bucket"
    type(filesystem).clear_instance_cache()


@pytest.fixture
def memory():
    filesystem = fsspec.filesystem("memory")
    filesystem.rm("/", recursive=True) if filesystem.ls("/") else None
    return "memory://data"


@pytest.fixture(params=["memory", "s3", "file"])
def store(request, tmp_path):
    return f"file://{tmp_path}/data" if request.param == "file" else request.getfixturevalue(request.param)


def put(store, files):
    for name, raw in files.items():
        if store.startswith("file://"):
            os.makedirs(os.path.dirname(f"{store}/{name}".removeprefix("file://")), exist_ok=True)
        with fsspec.open(f"{store}/{name}", "wb") as file:
            file.write(raw)


def lines(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def table(texts):
    sink = pyarrow.BufferOutputStream()
    arrow_parquet.write_table(pyarrow.table({"text": texts}), sink, row_group_size=2)
    return sink.getvalue().to_pybytes()


def test_folders_of_folders_of_every_kind(store):
    put(
        store,
        {
            "code/x/y/a.py": b"a = 1\n",
            "code/b.py": b"b = 2\n",
            "code/.hidden": b"no",
            "web/train-0.jsonl.gz": gzip.compress(lines(["one", "two"])),
            "web/train-1.jsonl.zst": zstandard.compress(lines(["three"])),
            "web/eval.jsonl": lines(["four"]),
            "wiki/0.parquet": table(["a", "b", "c"]),
        },
    )
    found = {domain.name: domain for domain in find_domains([store])}
    read_all = {name: [texts_of(path) for path in domain.train] for name, domain in found.items()}
    assert read_all == {
        "code": [["b = 2\n"], ["a = 1\n"]],
        "web": [["one", "two"], ["three"]],
        "wiki": [["a", "b", "c"]],
    }
    assert [texts_of(path) for path in found["web"].eval] == [["four"]]
    assert [domain.name for domain in find_domains([f"{store}/wiki", f"{store}/web/eval.jsonl"])] == ["wiki", "eval"]


@pytest.mark.parametrize("part_bytes", [7, 100])
def test_ranges_of_a_large_file(store, monkeypatch, part_bytes):
    monkeypatch.setattr(jsonl, "PART_BYTES", part_bytes)
    texts = ["x" * length for length in (3, 200, 0, 40, 1)]
    put(store, {"a.jsonl": lines(texts)})
    path = f"{store}/a.jsonl"
    assert len(parts(path)) == -(-len(lines(texts)) // part_bytes)
    found = documents_of(path)
    assert [document.text for document in found] == texts
    assert found[0].where == f"{place(path)}, line 1 (byte 0)"
    assert found[4].where.startswith(f"{place(path)}, byte ")
    put(store, {"a.jsonl": lines(texts) + b"{"})
    offset = len(lines(texts))
    named = f"line 6 (byte {offset})" if store.startswith("file://") else f"byte {offset}"
    assert f"{place(path)}, {named}: found broken JSON" in fault_of(texts_of, path)


def test_what_isn_t_there_or_whole(store):
    put(store, {"a.jsonl.gz": gzip.compress(lines(["one"]))[:-3], "b.parquet": table(["a"])[:-3], "e/.x": b""})
    assert "gone: found no such file or folder" in fault_of(find_domains, [f"{store}/gone"])
    assert "a.jsonl.gz: found EOFError" in fault_of(texts_of, f"{store}/a.jsonl.gz")
    assert "b.parquet: found ArrowInvalid" in fault_of(texts_of, f"{store}/b.parquet")
    assert "domain 'e'" in fault_of(find_domains, [f"{store}/e"])
    assert "gone.jsonl: found FileNotFoundError" in fault_of(lambda: list(read(Part(f"{store}/gone.jsonl"))))


def test_megatron_and_saved_datasets_are_found_there(memory):
    put(memory, {"m/text.bin": b"\1\0\2\0", "m/text.idx": b"MMIDIDX\0\0"})
    assert find_domains([f"{memory}/m"])[0].train == (f"{memory}/m/text.bin",)
    assert "m/text.idx: found 9 bytes" in fault_of(parts, f"{memory}/m/text.bin")


def test_a_store_that_refuses_gives_no_secret_away(s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{KEY}:{SECRET.replace('/', '')}@127.0.0.1:9/?X-Amz-Signature=abc")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    type(fsspec.filesystem("s3")).clear_instance_cache()
    found = fault_of(find_domains, [f"{s3}/a.jsonl"])
    assert "check the address, your credentials and the network" in found
    assert not any(word in found for word in (KEY, SECRET, SECRET.replace("/", ""), "X-Amz-Signature"))


def test_secrets_are_taken_out_of_any_text(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "abcdefgh")
    monkeypatch.setenv("TOKENIZER_PATH", "failed")
    monkeypatch.setenv("MAX_TOKENS", "//host")
    monkeypatch.setitem(fsspec.config.conf, "s3", {"secret": "ijklmnop", "endpoint_url": "http://here"})
    text = "ftp://jo:pass@host/x failed, see https://host/a?sig=1&b=2 (abcdefgh, ijklmnop, http://here)"
    assert without_secrets(text) == "ftp://***@host/x failed, see https://host/a?*** (***, ***, http://here)"


def test_a_protocol_that_nothing_reads(monkeypatch):
    assert "Protocol not known: nowhere" in fault_of(find_domains, ["nowhere://bucket/a.jsonl"])

    def missing(url, **_):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    found = fault_of(find_domains, ["s3://bucket/a.jsonl"])
    assert "nothing installed that reads s3://" in found
    assert "pip install 'shearling[remote]'" in found
    assert "install the package that it names" in fault_of(find_domains, ["gs://bucket/a.jsonl"])


def test_an_address_that_a_store_can_t_take(s3):
    found = fault_of(lambda: list(read(Part("s3://bucket"))))
    assert "s3://bucket: found " in found
    assert "check the address" in found
