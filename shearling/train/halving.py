"""What a step does where there is less memory than was estimated: the same again, with fewer windows at a time."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch.optim import Optimizer

from shearling.errors import UserError
from shearling.train.objective import Losses
from shearling.train.step import Log, Settings

# As torch's allocators for a CPU and for MPS say it.
RAN_OUT = ("DefaultCPUAllocator: can't allocate memory", "MPS backend out of memory")

logger = logging.getLogger(__name__)


def with_room(
    step: Callable[[Settings], Losses], settings: Settings, *, optimizers: Sequence[Optimizer], log: Log
) -> tuple[Losses, Settings]:
    """What `step`, a batch's gradients, comes to at these settings, or where they allow it at half the micro-batch and
    so on; and the settings from here on. Says so, in an event "micro_batch", where it had to.

    A step that runs out of memory must be one that can begin again. Several ranks can't do this: the others would not
    know. Raises UserError where there is no less to try.
    """
    while True:
        try:
            return step(settings), settings
        except RuntimeError as error:
            if not ran_out(error):
                raise
            if not settings.halves or settings.micro_sequences == 1:
                raise _no_room(settings, error) from error
        # Not in the handler, where the error would still hold all that the step had made.
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        if accelerator := torch.accelerator.current_accelerator(check_available=True):
            torch.get_device_module(accelerator).empty_cache()
        before = settings.micro_sequences
        settings = replace(settings, micro_sequences=before // 2)
        log("micro_batch", out_of_memory_at=before, micro_sequences=settings.micro_sequences)
        logger.warning("out of memory with %d windows at once: from here on %d", before, settings.micro_sequences)


def ran_out(error: RuntimeError) -> bool:
    """Whether it says that a device had no memory left. Only CUDA has an error of its own for that."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in RAN_OUT)


def _no_room(settings: Settings, error: RuntimeError) -> UserError:
    return UserError(
        "memory for a step",
        found=f"none left, with {settings.micro_sequences} windows at a time ({str(error).splitlines()[0]})",
        expected="room for what was estimated",
        change="free some and give the same command again, which goes on from the last checkpoint; or begin anew with "
        "a smaller --micro-batch or --activation-checkpointing full",
    )
