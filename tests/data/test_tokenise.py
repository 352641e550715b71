import json
import subprocess
import sys
from dataclasses import replace

import pytest
from stores import documents, message
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from shearling.data import tokenise
from shearling.data.documents import Document
from shearling.data.prepare import prepare
from shearling.data.store import Store
from shearling.data.tokenise import Encoder, Pipeline, fingerprint, load_tokenizer

TEXTS = [f"the cat {number} sat on the mat, café 🐑" for number in range(300)]


def word_tokenizer(folder, vocab, **special):
    tokenizer = Tokenizer(models.WordLevel(vocab))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def encoder_of(folder) -> Encoder:
    return Encoder(Pipeline.of(load_tokenizer(folder), folder=folder))


def test_documents_come_back_each_with_eos(tokenizer_folder, write_documents, out):
    tokenizer = load_tokenizer(tokenizer_folder)
    told = []
    store = prepare(
        [write_documents("wiki.jsonl", TEXTS)],
        tokenizer=tokenizer_folder,
        out=out,
        held_out=0.1,
        progress=lambda *counts: told.append(counts),
    )
    found = {split: documents(store, "wiki", split) for split in ("train", "eval")}
    assert all(ids[-1] == store.eos_id == tokenizer.eos_token_id for split in found.values() for ids in split)
    decoded = {split: [tokenizer.decode(ids[:-1]) for ids in found[split]] for split in found}
    assert sorted(decoded["train"] + decoded["eval"]) == sorted(TEXTS)
    assert 10 < len(decoded["eval"]) < 60
    for split, texts in decoded.items():
        assert store.text_bytes("wiki", split) == len("".join(texts).encode())
    assert store.fingerprint == fingerprint(tokenizer)
    assert store.manifest.tokenizer.source == str(tokenizer_folder)
    assert (store.vocab_size, store.dtype) == (len(tokenizer), "uint16")
    assert told[-1] == ("wiki", 300, sum(store.num_tokens("wiki", split) for split in found))
    store.verify()


def test_the_same_again_and_another_seed(tokenizer_folder, write_documents, tmp_path):
    path = write_documents("wiki.jsonl", TEXTS)
    manifests = []
    for name, seed in [("a", 0), ("b", 0), ("c", 1)]:
        (tmp_path / name).mkdir()
        prepare([path], tokenizer=tokenizer_folder, out=tmp_path / name, seed=seed, held_out=0.1)
        manifests.append((tmp_path / name / "manifest.json").read_bytes())
    assert manifests[0] == manifests[1]
    assert json.loads(manifests[0])["domains"] != json.loads(manifests[2])["domains"]


def test_batches_change_nothing(tokenizer_folder, write_documents, tmp_path, monkeypatch):
    path = write_documents("wiki.jsonl", TEXTS)
    manifests = []
    for name, size in [("a", 512), ("b", 1), ("c", 7)]:
        monkeypatch.setattr(tokenise, "BATCH_DOCUMENTS", size)
        (tmp_path / name).mkdir()
        manifests.append(prepare([path], tokenizer=tokenizer_folder, out=tmp_path / name).manifest)
    assert manifests[0] == manifests[1] == manifests[2]


def test_splits_of_the_inputs_are_kept_and_empty_documents_counted(tokenizer_folder, write_documents, out, tmp_path):
    write_documents("in/wiki/train.jsonl", ["the cat", "", "the mat", ""])
    write_documents("in/wiki/eval.jsonl", ["", "a dog"])
    write_documents("in/code/a.jsonl", ["", "def f(x)", "return x"])
    store = prepare([tmp_path / "in"], tokenizer=tokenizer_folder, out=out)
    assert store.domains == ("code", "wiki")
    counts = {
        (domain, split): (getattr(entry, split).documents, getattr(entry, split).skipped)
        for domain, entry in store.manifest.domains.items()
        for split in ("train", "eval")
    }
    assert counts == {("wiki", "train"): (2, 2), ("wiki", "eval"): (1, 1), ("code", "train"): (1, 1)} | {
        ("code", "eval"): (1, 0)
    }
    assert Store.open(out).text_bytes("wiki", "eval") == 5


