"""How far a student's residual stream is from its source's, after the layers and at the channels that it kept.

B sequences, T tokens, C channels of the stream that are compared, P layers after which.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shearling.axes.spec import Family
from shearling.errors import UserError

TINY = 1e-12  # beside a mean square: a token whose stream is all zero


@dataclass(frozen=True)
class Alignment:
    """Blocks of the student and those of the source that they come from, by path; `channels`: the source's, None: all.

    Every student's block is compared, all alike.
    """

    student: tuple[str, ...]
    source: tuple[str, ...]
    channels: tuple[int, ...] | None

    @classmethod
    def whole(cls, family: Family, *, layers: int) -> "Alignment":
        """Of a model with itself, as it is under masks: what they keep is in the weights of `stream_loss`."""
        blocks = tuple(family.block(layer) for layer in range(layers))
        return cls(blocks, blocks, None)

    @classmethod
    def of(cls, kept: Mapping[str, Sequence[Mapping[str, Any]]], family: Family, *, layers: int) -> "Alignment":
        """From `kept` as shearling.json has it, for a student of so many layers."""
        of_source = kept["layer"][0]["kept"] if "layer" in kept else range(layers)
        assert len(of_source) == layers
        channels = tuple(kept["hidden"][0]["kept"]) if "hidden" in kept else None
        blocks = tuple(family.block(layer) for layer in range(layers))
        return cls(blocks, tuple(family.block(layer) for layer in of_source), channels)


@contextmanager
def outputs_of(
    model: nn.Module, paths: Sequence[str], *, channels: Tensor | None = None
) -> Iterator[dict[str, Tensor]]:
    """What the modules at `paths` give in the forward passes inside, by path, all of it or some channels.

    A student's is to be taken whole: under activation checkpointing the block runs again in backward, without hooks,
    and must then do no less than before.
    """
    seen: dict[str, Tensor] = {}

    def see(path: str, module: nn.Module, args: object, output: Any) -> None:
        stream = output if isinstance(output, Tensor) else output[0]
        seen[path] = stream if channels is None else stream.index_select(-1, channels)

    handles = [model.get_submodule(path).register_forward_hook(partial(see, path)) for path in paths]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def in_order(seen: Mapping[str, Tensor], paths: Sequence[str]) -> tuple[Tensor, ...]:
    """What was seen at `paths`. Raises UserError where a compiled model went past the hooks."""
    missing = [path for path in paths if path not in seen]
    if missing:
        raise UserError(
            "comparing hidden states",
            found=f"no output of {missing[0]}",
            expected="one from each layer; torch.compile may leave them out",
            change="train without compiling, or without the hidden-state term",
        )
    return tuple(seen[path] for path in paths)


@dataclass(frozen=True)
class Weights:
    """What counts how much where streams are compared: channels [C] and layers [P], None: all alike.

    Under masks they are those of the axes `hidden` and `layer`: with masks of 0 and 1 the figure is the cut's own. They
    take no gradient, or masks would close where the student is far off instead of bringing it nearer.
    """

    channels: Tensor | None = None
    layers: Tensor | None = None

    @classmethod
    def of_masks(cls, masks: Mapping[str, Tensor]) -> "Weights":
        """From the masks of a model, by axis; an axis that isn't cut has none."""
        found = {axis: masks[axis].detach() for axis in ("hidden", "layer") if axis in masks}
        return cls(found.get("hidden"), found.get("layer"))


def stream_loss(student: Sequence[Tensor], source: Sequence[Tensor], weights: Weights | None = None) -> Tensor:
    """Mean square of the difference by the source's mean square, at each token, mean over layers: fp32 [B, T].

    Both are P tensors [B, T, C]; the means are weighted. For each layer one [B, T, C] in fp32 is kept for backward.
    """
    channels, layers = (weights.channels, weights.layers) if weights else (None, None)
    shares = [1 / len(student)] * len(student) if layers is None else layers / (layers.sum() + TINY)
    total = torch.zeros((), device=student[0].device)
    for share, mine, theirs in zip(shares, student, source, strict=True):
        aim = theirs.to(mine.device, torch.promote_types(mine.dtype, torch.float32))
        apart = _mean((mine - aim).square(), channels) / (_mean(aim.square(), channels) + TINY)
        total = total + share * apart
    return total


def _mean(values: Tensor, weights: Tensor | None) -> Tensor:
    """Over the last dim. Not by a matrix product, which autocast would take in bf16."""
    return values.mean(-1) if weights is None else (values * weights).sum(-1) / (weights.sum() + TINY)
