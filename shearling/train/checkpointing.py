"""Activations that are made again in the backward pass: all but the ends of blocks, or what is quickly made too."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

aten = torch.ops.aten
# What takes longer to make than to keep: products, and attention. The rest of a block is elementwise.
KEPT: set[Any] = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten._grouped_mm.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_attention_math_for_mps.default,
}


def checkpointing(mode: str) -> dict[str, Any]:
    """What torch's checkpoint is told of each block, "full" or "selective"."""
    found: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        contexts: Callable[..., Any] = create_selective_checkpoint_contexts
        found["context_fn"] = partial(contexts, _policy)
    return found


def _policy(context: Any, op: Any, *args: Any, **options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
