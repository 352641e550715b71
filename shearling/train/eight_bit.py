"""AdamW with its two moments in 8 bits each (torchao; Dettmers et al. 2021, arXiv 2110.02861).

Blocks of 256 values share a scale. Tensors of fewer than 4,096 values, or of a number that blocks don't divide, keep
their moments as they are.
"""

import os
import shutil
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from shearling.errors import UserError
from shearling.ranks.ranks import Ranks

BLOCK, FROM = 256, 4096
QMAP_BYTES = 4 * 256  # of what each code stands for, there for each tensor
COMPILERS = ("g++", "c++", "clang++", "gcc", "cc", "clang")


def adamw_8bit(groups: Sequence[dict[str, Any]], *, lr: float, betas: tuple[float, float]) -> Optimizer:
    """On such groups of parameters, without weight decay."""
    from torchao.optim import AdamW8bit  # pyright: ignore[reportMissingImports]

    # Its steps are compiled anew in each process, which that warning is about.
    warnings.filterwarnings("ignore", "OptimState8bit does not implement", UserWarning)
    return AdamW8bit(groups, lr=lr, betas=betas, weight_decay=0.0, block_size=BLOCK)


def check_8bit(device: str, ranks: Ranks) -> None:
    """Raises UserError where it can't run."""
    if ranks.mesh is not None:
        found = f"{ranks.count} ranks" if ranks.count > 1 else "offload"
        change = "take adamw: what it keeps is shared out among the ranks, or lies in the computer's memory"
        raise UserError("optimizer adamw8bit", found=found, expected="one process without it", change=change)
    if torch.device(device).type == "mps":
        raise UserError("optimizer adamw8bit", found=device, expected="cuda or cpu", change="take adamw")
    if find_spec("torchao") is None:
        change = 'pip install "shearling[int8]", or take adamw'
        raise UserError("optimizer adamw8bit", found="no torchao", expected="torchao, which it is of", change=change)
    if "CXX" not in os.environ and not any(map(shutil.which, COMPILERS)):
        change = "install one (as g++), or take adamw"
        raise UserError("optimizer adamw8bit", found="no C++ compiler", expected="one for its steps", change=change)


def begun(optimizer: Optimizer, parameter: Tensor) -> dict[str, Tensor] | None:
    """What it has of a parameter before the first step, on its device; None for another optimizer."""
    new: Any = getattr(optimizer, "_new_buffer", None)  # torchao has no public way
    if new is None:
        return None
    with torch.no_grad():
        return {"step": torch.tensor(0.0), "exp_avg": new(parameter, True), "exp_avg_sq": new(parameter, False)}


def parts(name: str, value: Tensor) -> dict[str, Tensor]:
    """Of what an optimizer has of a parameter the plain tensors, by name: itself, or its codes and what they mean."""
    if "codes" not in vars(value):
        return {name: value}
    inner, _ = value.__tensor_flatten__()  # pyright: ignore[reportAttributeAccessIssue]
    return {f"{name}.{part}": getattr(value, part) for part in inner}


def moment_bytes(values: int) -> int:
    """Of one moment of a tensor of so many float32 values."""
    if values < FROM or values % BLOCK:
        return 4 * values
    return values + 4 * values // BLOCK + QMAP_BYTES
