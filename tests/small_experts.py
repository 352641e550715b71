"""Small random models with experts, of sizes that transformers' default experts code can multiply."""

from typing import Any

import torch
from small_models import Small, build

from shearling.arch import family_of
from shearling.axes.shape import shape_of

SIZES: dict[str, dict[str, Any]] = {
    "mixtral": {"head_dim": 8, "intermediate_size": 24, "num_local_experts": 6},
    "qwen3_moe": {
        "head_dim": 8,
        "intermediate_size": 20,
        "moe_intermediate_size": 24,
        "num_experts": 6,
        "mlp_only_layers": [1],
        "norm_topk_prob": True,
    },
    "olmoe": {"intermediate_size": 24, "num_experts": 6},
    "gpt_oss": {"head_dim": 8, "intermediate_size": 24, "num_local_experts": 6, "sliding_window": 8},
}


def small_experts(model_type: str, *, layers: int = 3, dtype: torch.dtype = torch.float32, **more: Any) -> Small:
    """A model whose every parameter is drawn anew, its routers far from even."""
    config = {
        "architectures": [],
        "model_type": model_type,
        "hidden_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 40,
        "max_position_embeddings": 64,
        "num_experts_per_tok": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        **SIZES[model_type],
        **more,
    }
    model = build(config, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            centre, scale = (1.0, 0.3) if "norm" in name else (0.0, 1.0 / parameter.shape[-1] ** 0.5)
            parameter.copy_(centre + scale * noise * (3.0 if "mlp.gate." in name or "router" in name else 1.0))
    family = family_of(config)
    return Small(model_type, family, config, shape_of(family, config), model)
