"""Small random models: real transformers classes, weights that hide nothing."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shearling.axes.shape import Shape, shape_of
from shearling.axes.spec import Family, Normalisation

NORM_SPREAD = 0.3  # of norms' weights about 1, so that one left out shows


@dataclass(frozen=True)
class Small:
    """A model in fp32 on the CPU, with its raw config and what the table makes of that."""

    name: str
    family: Family
    config: Mapping[str, Any]
    shape: Shape
    model: Any

    @property
    def tied(self) -> bool:
        return bool(self.family.setting(self.config, "tie_word_embeddings"))

    def ids(self, *, sequences: int = 2, length: int = 17, seed: int = 1) -> Tensor:
        """Random token ids, int64 [sequences, length]."""
        return tokens(self.shape["vocab_size"], sequences=sequences, length=length, seed=seed)

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        return self.model(ids, use_cache=False).logits


def random_model(family: Family, config: Mapping[str, Any], *, name: str = "", seed: int = 0) -> Small:
    """A model of this config, every parameter drawn anew: norms about 1, biases away from 0, matrices that keep scale.

    What each parameter is comes from the table, not from its name; what the table lacks is drawn as a matrix.
    """
    model = build(config)
    draw(model, norms_of(family, config), seed=seed)
    return Small(name, family, config, shape_of(family, config), model)


def norms_of(family: Family, config: Mapping[str, Any]) -> dict[str, Normalisation]:
    """How each norm of a model works, by its weight's name."""
    return {
        row.at(layer): family.normalisation(row)
        for row, layer in family.named(config)
        if row.role in ("norm", "post") and not row.is_bias
    }


@torch.no_grad()
def draw(model: Any, norms: Mapping[str, Normalisation], *, seed: int = 0) -> None:
    """Draws every parameter anew, in place: norms about 1, whatever else as a matrix that keeps scale."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if name in norms:
            parameter.copy_(1 - norms[name].offset + NORM_SPREAD * noise)
        else:
            parameter.copy_(noise / parameter.shape[-1] ** 0.5)


def build(config: Mapping[str, Any], *, dtype: torch.dtype = torch.float32) -> Any:
    """The transformers model of a raw config, in evaluation mode, its attention and experts computed plainly."""
    from transformers import AutoModelForCausalLM

    # Fused kernels round otherwise, and refuse sizes as odd as these.
    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return AutoModelForCausalLM.from_config(parsed(config), dtype=dtype, **plain).eval()


def on_meta(config: Mapping[str, Any]) -> Any:
    """The same without weights: names, shapes and ties."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(parsed(config))


def parsed(config: Mapping[str, Any]) -> Any:
    """transformers' config object of a raw config."""
    from transformers import AutoConfig

    settings = dict(config)
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


def tokens(vocab: int, *, sequences: int = 2, length: int = 17, seed: int = 1) -> Tensor:
    """Random token ids, int64 [sequences, length]."""
    return torch.randint(0, vocab, (sequences, length), generator=torch.Generator().manual_seed(seed))


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest value expected. NaN if anything is."""
    return float((found - expected).abs().max() / expected.abs().max())
