"""A model folder as a transformers model, and a model's weights as a folder."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shearling.axes.disk import Piece, pieces
from shearling.axes.shape import Shape
from shearling.axes.spec import Family
from shearling.axes.table import Tensor as Row
from shearling.errors import UserError
from shearling.weights.checkpoint import check_finite
from shearling.weights.writer import Entry, write

DTYPE_CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


def load_model(folder: Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """The causal model in a local folder, in evaluation mode, dropout off whatever its config says.

    Raises UserError for weights that aren't finite and for tensors that are missing or left over.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    for key in config.to_dict():
        if key.endswith(("dropout", "pdrop")) and isinstance(getattr(config, key), float):
            setattr(config, key, 0.0)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=dtype, local_files_only=True, output_loading_info=True
    )
    model, report = loaded
    stray = sorted([*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]])
    if stray:
        raise UserError(
            f"model {folder}",
            found=f"{len(stray)} tensors missing or left over: {', '.join(map(str, stray[:5]))}",
            expected="exactly the tensors that its config calls for",
            change="get config and weights that belong together",
        )
    for name, parameter in model.named_parameters():
        check_finite(name, parameter)
    return model.eval().to(device)


def reader(model: Any) -> Callable[[Row, int | None], Tensor]:
    """Reads a table's rows from a model in memory."""
    state = dict(model.named_parameters())
    return lambda row, layer: state[row.at(layer)].detach().cpu()


def assembled(found: Sequence[tuple[Piece, Tensor]], shape: tuple[int, ...]) -> Tensor:
    """A row of this shape from its pieces in files."""
    first = found[0][1]
    if len(found) == 1 and tuple(first.shape) == shape:
        return first
    whole = torch.empty(shape, dtype=first.dtype)
    for piece, weight in found:
        whole[piece.where] = weight.to(whole.dtype)
    return whole


def save_model(
    folder: Path,
    *,
    family: Family,
    config: Mapping[str, Any],
    shape: Shape,
    dtype: torch.dtype,
    tensor: Callable[[Row, int | None], Tensor],
) -> None:
    """Writes config.json and the weights of a family's model, tensor by tensor, under their names on disk."""
    sizes = shape.axes
    placed = {p.name: (p, row, layer) for row, layer in family.named(config) for p in pieces(row, layer, sizes)}
    entries = [Entry(name, DTYPE_CODES[dtype], piece.shape) for name, (piece, _, _) in placed.items()]
    last: list[Any] = [None, None]  # a row in many pieces is made once

    def piece_of(name: str) -> Tensor:
        piece, row, layer = placed[name]
        if last[0] != (row, layer):
            last[:] = [(row, layer), tensor(row, layer).to(dtype)]
        return last[1][piece.where].contiguous()

    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write(folder, entries, piece_of)
