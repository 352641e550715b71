"""A model that a verb works on: its folder, and what its config and headers say, checked before anything is read."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shearling.arch import family_of
from shearling.arch.config import config_at
from shearling.axes.count import parameters
from shearling.axes.shape import Shape, shape_of
from shearling.axes.spec import Family
from shearling.axes.spec import Tensor as Row
from shearling.data.store import Store
from shearling.data.tokenise import fingerprint as tokenizer_fingerprint
from shearling.data.tokenise import load_tokenizer
from shearling.errors import UserError
from shearling.weights.checkpoint import Checkpoint, check_dtype, check_finite
from shearling.weights.folder import resolve
from shearling.weights.header import DTYPES, FLOAT_DTYPES
from shearling.weights.table import check_table

ORIGIN = "shearling.json"


@dataclass(frozen=True)
class Source:
    """A sound model folder. `name` is what the user called it."""

    name: str
    folder: Path
    config: Mapping[str, Any]
    family: Family
    shape: Shape
    checkpoint: Checkpoint

    @classmethod
    def open(cls, model: str, *, dtype: str | None = None) -> "Source":
        """Reads config and headers. Raises UserError for all that can be told from them; `dtype` settles a quarrel."""
        folder = resolve(model)
        checkpoint = Checkpoint.open(folder)
        family = family_of(checkpoint.config)
        shape = shape_of(family, checkpoint.config)
        check_table(checkpoint, family, shape)
        if dtype is None:
            check_dtype(checkpoint.config, checkpoint)
        return cls(model, folder, checkpoint.config, family, shape, checkpoint)

    @property
    def tied(self) -> bool:
        return bool(self.family.setting(self.config, "tie_word_embeddings"))

    @property
    def parameters(self) -> int:
        return parameters(self.family, self.config)

    @property
    def dtype(self) -> torch.dtype:
        """What most of the weights are stored in, by bytes."""
        sizes = dict.fromkeys(FLOAT_DTYPES, 0)
        for info in self.checkpoint.tensors.values():
            if info.dtype in sizes:
                sizes[info.dtype] += info.nbytes
        return getattr(torch, DTYPES[max(sizes, key=lambda code: sizes[code])][1])

    def read(self, row: Row, layer: int | None) -> torch.Tensor:
        """One tensor of the table from disk, checked."""
        name = row.at_disk(layer)
        weight = self.checkpoint.read(name)
        check_finite(name, weight)
        return weight

    def check_finite(self) -> None:
        """Reads every tensor, one at a time. Raises UserError for the first that holds NaN or an infinity."""
        for name in self.checkpoint.names:
            check_finite(name, self.checkpoint.read(name))

    def origin(self) -> dict[str, Any]:
        """What shearling.json says of the folder, if Shearling made it."""
        path = self.folder / ORIGIN
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def config_in(self, dtype: torch.dtype) -> dict[str, Any]:
        """The config of the same model with its weights in another dtype."""
        layers = tuple(range(self.shape["num_hidden_layers"]))
        name = str(dtype).removeprefix("torch.")
        return config_at(self.family, self.config, self.shape, layers=layers, dtype=name)

    def max_positions(self) -> int:
        """The longest sequence that the model was made for."""
        return int(self.config.get("max_position_embeddings") or 2048)

    def check_store(self, store: Store) -> None:
        """Raises UserError unless the store's ids are this model's tokens, each with a row in the embedding."""
        tokenizer = load_tokenizer(self.folder)
        rows = self.shape["vocab_size"]
        if len(tokenizer) > rows:
            raise UserError(
                f"tokenizer of {self.name}",
                found=f"{len(tokenizer)} ids",
                expected=f"at most {rows}, the rows of the embedding",
                change="take the tokenizer that belongs to the model, or resize the model's embeddings first",
            )
        store.check_tokenizer(tokenizer_fingerprint(tokenizer), self.name)
