import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
from stores import documents
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from shearling.data import long_text, tokenise
from shearling.data.documents import Document
from shearling.data.long_text import encode_long
from shearling.data.prepare import prepare
from shearling.data.store import Store
from shearling.data.tokenise import Encoder, Pipeline, load_tokenizer

WORDS = ["sheep", "wool", "x = 1", "\n\n", "\n    return", "café", "🐑🐑", "don't", "12345", "   ", "shorn.", "日本語"]


def text_of(words: int, *, between=" ") -> str:
    draw = random.Random(0)
    return between.join(draw.choices(WORDS, k=words))


def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([text_of(300)], trainer)
    return tokenizer


def llama_2():
    """BPE over the whole text at once, with a space put before it and bytes for what is unknown."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator(text_of(300).split("shorn."), trainer)
    return tokenizer


def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=150, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator([text_of(300)], trainer)
    return tokenizer


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(long_text, "PIECE_CHARS", 400)
    monkeypatch.setattr(long_text, "OVERLAP_TOKENS", 60)


@pytest.mark.parametrize("make", [byte_level, llama_2, unigram])
@pytest.mark.parametrize("between", [" ", ""])
def test_piece_by_piece_gives_what_the_whole_gives(small_pieces, make, between):
    tokenizer, text, asked = make(), text_of(3000, between=between), []

    def encode(piece):
        asked.append(len(piece))
        return tokenizer.encode(piece, add_special_tokens=False)

    found, whole = encode_long(encode, text), tokenizer.encode(text, add_special_tokens=False)
    assert found[:, 0].tolist() == whole.ids
    assert [tuple(row) for row in found[:, 1:].tolist()] == whole.offsets
    assert max(asked) <= 4 * 400  # long tokens make for longer pieces


def test_one_word_without_an_end(small_pieces):
    tokenizer = byte_level()
    text = "a" * 10_000
    found = encode_long(lambda piece: tokenizer.encode(piece, add_special_tokens=False), text)
    assert tokenizer.encode(text, add_special_tokens=False).ids == found[:, 0].tolist()


def test_a_token_longer_than_a_piece(small_pieces):
    tokenizer = Tokenizer(models.WordLevel({"x": 0, "<unk>": 1}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    text = "x " * 200 + "y" * 5_000 + " x" * 200
    found = encode_long(lambda piece: tokenizer.encode(piece, add_special_tokens=False), text)
    assert found[:, 0].tolist() == [0] * 200 + [1] + [0] * 200


def test_a_long_document_of_a_store(tokenizer_folder, write_documents, tmp_path, small_pieces, monkeypatch):
    texts = [text_of(500), "the cat", text_of(900)]
    path = write_documents("d.jsonl", texts)
    (tmp_path / "whole").mkdir()
    whole = prepare([path], tokenizer=tokenizer_folder, out=tmp_path / "whole")
    monkeypatch.setattr(tokenise, "LONG_BYTES", 1000)
    (tmp_path / "pieces").mkdir()
    pieces = prepare([path], tokenizer=tokenizer_folder, out=tmp_path / "pieces")
    assert documents(pieces, "d", "train") == documents(whole, "d", "train")
    assert pieces.digest == whole.digest


def test_nothing_but_what_was_asked_for_is_held(tokenizer_folder, small_pieces):
    encoder = Encoder(Pipeline.of(load_tokenizer(tokenizer_folder), folder=tokenizer_folder))
    document = Document(text_of(400), 0, "here")
    ids = encoder.backend.encode(document.text, add_special_tokens=False).ids
    assert np.array_equal(encode_long(encoder.backend.encode, document.text)[:, 0], ids)


MEASURE = """
import resource, sys
from pathlib import Path
from shearling.data.prepare import prepare

def peak_bytes(name):
    out = Path(sys.argv[1], name + "-out")
    out.mkdir()
    prepare([Path(sys.argv[1], name + ".jsonl")], tokenizer=Path(sys.argv[2]), out=out, processes=1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

before = peak_bytes("small")
print(peak_bytes("large") - before)
"""


@pytest.mark.slow
def test_a_line_of_50_megabytes_takes_at_most_eight_times_its_length(tmp_path):
    words = [f"{number:064}" for number in range(50)]
    tokenizer = Tokenizer(models.WordLevel({**{word: id for id, word in enumerate(words)}, "</s>": 50}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = tmp_path / "tokenizer"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    line, count = " ".join(words), 50_000_000 // (65 * len(words))
    for name, times in (("small", 1), ("large", count)):
        texts = [" ".join([line] * times), line]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    measured = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path, folder], env=env, capture_output=True, text=True, check=True
    )
    assert int(measured.stdout) < 8 * 50_000_000
    store = Store.open(tmp_path / "large-out")
    tokens = sum(store.num_tokens("large", split) for split in ("train", "eval"))
    assert tokens == (count + 1) * len(words) + 2
