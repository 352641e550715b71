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


def stream_loss(student: Sequence[Tensor], source: Sequence[Tensor]) -> Tensor:
    """Mean square of the difference by the source's mean square, at each token, mean over layers: fp32 [B, T].

    Both are P tensors [B, T, C]. For each layer one [B, T, C] in fp32 is kept for backward.
    """
    total = torch.zeros((), device=student[0].device)
    for mine, theirs in zip(student, source, strict=True):
        aim = theirs.to(mine.device, torch.promote_types(mine.dtype, torch.float32))
        total = total + (mine - aim).square().mean(-1) / (aim.square().mean(-1) + TINY)
    return total / len(student)