def test_a_single_document_is_cut_on_a_token(tokenizer_folder, tmp_path, out):
    text = "the sheep was shorn, café 🐑 " * 40
    (tmp_path / "book.txt").write_text(text)
    store = prepare([tmp_path / "book.txt"], tokenizer=tokenizer_folder, out=out, held_out=0.1)
    tokenizer = load_tokenizer(tokenizer_folder)
    (train,), (held,) = (documents(store, "book", split) for split in ("train", "eval"))
    assert train + held == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert len(held) == -(-len(train + held) // 10)
    sizes = [store.text_bytes("book", split) for split in ("train", "eval")]
    assert sum(sizes) == len(text.encode())
    assert abs(sizes[1] - len(tokenizer.decode(held[:-1]).encode())) <= 3


def test_text_as_long_as_the_tokenizer_s_limits_is_neither_cut_nor_warned_of(tokenizer_folder, tmp_path, out):
    folder = tmp_path / "limited"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder, model_max_length=4)
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.save_pretrained(folder)
    (tmp_path / "book.txt").write_text("the cat sat on the mat " * 50)
    store = prepare([tmp_path / "book.txt"], tokenizer=folder, out=out)
    assert store.num_tokens("book", "train") > 100


def test_a_vocabulary_past_65535_is_uint32(write_documents, tmp_path, out):
    vocab = {f"w{number}": number for number in range(70_000)} | {"</s>": 70_000}
    folder = word_tokenizer(tmp_path / "tokenizer", vocab, eos_token="</s>")
    path = write_documents("wide.jsonl", ["w69999 w65536 w1"] * 3)
    store = prepare([path], tokenizer=folder, out=out)
    assert (store.dtype, store.vocab_size, store.eos_id) == ("uint32", 70_001, 70_000)
    assert store.window("wide", "train", 0, 3).tolist() == [69_999, 65_536, 1, 70_000]


def test_a_vocabulary_with_holes_is_as_large_as_its_top_id(tmp_path):
    folder = word_tokenizer(tmp_path / "tokenizer", {"a": 0, "</s>": 70_000}, eos_token="</s>")
    assert Pipeline.of(load_tokenizer(folder), folder=folder).vocab_size == 70_001


# What is refused


@pytest.mark.parametrize("share", [0, 1, -0.1, float("nan")])
def test_a_share_outside_0_and_1(tokenizer_folder, tmp_path, share):
    found = message(prepare, [], tokenizer=tokenizer_folder, out=tmp_path, held_out=share)
    assert f"held_out: found {share}; expected a share between 0 and 1" in found


@pytest.mark.parametrize(
    ("files", "parts"),
    [
        ({"d/a.jsonl": ["", ""]}, ["domain 'd'", "no documents with text for train (2 empty ones)", "add text"]),
        ({"d/train.jsonl": ["the cat"], "d/eval.jsonl": []}, ["domain 'd'", "for eval (0 empty ones)"]),
        ({"d/a.jsonl": ["a"]}, ["a.jsonl, line 1 (byte 0)", "a domain of 2 tokens; expected 4 or more"]),
    ],
)
def test_a_domain_without_text_to_train_on_or_hold_out(tokenizer_folder, write_documents, tmp_path, out, files, parts):
    for name, texts in files.items():
        write_documents(name, texts)
    found = message(prepare, [tmp_path / "d"], tokenizer=tokenizer_folder, out=out)
    assert [part for part in parts if part not in found] == []


def test_folders_that_hold_no_tokenizer(tmp_path, tokenizer_folder):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    found = message(load_tokenizer, tmp_path)
    assert f"tokenizer of {tmp_path}: found no vocabulary file; expected one of tokenizer.json" in found
    assert "found no such folder" in message(load_tokenizer, tmp_path / "gone")
    (tmp_path / "tokenizer.json").write_text("{broken")
    found = message(load_tokenizer, tmp_path)
    assert "expected a tokenizer that transformers loads" in found
    assert "copy the tokenizer files of the model there" in found


def test_code_of_a_folder_isn_t_run(tmp_path, tokenizer_folder):
    canary = tmp_path / "canary"
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_folder / "tokenizer.json").read_bytes())
    (tmp_path / "evil.py").write_text(f"open({str(canary)!r}, 'w')")
    settings = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    found = message(load_tokenizer, tmp_path)
    assert "custom code" in found
    assert "\n" not in found
    assert not canary.exists()


