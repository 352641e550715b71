import json
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import documents, message, write_store

from shearling.data.store import Store, span

SHARDS = [[[1, 2, 3, 0], [4, 0]], [[5, 6, 7, 8, 9, 0]]]
FLAT = [token for shard in SHARDS for ids in shard for token in ids]


def build(folder, *, vocab_size=100, train=SHARDS, held=(((70, 0),),), losses=None):
    return write_store(folder, {"wiki": {"train": train, "eval": held}}, vocab_size=vocab_size, losses=losses)


def edit(folder, change):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def first_shard(manifest):
    return manifest["domains"]["wiki"]["train"]["shards"][0]


def test_what_is_written_is_read(tmp_path):
    store = Store.open(build(tmp_path / "s"))
    assert (store.domains, store.vocab_size, store.eos_id, store.dtype) == (("wiki",), 100, 0, "uint16")
    assert store.slice("wiki", "train").tolist() == FLAT
    assert store.offsets("wiki", "train").tolist() == [0, 4, 6, 12]
    assert store.offsets("wiki", "train").dtype == np.uint64
    assert (store.num_tokens("wiki", "train"), store.num_documents("wiki", "train")) == (12, 3)
    assert store.text_bytes("wiki", "train") == 30
    assert documents(store, "wiki", "train") == [[1, 2, 3, 0], [4, 0], [5, 6, 7, 8, 9, 0]]
    assert (tmp_path / "s/wiki/train-00000.tokens").stat().st_size == 12
    assert store.verify() == 6


@settings(max_examples=25)
@given(
    st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=5),
    st.integers(1, 7),
    st.data(),
)
def test_windows_and_slices_cross_shards(tmp_path_factory, lengths, seq_len, data):
    ids = iter(range(300))
    shards = [[[next(ids) for _ in range(length)] for length in shard] for shard in lengths]
    flat = list(chain(*chain(*shards)))
    store = Store.open(build(tmp_path_factory.mktemp("s"), vocab_size=300, train=shards))
    assert store.offsets("wiki", "train").tolist() == np.cumsum([0, *map(len, chain(*shards))]).tolist()
    start = data.draw(st.integers(0, len(flat)))
    stop = data.draw(st.integers(start, len(flat)))
    assert store.slice("wiki", "train", start, stop).tolist() == flat[start:stop]
    assert store.window_count("wiki", "train", seq_len) == (len(flat) - 1) // seq_len
    for index in range(store.window_count("wiki", "train", seq_len)):
        assert store.window("wiki", "train", index, seq_len).tolist() == flat[span(index, seq_len)]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_535, "uint16"), (65_536, "uint16"), (65_537, "uint32")])
def test_the_narrowest_dtype_that_holds_every_id(tmp_path, vocab_size, dtype):
    top = vocab_size - 1
    store = Store.open(build(tmp_path / "s", vocab_size=vocab_size, train=[[[top, 0]]]))
    assert store.slice("wiki", "train").dtype == dtype
    assert store.window("wiki", "train", 0, 1).tolist() == [top, 0]
    assert store.window("wiki", "train", 0, 1).dtype == np.int64


@pytest.mark.parametrize(("seq_len", "count"), [(1, 11), (2, 5), (3, 3), (5, 2), (11, 1), (12, 0), (100, 0)])
def test_windows_overlap_by_one_and_the_rest_is_dropped(tmp_path, seq_len, count):
    store = Store.open(build(tmp_path / "s"))
    assert store.window_count("wiki", "train", seq_len) == count
    for index in range(count):
        window = store.window("wiki", "train", index, seq_len)
        assert window.tolist() == FLAT[index * seq_len : index * seq_len + seq_len + 1]
        assert len(window) == seq_len + 1


def test_a_loss_mask_counts_every_token_where_none_was_given(tmp_path):
    assert Store.open(build(tmp_path / "plain")).loss_mask("wiki", "train") is None
    masks = {(0, 1): [0, 1]}  # of the first shard's second document alone
    store = Store.open(build(tmp_path / "s", losses=masks))
    store.verify()
    assert (tmp_path / "s/wiki/train-00000.loss").read_bytes() == bytes([1, 1, 1, 1, 0, 1])
    assert not (tmp_path / "s/wiki/train-00001.loss").exists()
    assert store.loss_mask("wiki", "train").tolist() == [1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1]
    assert store.loss_mask("wiki", "train", 3, 8).tolist() == [1, 0, 1, 1, 1]
    assert store.loss_mask("wiki", "eval") is None
    (tmp_path / "s/wiki/train-00000.loss").write_bytes(b"\0")
    assert "train-00000.loss: found 1 bytes; expected 6 bytes" in message(Store.open, tmp_path / "s")


