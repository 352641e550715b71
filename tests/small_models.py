"""Small random models of any family with a table: real transformers classes, weights that hide nothing.

Norm weights are not all ones, biases not zero, and sizes are odd where the family's config allows it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from shearling.arch import family_of
from shearling.axes.shape import Shape, shape_of
from shearling.axes.spec import Family

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
FLAGS = {"llama": {"attention_bias": True, "mlp_bias": True}, "qwen3": {"attention_bias": True}}


@dataclass(frozen=True)
class Small:
    config: dict[str, Any]
    family: Family
    shape: Shape
    tied: bool
    model: Any


def small(
    model_type: str,
    *,
    hidden: int = 24,
    layers: int = 3,
    kv_heads: int = 2,
    group: int = 2,
    head_dim: int = 8,
    intermediate: int = 20,
    vocab: int = 40,
    tied: bool = False,
    biases: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Small:
    """A model whose every parameter is drawn anew."""
    config = {
        "architectures": [],
        "model_type": model_type,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": kv_heads * group,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": intermediate,
        "vocab_size": vocab,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        "rms_norm_eps": 1e-5,
        **(FLAGS.get(model_type, {}) if biases else {}),
    }
    model = build(config, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            centre, scale = (1.0, 0.3) if "norm" in name else (0.0, 1.0 / parameter.shape[-1] ** 0.5)
            parameter.copy_(centre + scale * noise)
    family = family_of(config)
    return Small(config, family, shape_of(family, config), tied, model)


def build(config: dict[str, Any], *, dtype: torch.dtype = torch.float32) -> Any:
    """The transformers model of a raw config, in evaluation mode."""
    settings = dict(config)
    made = AutoConfig.for_model(settings.pop("model_type"), **settings)
    return AutoModelForCausalLM.from_config(made, dtype=dtype, attn_implementation="eager").eval()


def tokens(vocab: int, *, sequences: int = 2, length: int = 17, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, vocab, (sequences, length), generator=torch.Generator().manual_seed(seed))
