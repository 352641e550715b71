import hashlib
import json
import pickle

import numpy as np
import pytest

from shearling.data.store import DomainEntry, Manifest, SplitWriter, Store, TokenizerEntry, dtype_for, span
from shearling.errors import UserError

DOCUMENTS = {"train": [[1, 2, 3, 0], [4, 0], [5, 6, 7, 8, 9, 0]], "eval": [[70, 0]]}
FLAT = [token for ids in DOCUMENTS["train"] for token in ids]


def build(folder, *, vocab_size=100, documents=DOCUMENTS, domains=("wiki",)):
    folder.mkdir(exist_ok=True)
    entries = {}
    for domain in domains:
        splits = {}
        for split, texts in documents.items():
            with SplitWriter(folder, domain=domain, split=split, dtype=dtype_for(vocab_size)) as writer:
                for ids in texts:
                    writer.add(np.array(ids), text_bytes=10)
            splits[split] = writer.entry()
        entries[domain] = DomainEntry(**splits)
    tokenizer = TokenizerEntry(fingerprint="f" * 64, name="tiny")
    Manifest(
        dtype=dtype_for(vocab_size),
        vocab_size=vocab_size,
        eos_id=0,
        tokenizer=tokenizer,
        seed=0,
        held_out=0.01,
        domains=entries,
    ).write(folder)
    return folder


def edit(folder, change):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def message(function, *args) -> str:
    with pytest.raises(UserError) as caught:
        function(*args)
    return str(caught.value)


def test_what_is_written_is_read(tmp_path):
    store = Store.open(build(tmp_path / "s"))
    assert (store.domains, store.vocab_size, store.eos_id, store.dtype) == (("wiki",), 100, 0, "uint16")
    assert store.tokens("wiki", "train").tolist() == FLAT
    assert store.offsets("wiki", "train").tolist() == [0, 4, 6, 12]
    assert store.offsets("wiki", "train").dtype == np.uint64
    assert store.text_bytes("wiki", "train") == 30
    assert (tmp_path / "s/wiki/train.tokens").stat().st_size == 24
    assert store.manifest["domains"]["wiki"]["train"]["documents"] == 3
    store.verify()
    assert pickle.loads(pickle.dumps(store)).tokens("wiki", "eval").tolist() == [70, 0]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_535, "uint16"), (65_536, "uint16"), (65_537, "uint32")])
def test_the_narrowest_dtype_that_holds_every_id(tmp_path, vocab_size, dtype):
    top = vocab_size - 1
    store = Store.open(build(tmp_path / "s", vocab_size=vocab_size, documents={"train": [[top, 0]], "eval": [[top]]}))
    assert store.tokens("wiki", "train").dtype == dtype
    assert store.window("wiki", "train", 0, 1).tolist() == [top, 0]


@pytest.mark.parametrize(("seq_len", "count"), [(1, 11), (2, 5), (3, 3), (5, 2), (11, 1), (12, 0), (100, 0)])
def test_windows_overlap_by_one_and_the_rest_is_dropped(tmp_path, seq_len, count):
    store = Store.open(build(tmp_path / "s"))
    assert store.window_count("wiki", "train", seq_len) == count
    for index in range(count):
        window = store.window("wiki", "train", index, seq_len)
        assert window.dtype == np.int64
        assert window.tolist() == FLAT[index * seq_len : index * seq_len + seq_len + 1]
        assert len(window) == seq_len + 1


def test_a_loss_mask_is_read_where_the_manifest_lists_it(tmp_path):
    folder = build(tmp_path / "s")
    assert Store.open(folder).loss_mask("wiki", "train") is None
    mask = np.arange(12, dtype="u1") % 2
    mask.tofile(folder / "wiki/train.loss")
    digest = hashlib.sha256(mask.tobytes()).hexdigest()
    edit(folder, lambda manifest: manifest["domains"]["wiki"]["train"]["files"].update({"train.loss": digest}))
    store = Store.open(folder)
    store.verify()
    assert store.loss_mask("wiki", "train")[span(1, 3)].tolist() == [1, 0, 1, 0]
    (folder / "wiki/train.loss").write_bytes(b"\0")
    assert "train.loss: found 1 bytes; expected 12 bytes" in message(Store.open, folder)


@pytest.mark.parametrize("size", [0, 23, 25])
def test_a_file_of_another_size_is_named(tmp_path, size):
    folder = build(tmp_path / "s")
    (folder / "wiki/train.tokens").write_bytes(bytes(size))
    found = message(Store.open, folder)
    assert f"{folder / 'wiki/train.tokens'}: found {size} bytes; expected 24 bytes; prepare the data again" in found


def test_all_missing_files_are_named_at_once(tmp_path):
    folder = build(tmp_path / "s")
    (folder / "wiki/train.tokens").unlink()
    (folder / "wiki/eval.offsets").unlink()
    found = message(Store.open, folder)
    assert "train.tokens: found no such file; expected 24 bytes" in found
    assert "eval.offsets: found no such file; expected 16 bytes" in found


@pytest.mark.parametrize("name", ["train.tokens", "train.offsets", "eval.tokens", "eval.offsets"])
def test_every_flipped_bit_is_found_by_its_sum(tmp_path, name):
    folder = build(tmp_path / "s")
    whole = (folder / "wiki" / name).read_bytes()
    for at in range(len(whole)):
        raw = bytearray(whole)
        raw[at] ^= 1 << at % 8
        (folder / "wiki" / name).write_bytes(raw)
        found = message(Store.open(folder).verify)
        assert f"{folder / 'wiki' / name}: found sha256 " in found
        assert hashlib.sha256(whole).hexdigest() in found


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda m: m.update(version=2), ["found shearling-store version 2", "expected shearling-store version 1"]),
        (lambda m: m.update(format="mds"), ["found mds version 1"]),
        (lambda m: m.update(dtype="int64"), ["dtype: Input should be 'uint16' or 'uint32'"]),
        (lambda m: m.update(vocab_size=70_000), ["vocab_size within dtype"]),
        (lambda m: m.update(eos_id=100), ["eos_id must be below vocab_size"]),
        (lambda m: m.update(extra=1), ["extra: Extra inputs are not permitted"]),
        (lambda m: m.pop("seed"), ["seed: Field required"]),
        (lambda m: m.update(domains={}), ["domains: "]),
        (lambda m: m["domains"]["wiki"]["train"].update(tokens=0), ["domains.wiki.train.tokens: "]),
        (
            lambda m: m["domains"]["wiki"]["train"]["files"].pop("train.offsets"),
            ["'wiki', train", "files train.tokens"],
        ),
        (lambda m: m["domains"]["wiki"]["train"]["files"].update({"../x": ""}), ["the files ", "../x"]),
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
    assert "did you mean 'wiki'" in message(store.tokens, "wikis", "train")
