"""Stores read in place: from memory://, file:// and a real S3 server on this machine."""

import hashlib
import subprocess
import sys
import threading

import fsspec
import numpy as np
import pytest
from stores import message, write_store

from shearling.data import store_files
from shearling.data.store import Store
from shearling.data.store_files import Recent, RemoteFiles

WIKI = np.random.default_rng(0).integers(0, 300, (3, 40, 50))  # shards of documents


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    held = [[[7, 8, 9, 0]]]
    shards = {"train": WIKI.tolist(), "eval": held}
    return write_store(tmp_path_factory.mktemp("local") / "store", {"wiki": shards, "code": shards})


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(store_files, "BLOCK_BYTES", 512)
    monkeypatch.setattr(store_files, "CACHE_BYTES", 2048)


@pytest.fixture
def in_memory(folder):
    system = fsspec.filesystem("memory")
    system.put(str(folder), "/bucket/store", recursive=True)
    yield "memory://bucket/store"
    system.rm("/bucket", recursive=True)


@pytest.fixture(scope="module")
def s3(folder, tmp_path_factory):
    """The address of the store in a bucket, with the environment that leads there."""
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "a")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "b")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem.clear_instance_cache()
        system = fsspec.filesystem("s3")
        system.mkdir("flock")
        system.put(str(folder), "flock/store", recursive=True)
        yield "s3://flock/store"
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def assert_alike(local: Store, remote: Store) -> None:
    assert (remote.digest, remote.domains) == (local.digest, local.domains)
    assert remote.offsets("code", "train").tolist() == local.offsets("code", "train").tolist()
    assert remote.slice("wiki", "train").tolist() == WIKI.flatten().tolist()
    count = local.window_count("wiki", "train", 33)
    for index in np.random.default_rng(0).permutation(count).tolist():
        assert remote.window("wiki", "train", index, 33).tolist() == local.window("wiki", "train", index, 33).tolist()
    assert remote.verify() == local.verify()


@pytest.mark.parametrize("kind", ["memory", "file", "s3"])
def test_a_store_from_afar_reads_as_one_here(request, folder, small_blocks, kind):
    address = f"file://{folder}" if kind == "file" else request.getfixturevalue({"memory": "in_memory"}.get(kind, kind))
    assert_alike(Store.open(folder), Store.open(address))


def test_windows_are_ranges_and_what_is_kept_is_bounded(in_memory, small_blocks, monkeypatch):
    asked, held = [], []
    real = RemoteFiles._range
    store = Store.open(in_memory)
    blocks = store._files._blocks

    def ranged(self, name, start, end):
        asked.append(end - start)
        held.append(blocks.held)
        return real(self, name, start, end)

    monkeypatch.setattr(RemoteFiles, "_range", ranged)
    store.window("wiki", "train", 3, 33)
    store.window("wiki", "train", 3, 33)
    assert len(asked) <= 2  # a block, or two where the window lies across
    for index in range(store.window_count("wiki", "train", 33)):
        store.window("wiki", "train", index, 33)
    assert set(asked) <= {512, 4000 % 512}
    assert len(asked) <= 24 + 3
    assert max(held) <= 2048
    assert 0 < blocks.held <= 2048


def test_many_threads_read_what_one_reads(s3, folder, small_blocks):
    local, remote, wrong = Store.open(folder), Store.open(s3), []

    def read(seed):
        for index in np.random.default_rng(seed).integers(0, local.window_count("wiki", "train", 20), 20).tolist():
            if (remote.window("wiki", "train", index, 20) != local.window("wiki", "train", index, 20)).any():
                wrong.append(index)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_what_is_recent_stays():
    made, recent = [], Recent(10)

    def get(key):
        return recent.get(key, lambda: made.append(key) or key, cost=4)

    for key in "abacab":
        assert get(key) == key
    assert made == ["a", "b", "c", "b"]  # c pushed b out, as a was asked for again
    assert recent.held == 8


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            "manifest.json",
            "manifest.json: found no such file; expected a token store; prepare the data again, or point",
        ),
        ("wiki/train-00001.tokens", "wiki/train-00001.tokens: found no such file; expected 4000 bytes"),
    ],
)
def test_a_file_that_is_missing_afar_is_named(in_memory, change, told):
    fsspec.filesystem("memory").rm(f"/bucket/store/{change}")
    assert f"{in_memory}/{told}" in message(Store.open, in_memory)


def test_a_file_cut_or_changed_afar(in_memory):
    system, path = fsspec.filesystem("memory"), "/bucket/store/wiki/train-00001.tokens"
    whole = system.cat_file(path)
    system.pipe_file(path, whole[:-2])
    assert f"{in_memory}/wiki/train-00001.tokens: found 3998 bytes; expected 4000" in message(Store.open, in_memory)
    system.pipe_file(path, b"\1" + whole[1:])
    found = message(Store.open(in_memory).verify)
    assert f"{in_memory}/wiki/train-00001.tokens: found sha256 " in found
    assert hashlib.sha256(whole).hexdigest() in found
    system.pipe_file(path, whole)
    store = Store.open(in_memory)
    system.pipe_file(path, whole[:100])
    assert "wiki/train-00001.tokens: found 100 bytes; expected at least" in message(store.slice, "wiki", "train")
    system.rm(path)
    assert "train-00001.tokens: found it can't be read (FileNotFoundError" in message(store.slice, "wiki", "train")


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("s3://nobody/store", "s3://nobody/store/manifest.json: found "),
        ("wool://flock/store", "wool://flock/store: found Protocol not known: wool; expected a store"),
    ],
)
def test_an_address_that_leads_nowhere(s3, address, told):
    assert told in message(Store.open, address)


def test_no_way_there_is_told_with_the_address(monkeypatch, in_memory):
    def refuse(*_, **__):
        raise ConnectionError(111, "Connection refused")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "cat_file", refuse)
    found = message(Store.open, in_memory)
    assert f"{in_memory}/manifest.json: found ConnectionError: [Errno 111] Connection refused" in found
    assert "check the address, your credentials and the network" in found


def test_fsspec_is_loaded_only_for_an_address(folder):
    code = f"import sys\nfrom shearling.data.store import Store\nStore.open({str(folder)!r}).verify()\n"
    code += "print({'fsspec', 's3fs'} & {*sys.modules})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"


def test_no_password_of_an_address_is_told(in_memory):
    found = message(Store.open, "memory://user:secret@bucket/gone")
    assert "memory://***@bucket/gone/manifest.json: found no such file" in found
