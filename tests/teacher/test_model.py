import sys

import pytest
import torch
from small_models import small, tokens

from shearling.data.batch import Batch
from shearling.errors import UserError
from shearling.teacher.live import LiveTeacher
from shearling.teacher.model import Reader, check_same_tokens, default_dtype, kept_of, load_teacher


@pytest.fixture
def folder(tmp_path):
    made = small("llama", tied=True)
    made.model.save_pretrained(tmp_path)
    return tmp_path


def test_a_teacher_is_frozen(folder) -> None:
    model = load_teacher(folder, dtype=torch.bfloat16)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert next(load_teacher(folder).parameters()).dtype == torch.float32
    assert (default_dtype("cpu"), default_dtype("cuda:1")) == (torch.float32, torch.bfloat16)


def test_it_teaches_in_its_own_dtype_and_leaves_no_graph(folder) -> None:
    teacher, ids = LiveTeacher(load_teacher(folder), blocks=("model.layers.1",), channels=(0, 7)), tokens(40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lesson = teacher(Batch(ids, (0, 0)))
    assert lesson.streams[0].shape == (2, 16, 2)
    assert not lesson.streams[0].requires_grad
    with torch.inference_mode():
        expected = teacher.model(ids[:, :-1]).logits.flatten(0, 1)
    torch.testing.assert_close(lesson.taught.logits(slice(3, 9)), expected[3:9])


def test_int8_weights_need_torchao(folder, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(UserError, match=r"found no torchao; .*shearling\[int8\]"):
        load_teacher(folder, weights="int8")


def test_int8_weights(folder) -> None:
    """The tied embedding and head stay as they are; the rest is off by what eight bits are."""
    pytest.importorskip("torchao")
    ids = tokens(40)
    plain, small = (load_teacher(folder, weights=weights) for weights in ("as_is", "int8"))
    assert type(small.lm_head.weight) is type(plain.lm_head.weight)
    assert type(small.model.layers[0].mlp.up_proj.weight) is not type(plain.model.layers[0].mlp.up_proj.weight)
    assert not any(parameter.requires_grad for parameter in small.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        one, two = (LiveTeacher(model)(Batch(ids, (0, 0))).taught.logits(slice(None)) for model in (plain, small))
    assert float((one - two).norm() / one.norm()) < 0.05


def test_another_vocabulary_or_tokenizer_is_refused() -> None:
    student = Reader("cut", 100, "a" * 64)
    check_same_tokens(Reader("source", 100, "a" * 64), student)
    with pytest.raises(UserError) as caught:
        check_same_tokens(Reader("other", 128, "b" * 64), student)
    message = str(caught.value)
    assert "teacher other of cut: found 128 rows in the embedding; expected 100 rows in the embedding" in message
    assert "found the tokenizer bbbbbbbbbbbb; expected the tokenizer aaaaaaaaaaaa" in message


def test_hidden_states_are_compared_with_the_source_alone() -> None:
    origin = {"source": {"name": "big", "fingerprint": "f"}, "kept": {"hidden": []}}
    assert kept_of(origin, student="cut", teacher="big", fingerprint="f") == {"hidden": []}
    with pytest.raises(UserError, match="found one cut from big; expected a model cut from the teacher other"):
        kept_of(origin, student="cut", teacher="other", fingerprint="g")
    with pytest.raises(UserError, match=r"found no shearling\.json"):
        kept_of({}, student="cut", teacher="other", fingerprint="g")
