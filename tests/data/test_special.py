import numpy as np
import pytest
from stores import encoder_of
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from shearling.data.document import Document, of_ids
from shearling.data.special import encode_around, mark, unused_characters
from shearling.data.tokenise import load_tokenizer

FORGED = "the cat</s>sat on </s> the mat</s>"


def document(text):
    return Document(text, len(text.encode()), "a.jsonl, line 1")


def unigram(folder):
    """A tokenizer whose model has its special token as a word, the likeliest of all, and puts a space in front."""
    words = [("<unk>", 0.0), ("</s>", 0.0), *((character, -2.0) for character in "▁</s>abcdefghijklmnopqrt")]
    tokenizer = Tokenizer(models.Unigram(words, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    return folder


def test_a_special_token_spelt_out_in_a_text_ends_nothing(tokenizer_folder):
    encoder = encoder_of(load_tokenizer(tokenizer_folder), tokenizer_folder)
    (piece,) = encoder.pieces([document(FORGED)])
    assert piece.ids.tolist().count(encoder.pipeline.eos_id) == 1
    assert piece.ids[-1] == encoder.pipeline.eos_id
    assert encoder.tokenizer.decode(piece.ids[:-1]) == FORGED


def test_nor_where_the_model_has_it_as_a_word(tmp_path):
    folder = unigram(tmp_path / "tokenizer")
    encoder = encoder_of(load_tokenizer(folder), folder)
    assert encoder.pipeline.eos_id in encoder.tokenizer("a</s>", split_special_tokens=True)["input_ids"]
    (piece,) = encoder.pieces([document(FORGED)])
    assert piece.ids.tolist().count(encoder.pipeline.eos_id) == 1
    tokens = encoder.tokenizer.convert_ids_to_tokens(piece.ids[:-1])
    assert "".join(tokens) == "▁" + FORGED.replace(" ", "▁")


def test_a_text_without_any_is_encoded_as_ever(tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder)
    for text in ("the cat sat", " leading", "a\n\nb", "é 🐑"):
        assert encode_around(tokenizer, text) == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_marks_are_characters_that_no_string_holds():
    value = [{"content": "\U000f0000<s>\U000f0002", "tool_calls": [{"name": "x<s>"}], "n": 1}]
    first, second = unused_characters(value)
    assert (first, second) == ("\U000f0001", "\U000f0003")
    assert mark(value, ["<s>"], "[", "]") == [
        {"content": "\U000f0000[<s>]\U000f0002", "tool_calls": [{"name": "x[<s>]"}], "n": 1}
    ]


def test_the_longest_of_several_tokens_is_marked():
    assert mark("<s><s>x", ["<s>x", "<s>"], "[", "]") == "[<s>][<s>x]"


@pytest.mark.parametrize(("ids", "found"), [([1, 2], 3), ([1, 0], 2), ([], 0)])
def test_ids_that_end_with_eos_aren_t_ended_twice(tmp_path, ids, found):
    tokenizer = Tokenizer(models.WordLevel({"</s>": 0, "one": 1, "two": 2}))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(tmp_path)
    encoder = encoder_of(load_tokenizer(tmp_path), tmp_path)
    (piece,) = encoder.pieces([of_ids(np.array(ids, "<u2"), where="a.bin, document 1")])
    assert len(piece.ids) == found
    assert piece.ids.tolist()[-1:] == [0] * bool(found)
    assert piece.text_bytes == {0: 0, 2: 3, 3: 7}[found]
