"""Loading a teacher, and whether it can teach: a frozen model whose tokens are the student's."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shearling.errors import UserError, raise_all
from shearling.teacher.options import Weights
from shearling.weights.model import load_model


@dataclass(frozen=True)
class Reader:
    """What a model makes tokens of: rows of its embedding, and its tokenizer. `name` is what the user called it."""

    name: str
    vocab_size: int
    tokenizer_fingerprint: str


def check_same_tokens(teacher: Reader, student: Reader) -> None:
    """Raises UserError unless both models' ids mean the same, so that their distributions can be compared."""
    what = f"teacher {teacher.name} of {student.name}"
    change = "take the model that the student was cut from as its teacher, or another with its tokenizer"
    errors = []
    if teacher.vocab_size != student.vocab_size:
        found, expected = (f"{reader.vocab_size} rows in the embedding" for reader in (teacher, student))
        errors.append(UserError(what, found=found, expected=expected, change=change))
    if teacher.tokenizer_fingerprint != student.tokenizer_fingerprint:
        found, expected = (f"the tokenizer {reader.tokenizer_fingerprint[:12]}" for reader in (teacher, student))
        errors.append(UserError(what, found=found, expected=expected, change=change))
    raise_all(errors)


def kept_of(origin: Mapping[str, Any], *, student: str, teacher: str, fingerprint: str) -> Mapping[str, Any]:
    """The indices `student` kept of `teacher`, from its shearling.json. Raises UserError if it isn't cut from it."""
    cut_from = origin.get("source", {})
    if "kept" in origin and cut_from.get("fingerprint") == fingerprint:
        return origin["kept"]
    found = f"one cut from {cut_from['name']}" if "name" in cut_from else "no shearling.json that says where it is from"
    raise UserError(
        f"hidden states of {student}",
        found=found,
        expected=f"a model cut from the teacher {teacher}",
        change="give that model as the teacher, or leave the hidden-state term out",
    )


def default_dtype(device: str) -> torch.dtype:
    """bf16, but fp32 on a CPU: without bf16 units its products were measured to run at half the speed."""
    return torch.float32 if device.startswith("cpu") else torch.bfloat16


def load_teacher(
    folder: Path, *, device: str = "cpu", dtype: torch.dtype | None = None, weights: Weights = "as_is"
) -> Any:
    """The model in a folder, for inference alone: in evaluation mode, nothing in it asks for gradients.

    "int8" keeps the weights of its linears, the head's apart, as int8 with a scale for each row (torchao).
    """
    model = load_model(folder, dtype=dtype or default_dtype(device), device=device)
    model.requires_grad_(False)
    if weights == "int8":
        _to_int8(model)
    return model


def _to_int8(model: Any) -> None:
    try:
        from torchao.quantization import (  # pyright: ignore[reportMissingImports]
            Int8WeightOnlyConfig,
            quantize_,
        )
    except ImportError as error:
        raise UserError(
            "a teacher with int8 weights",
            found="no torchao",
            expected="torchao, which makes and multiplies them",
            change='pip install "shearling[int8]", or leave the teacher\'s weights as they are',
        ) from error
    head = model.get_output_embeddings()  # its product is taken by the chunk, and p shows each of its errors
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda m, path: isinstance(m, nn.Linear) and m is not head)
