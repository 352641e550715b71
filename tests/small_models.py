"""Small random models of some families, of sizes that a test chooses. For those of all families, see conformance."""

import torch

from shearling.arch import families, family_of
from shearling.conformance.model import Small as Small
from shearling.conformance.model import build as build
from shearling.conformance.model import parsed, random_model
from shearling.conformance.model import tokens as tokens
from shearling.conformance.small import telling

MODEL_TYPES = LLAMAS = ("llama", "mistral", "qwen2", "qwen3")
OTHERS = tuple(t for family in families() for t in family.model_types if t not in LLAMAS)
DENSE = ("hidden", "layer", "kv_head", "group", "intermediate")  # the axes of a model without experts
FLAGS = {"llama": {"attention_bias": True, "mlp_bias": True}, "qwen3": {"attention_bias": True}}


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
    eps: float = 1e-5,
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
        "rms_norm_eps": eps,
        **(FLAGS.get(model_type, {}) if biases else {}),
    }
    made = random_model(family_of(config), config, name=model_type, seed=seed)
    made.model.to(dtype)
    return made


def small_of_any(model_type: str, *, tied: bool) -> Small:
    """A model of any type, without dropout: tied, without what flags bring, or untied with it."""
    family = family_of({"model_type": model_type})
    config = list(telling(family, model_type).values())[tied]
    made = parsed(config).to_dict()
    config |= {key: 0.0 for key in made if key.endswith(("dropout", "pdrop"))}
    return random_model(family, config, name=model_type)
