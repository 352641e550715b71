"""A model type's own transformers class, from raw configs: without weights, or small and random.

Random weights hide nothing: norm weights aren't all ones, biases aren't zero.
"""

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from shearling.draft.refused import Refused


@contextmanager
def quiet() -> Iterator[None]:
    """What transformers says of configs that nobody will ever use isn't shown."""
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def make_config(config: Mapping[str, Any]) -> Any:
    """The config object of a raw config. Raises whatever the class does for values that it refuses."""
    from transformers import AutoConfig

    settings = {key: value for key, value in config.items() if key != "model_type"}
    return AutoConfig.for_model(config["model_type"], **settings)


def on_meta(config: Mapping[str, Any]) -> nn.Module:
    """The causal model of a raw config, without storage."""
    from transformers import AutoModelForCausalLM

    with quiet(), torch.device("meta"):
        return AutoModelForCausalLM.from_config(make_config(config), attn_implementation="eager")


def random_model(config: Mapping[str, Any], *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """The causal model of a raw config, in evaluation mode, every parameter drawn anew."""
    from transformers import AutoModelForCausalLM

    with quiet():
        made = make_config(config)
        made._experts_implementation = "eager"  # the grouped product refuses float64
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(made, dtype=dtype, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            centre, scale = (1.0, 0.3) if parameter.dim() == 1 else (0.0, 1.0 / max(parameter.shape[-1], 1) ** 0.5)
            parameter.copy_(centre + scale * noise)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.sub_(1.0)
    return model


def tokens(vocab: int, *, sequences: int = 2, length: int = 17, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, vocab, (sequences, length), generator=torch.Generator().manual_seed(seed))


def check_known(config: Mapping[str, Any]) -> None:
    """Raises Refused for a type that transformers has no causal decoder for."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise Refused(f"transformers has no config of the type {model_type!r}")
    if CONFIG_MAPPING[model_type] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise Refused(f"transformers has no causal decoder of the type {model_type!r}")
