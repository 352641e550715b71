"""What a shape costs: bytes to hold it, to run it, to train it."""

from collections.abc import Mapping
from typing import Any

from shearling.axes.count import cache_bytes_per_token, parameters
from shearling.axes.shape import Shape, shape_of
from shearling.axes.spec import Family

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}

# fp32 weights, gradients and AdamW's two moments (Rajbhandari et al. 2020, arXiv 1910.02054, section 3.1).
TRAINING_BYTES_PER_PARAMETER = 16


def memory_bytes(
    family: Family, config: Mapping[str, Any], *, context: int, shape: Shape | None = None
) -> dict[str, int]:
    """Bytes of the weights by dtype, of the KV-cache of one sequence of `context` tokens, of full training's state."""
    shape = shape or shape_of(family, config)
    count = parameters(family, config, shape)
    return {
        "weights_float32_bytes": count * BYTES["float32"],
        "weights_bfloat16_bytes": count * BYTES["bfloat16"],
        "kv_cache_bfloat16_bytes": cache_bytes_per_token(family, config, shape) * context,
        "training_adamw_bytes": count * TRAINING_BYTES_PER_PARAMETER,
    }
