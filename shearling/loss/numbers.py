"""A few numbers that the host knows, where a device can use them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def numbers_on(device: Any, numbers: Sequence[int]) -> Tensor:
    """int64 [n] on a device. Nobody waits for a GPU to be done with what it has before."""
    # `torch.tensor(..., device="cuda")` does. So few bytes need no pinned memory: the driver takes them at once.
    found = torch.tensor(numbers, dtype=torch.int64, device="cpu")
    return found.to(device, non_blocking=torch.device(device).type == "cuda")