def test_no_eos_names_the_file_to_mend(tmp_path, write_documents, out):
    folder = word_tokenizer(tmp_path / "tokenizer", {"a": 0})
    found = message(prepare, [write_documents("d.jsonl", ["a"])], tokenizer=folder, out=out)
    assert f"tokenizer of {folder}: found no end-of-sequence token" in found
    assert f"set eos_token in {folder / 'tokenizer_config.json'}" in found


class PanicException(BaseException):
    """As pyo3 raises for a panic in Rust: not an Exception."""


class FailsOn:
    """A tokenizer that raises for texts with some words in them."""

    def __init__(self, words: str, error: BaseException):
        self.words, self.error = words, error

    def encode_batch_fast(self, texts, **kwargs):
        if any(self.words in text for text in texts):
            raise self.error
        return [type("Encoding", (), {"ids": [1, 2]}) for _ in texts]


def test_a_panic_names_the_document(tokenizer_folder, write_documents, out, monkeypatch):
    path = write_documents("d.jsonl", [f"the mat {number}" for number in range(9)])
    monkeypatch.setattr(Encoder, "backend", FailsOn("mat 7", PanicException("index out of bounds")))
    found = message(prepare, [path], tokenizer=tokenizer_folder, out=out)
    assert f"{path}, line 8 (byte " in found
    assert "text that the tokenizer fails on (PanicException: index out of bounds)" in found


def test_a_panic_while_loading(tokenizer_folder, monkeypatch):
    def panic(*args, **kwargs):
        raise PanicException("called `Option::unwrap()` on a `None` value")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", panic)
    assert f"tokenizer of {tokenizer_folder}: found PanicException" in message(load_tokenizer, tokenizer_folder)


def test_an_interrupt_stays_one(tokenizer_folder, write_documents, out, monkeypatch):
    monkeypatch.setattr(Encoder, "backend", FailsOn("a", KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        prepare([write_documents("d.jsonl", ["a", "b"])], tokenizer=tokenizer_folder, out=out)


def test_a_word_that_the_vocabulary_lacks_names_the_document(tmp_path, write_documents, out):
    folder = word_tokenizer(tmp_path / "tokenizer", {"a": 0, "</s>": 1}, eos_token="</s>")
    path = write_documents("d.jsonl", ["a a a", "a b"])
    found = message(prepare, [path], tokenizer=folder, out=out)
    assert f"{path}, line 2 (byte 18)" in found
    assert "the tokenizer fails on" in found


def test_an_id_past_the_vocabulary(tokenizer_folder):
    pipeline = Pipeline.of(load_tokenizer(tokenizer_folder), folder=tokenizer_folder)
    encoder = Encoder(replace(pipeline, vocab_size=50))
    found = message(list, encoder.pieces([Document("the cat", 7, "a.jsonl, line 1")]))
    assert "a.jsonl, line 1: found token id " in found
    assert "expected ids below 50" in found


# The fingerprint


def test_the_fingerprint_is_of_the_tokenizer_as_loaded(tmp_path):
    vocab = {"a": 0, "b": 1, "</s>": 2}
    first = load_tokenizer(word_tokenizer(tmp_path / "a", vocab, eos_token="</s>"))
    same = load_tokenizer(word_tokenizer(tmp_path / "b", dict(reversed(vocab.items())), eos_token="</s>"))
    swapped = load_tokenizer(word_tokenizer(tmp_path / "c", {"a": 1, "b": 0, "</s>": 2}, eos_token="</s>"))
    other_end = load_tokenizer(word_tokenizer(tmp_path / "d", vocab, eos_token="b"))
    assert len(first) == len(swapped)
    assert fingerprint(first) == fingerprint(same)
    assert len({fingerprint(one) for one in (first, swapped, other_end)}) == 3
    before = fingerprint(first)
    first(["a b"], truncation=True, max_length=1)
    assert fingerprint(first) == before


def test_the_room_loads_transformers_only_when_asked():
    code = (
        "import sys, shearling.data.tokenise, shearling.data.sampler; print({'torch', 'transformers'} & {*sys.modules})"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"
