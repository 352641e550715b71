"""What a run is asked to do: one model for each stage, from the command line and from YAML alike."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from shearling.errors import UserError, nearest, raise_all

UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_tokens(value: object) -> int:
    """A count of tokens: a whole number, or one with a unit, as 200K, 1.5M, 50B. Raises ValueError."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMBT]?)\s*", str(value).upper())
    if not match:
        raise ValueError(f"found {value!r}; expected a count of tokens, as 200K, 1.5M or 50B")
    return round(float(match[1]) * UNITS[match[2]])


def parse_shape(value: object) -> dict[str, int]:
    """A target shape: a mapping, or text as `--to` takes it. Raises ValueError."""
    from shearling.axes.shape import parse_target

    if isinstance(value, Mapping):
        return parse_target(",".join(f"{key}={size}" for key, size in value.items()))
    return parse_target(str(value))


Tokens = Annotated[int, BeforeValidator(parse_tokens), Field(gt=0)]
Target = Annotated[dict[str, int], BeforeValidator(parse_shape)]
Dtype = Literal["float32", "bfloat16", "float16"]


class Section(BaseModel):
    """A part of a recipe. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Training(Section):
    """What pruning and healing share. What is left out is chosen from the model's size, the budget and the data."""

    tokens: Tokens | None = None
    steps: int | None = Field(None, gt=0)
    lr: float | None = Field(None, gt=0)
    batch_tokens: Tokens | None = None
    seq_len: int | None = Field(None, gt=1)
    micro_sequences: int | None = Field(None, gt=0)
    proportions: dict[str, float] | None = None  # left out: by tokens
    eval_windows: int = Field(64, gt=0)  # held-out windows a domain
    eval_every: int | None = Field(None, ge=0)  # steps; left out: a tenth of the run
    clip_norm: float = Field(1.0, gt=0)
    seed: int = 0
    device: str | None = None
    dtype: Dtype | None = None  # of the result; left out: the source's
    autocast: Literal["auto", "off", "bfloat16"] = "auto"
    compile: bool = False
    activation_checkpointing: bool = False


class Prune(Training):
    """To a target shape, by learned masks or by one-shot scores."""

    to: Target
    method: Literal["masks", "activation"] = "masks"
    calibration_windows: int = Field(128, gt=0)
    relaxation: Literal["hard_concrete", "soft_topk"] = "soft_topk"
    start: Literal["ranked", "open"] = "ranked"
    schedule: Literal["trapezoid", "cosine"] = "trapezoid"
    warmup: float = Field(0.05, ge=0, lt=1)
    mask_warmup: float = Field(0.7, ge=0, le=1)  # share of the steps in which the target slides
    mask_lr: float = Field(0.01, ge=0)


class Heal(Training):
    """Continued pre-training of the cut."""

    schedule: Literal["trapezoid", "cosine"] = "trapezoid"
    warmup: float = Field(0.0, ge=0, lt=1)
    decay: float = Field(1.0, ge=0, le=1)


class Data(Section):
    """Documents to tokenise: files, folders, folders of folders."""

    inputs: list[str]
    held_out: float = Field(0.01, gt=0, lt=1)
    seed: int = 0


class Recipe(Section):
    """A whole run. A stage that is left out isn't done."""

    model: str
    out: str
    data: Data | str  # documents, or a token store that is there already
    prune: Prune
    heal: Heal | None = None
