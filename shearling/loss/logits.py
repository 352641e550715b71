"""From what a head reads to logits: the product with its weight, and what some families do to it besides.

N tokens, D hidden, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from shearling.arch import family_of


def read_by_head(model: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """What the head multiplies, [..., D], scaled as the model does, and its weight [V, D].

    A bias is one more channel, of ones.
    """
    head = model.get_output_embeddings()
    hidden, bias = _scaled(model, hidden), dict(head.named_parameters(recurse=False)).get("bias")
    if bias is None:
        return hidden, head.weight
    ones = hidden.new_ones(*hidden.shape[:-1], 1)
    return torch.cat([hidden, ones], -1), torch.cat([head.weight, bias.unsqueeze(-1)], -1)


def _scaled(model: Any, hidden: Tensor) -> Tensor:
    """Hidden states times the factor that the model has for its logits (Granite, Cohere)."""
    keys = _keys(model)
    factor = 1.0
    if "times" in keys:
        factor *= getattr(model.config, keys["times"])
    if "over" in keys:
        factor /= getattr(model.config, keys["over"])
    return hidden if factor == 1.0 else hidden * factor


def logit_cap(model: Any) -> float | None:
    """c where the model's logits are c tanh(x / c) (Gemma 2), None where they are as they are."""
    keys = _keys(model)
    return getattr(model.config, keys["cap"]) if "cap" in keys else None


def logits_of(hidden: Tensor, weight: Tensor, cap: float | None) -> Tensor:
    """Of hidden [N, D], already scaled, and the head's weight [V, D]: [N, V], in fp32 at least."""
    logits = functional.linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if cap is None else (logits / cap).tanh() * cap


def _keys(model: Any) -> Any:
    return family_of({"model_type": model.config.model_type}).logits
