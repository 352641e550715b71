"""A model folder as a transformers model, and a model's weights as a folder."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shearling.arch import whole_of
from shearling.axes.disk import Piece, placed
from shearling.axes.shape import Shape
from shearling.axes.spec import Family
from shearling.axes.table import Tensor as Row
from shearling.errors import UserError
from shearling.ranks.rows import gathered
from shearling.weights.checkpoint import Checkpoint, check_finite
from shearling.weights.header import FLOAT_DTYPES
from shearling.weights.writer import Entry, in_order, room_for, write

DTYPE_CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


@dataclass(frozen=True)
class Beside:
    """What a text model is a part of: the whole's config, and the tensors of other parts, in `checkpoint`.

    They keep their bytes, or are written in `dtype` where one is asked for and they are floats.
    """

    config: Mapping[str, Any]
    checkpoint: Checkpoint
    dtype: torch.dtype | None = None

    def entries(self) -> Iterator[Entry]:
        for name, info in self.checkpoint.tensors.items():
            asked = self.dtype if info.dtype in FLOAT_DTYPES else None
            yield Entry(name, DTYPE_CODES[asked] if asked else info.dtype, info.shape)

    def read(self, name: str) -> Tensor:
        found = self.checkpoint.read(name)
        return found.to(self.dtype) if self.dtype is not None and found.is_floating_point() else found


def load_model(folder: Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """The causal model in a local folder, in evaluation mode, dropout and routers' noise off whatever its config says.

    Of a whole with other parts, its text model alone. Raises UserError for weights that aren't finite and for tensors
    that are missing or left over.
    """
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    config: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
    family, renamed, beside = whole_of(config.model_type), None, ()
    if family is not None and family.inside is not None:
        inside, whole, config = family.inside, config, getattr(config, family.inside.key)
        config.tie_word_embeddings = whole.tie_word_embeddings
        renamed = {f"^{re.escape(there)}": here for here, there in inside.disk.items()}
        beside = (*inside.carried, *inside.dropped, *(row.at_disk(None) for row in family.connectors))
    model, report = _loaded(folder, config, dtype, renamed)
    left_over = [name for name in report["unexpected_keys"] if not name.startswith(beside)]
    stray = sorted([*report["missing_keys"], *left_over, *report["mismatched_keys"]])
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


def _loaded(folder: Path, config: Any, dtype: torch.dtype, renamed: Mapping[str, str] | None) -> tuple[Any, Any]:
    """The causal model of a config, and what transformers reports. `renamed` turns starts of names in files to its."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    _without_noise(config)
    told = logging.get_verbosity()
    if renamed is not None:  # other parts are no news: of the report the caller says what is
        logging.set_verbosity_error()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, local_files_only=True, output_loading_info=True, key_mapping=renamed
        )
    finally:
        logging.set_verbosity(told)
    return loaded


def _without_noise(config: Any) -> None:
    # In training mode, which activation checkpointing asks for, all of these would be live.
    for key in config.to_dict():
        if key.endswith(("dropout", "pdrop", "jitter_noise")) and isinstance(getattr(config, key), float):
            setattr(config, key, 0.0)


def empty_model(folder: Path, *, dtype: torch.dtype) -> Any:
    """The same, its parameters on the meta device and still to be filled, its buffers on the CPU."""
    from transformers import AutoModelForCausalLM

    with _parameters_on_meta():
        return AutoModelForCausalLM.from_config(text_model_config(folder), dtype=dtype).eval()


def text_model_config(folder: Path) -> Any:
    """transformers' config of what `load_model` loads: of a text model alone, without noise."""
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
    family = whole_of(config.model_type)
    if family is not None and family.inside is not None:
        whole, config = config, getattr(config, family.inside.key)
        config.tie_word_embeddings = whole.tie_word_embeddings
    _without_noise(config)
    return config


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Within it a module's parameters keep no values. Buffers do: they are computed and not read from files."""
    plain = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:  # a tied one comes a second time
            param = nn.Parameter(param.detach().to("meta"))
        plain(self, name, param)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = plain


def reader(model: Any) -> Callable[[Row, int | None], Tensor]:
    """Reads a table's rows from a model in memory, by all ranks together if they share it out."""
    state = dict(model.named_parameters())
    return lambda row, layer: gathered(state[row.at(layer)].detach()).cpu()


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
    beside: Beside | None = None,
    writes: bool = True,
) -> None:
    """Writes config.json and the weights of a family's model, tensor by tensor, under their names on disk.

    Of a text model inside a whole, with what is `beside` it there. A rank that doesn't write makes the same tensors in
    the same order, so that others can gather them.
    """
    rows = placed(family.written(config), shape.axes)
    entries = [Entry(name, DTYPE_CODES[dtype], piece.shape) for name, (piece, _, _) in rows.items()]
    last: list[Any] = [None, None]  # a row in many pieces is made once

    def produce(name: str) -> Tensor:
        if beside is not None and name not in rows:
            return beside.read(name)
        piece, row, layer = rows[name]
        if last[0] != (row, layer):
            last[:] = [(row, layer), tensor(row, layer).to(dtype)]
        return last[1][piece.where].contiguous()

    written, others = (config, ()) if beside is None else (beside.config, beside.entries())
    if not writes:
        for entry in in_order([*entries, *others]):
            if entry.name in rows:
                produce(entry.name)
        return
    with room_for(folder, "config.json"):
        (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    write(folder, [*entries, *others], produce)
