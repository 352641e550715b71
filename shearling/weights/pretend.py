"""A model folder as a transformers model of which nothing is read but its config."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from shearling.weights.model import text_model_config


def without_weights(folder: Path, *, dtype: torch.dtype = torch.float32) -> Any:
    """The causal model that `load_model` gives, with whatever weights its class starts from.

    For where tensors have no storage: elsewhere it takes as much as the model.
    """
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(text_model_config(folder), dtype=dtype).eval()


@contextmanager
def whole_windows() -> Iterator[None]:
    """Within it transformers takes windows for undivided, as it finds them where positions simply count.

    It looks at their values for that, which tensors without storage don't have: it would make a mask. On a GPU the
    host would wait for the device to look.
    """
    from transformers import masking_utils as module

    before = module.find_packed_sequence_indices
    module.find_packed_sequence_indices = _undivided  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        module.find_packed_sequence_indices = before


def _undivided(position_ids: torch.Tensor) -> None:
    """One function throughout, or compiled code would be made again for each."""
