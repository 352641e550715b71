"""What differs from device to device: how numbers of the host get there, and how exact it is."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def numbers_on(device: Any, numbers: Sequence[int]) -> Tensor:
    """int64 [n] on a device. Nobody waits for a GPU to be done with what it has before."""
    # `torch.tensor(..., device="cuda")` does. So few bytes need no pinned memory: the driver takes them at once.
    found = torch.tensor(numbers, dtype=torch.int64, device="cpu")
    return found.to(device, non_blocking=torch.device(device).type == "cuda")


def widest_float(device: torch.device) -> torch.dtype:
    """What long sums are taken in: float64, which MPS and some of Intel's GPUs don't have."""
    return torch.float64 if device.type in ("cpu", "cuda") else torch.float32