@pytest.mark.parametrize("size", [0, 11, 13])
def test_a_file_of_another_size_is_named(tmp_path, size):
    folder = build(tmp_path / "s")
    (folder / "wiki/train-00000.tokens").write_bytes(bytes(size))
    found = message(Store.open, folder)
    assert f"{folder / 'wiki/train-00000.tokens'}: found {size} bytes; expected 12 bytes; prepare the data" in found


def test_a_file_cut_after_the_store_was_opened(tmp_path):
    store = Store.open(build(tmp_path / "s"))
    (tmp_path / "s/wiki/train-00001.tokens").write_bytes(bytes(4))
    found = message(store.window, "wiki", "train", 2, 3)
    assert "train-00001.tokens: found 4 bytes; expected at least 8 bytes" in found


def test_all_missing_files_are_named_at_once(tmp_path):
    folder = build(tmp_path / "s")
    (folder / "wiki/train-00001.tokens").unlink()
    (folder / "wiki/eval-00000.offsets").unlink()
    found = message(Store.open, folder)
    assert "train-00001.tokens: found no such file; expected 12 bytes" in found
    assert "eval-00000.offsets: found no such file; expected 16 bytes" in found


@pytest.mark.parametrize("name", ["train-00000.tokens", "train-00001.offsets", "eval-00000.tokens"])
def test_every_flipped_bit_is_found_by_its_sum(tmp_path, name):
    folder = build(tmp_path / "s")
    whole = (folder / "wiki" / name).read_bytes()
    for at in range(len(whole)):
        raw = bytearray(whole)
        raw[at] ^= 1 << at % 8
        (folder / "wiki" / name).write_bytes(raw)
        assert f"{folder / 'wiki' / name}: found sha256 " in message(Store.open(folder).verify)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda m: m.update(version=1), ["found shearling-store version 1", "expected shearling-store version 2"]),
        (lambda m: m.update(version=1), ["prepare the data again, or point at a token store"]),
        (lambda m: m.update(format="mds"), ["found mds version 2"]),
        (lambda m: m.update(dtype="int64"), ["dtype: Input should be 'uint16' or 'uint32'"]),
        (lambda m: m.update(vocab_size=70_000), ["vocab_size within dtype"]),
        (lambda m: m.update(eos_id=100), ["eos_id must be below vocab_size"]),
        (lambda m: m.update(extra=1), ["extra: Extra inputs are not permitted"]),
        (lambda m: m.pop("seed"), ["seed: Field required"]),
        (lambda m: m.update(domains={}), ["domains: "]),
        (lambda m: m["domains"]["wiki"]["train"].update(shards=[]), ["domains.wiki.train.shards: "]),
        (lambda m: first_shard(m).update(tokens=0), ["domains.wiki.train.shards.0.tokens: "]),
        (lambda m: first_shard(m)["sums"].pop("offsets"), ["train.shards.0", "tokens, offsets and at most loss"]),
        (lambda m: first_shard(m)["sums"].update({"../x": ""}), ["train.shards.0", "at most loss"]),
        (lambda m: first_shard(m).update(name="../train-00000"), ["train.shards.0.name: "]),
        (lambda m: m["domains"].update({"../up": m["domains"]["wiki"]}), ["domain name '../up'", "rename it"]),
        (lambda m: m["domains"].update({"a/b": m["domains"]["wiki"]}), ["domain name 'a/b'"]),
        (lambda m: m["domains"].update({".git": m["domains"]["wiki"]}), ["domain name '.git'"]),
    ],
)
def test_a_manifest_that_is_none_of_ours_is_refused(tmp_path, change, parts):
    folder = build(tmp_path / "s")
    edit(folder, change)
    found = message(Store.open, folder)
    assert [part for part in [str(folder / "manifest.json"), *parts] if part not in found] == []


@pytest.mark.parametrize(
    ("raw", "part"),
    [
        (None, "found no such file; expected a token store"),
        (b"{", "broken JSON"),
        (b"\xff", "broken JSON"),
        (b"[" * 100_000, "broken JSON"),
        (b"[]", "found list version None"),
    ],
)
def test_a_missing_or_broken_manifest(tmp_path, raw, part):
    if raw is not None:
        (tmp_path / "manifest.json").write_bytes(raw)
    found = message(Store.open, tmp_path)
    assert f"{tmp_path / 'manifest.json'}: " in found
    assert part in found
    assert "point at a token store" in found


def test_another_tokenizer_and_another_domain_are_refused(tmp_path):
    store = Store.open(build(tmp_path / "s"))
    store.check_tokenizer("f" * 64, "the model")
    found = message(store.check_tokenizer, "0" * 64, "the model models/x")
    assert f"token store {tmp_path / 's'}: found tokens made with the tokenizer 'tiny' (ffffffffffff)" in found
    assert "expected the tokenizer of the model models/x (000000000000)" in found
    assert "did you mean 'wiki'" in message(store.slice, "wikis", "train")
