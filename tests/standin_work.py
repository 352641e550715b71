"""What tests have the stand-in for an accelerator do, in processes of their own.

They are forked from one that has imported this, and with it what a verb imports only once it is needed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft  # noqa: F401
import pytest
import torch
import torch._dynamo
import torch.distributed.fsdp
import transformers.models.auto.tokenization_auto
import transformers.models.llama.modeling_llama  # noqa: F401
from killed import killed_at
from small_models import small_of_any
from torch import Tensor

from shearling.conformance.targets import alone, random_cut, together
from shearling.cut.importance import measure
from shearling.errors import UserError
from shearling.loss.cross_entropy import next_token_loss
from shearling.masks.attach import Attached
from shearling.verbs import evaluate, heal, prune  # noqa: F401


@dataclass(frozen=True)
class There:
    """What something gave, the operators that it asked of the device, and the most bytes that it had there."""

    found: Any
    operators: list[str]
    nbytes: int


def there(work: Callable[..., Any], *args: Any) -> There:
    found = work(*args)
    return There(found, torch.ops.standin.asked(), torch.accelerator.max_memory_allocated())


def killed(verb: Callable[..., Any], step: int, saved_in: Path) -> None:
    verb(watch=killed_at(step, saved_in=saved_in))


def refusals() -> list[str]:
    """What it says to float64, to tensors on both sides and to more than there is."""
    x = torch.ones(2, 3, device="standin")
    told = []
    for wrong in (x.double, lambda: x + torch.ones(2, 3), lambda: x.new_zeros(1 << 40)):
        with pytest.raises((TypeError, RuntimeError)) as error:
            wrong()
        told.append(str(error.value).splitlines()[0])
    return [*told, str(float((x @ x.T).sum()))]


def squeezed(verb: Callable[..., Any], at: int) -> Any:
    """What a verb gives whose device has, from some step on, a third less for what comes and goes."""

    def watch(title: str, steps: int) -> Callable[..., None]:
        def on_step(step: int, *_: Any) -> None:
            if step == at:
                lasting, most = torch.accelerator.memory_allocated(), torch.accelerator.max_memory_allocated()
                torch.ops.standin.limit(lasting + (most - lasting) * 2 // 3)

        return on_step

    return verb(watch=watch)


def limited(verb: Callable[..., Any], nbytes: int) -> str:
    """What a verb says to a device of so many bytes."""
    torch.ops.standin.limit(nbytes)
    with pytest.raises(UserError) as told:
        verb()
    return str(told.value)


@dataclass(frozen=True)
class Step:
    """A masked step's loss and gradients, and one-shot scores; all on the CPU."""

    loss: Tensor
    gradients: dict[str, Tensor]
    scores: dict[str, Tensor]


def masked_steps(model_types: Sequence[str], device: str) -> list[Step]:
    """Of a small model of each type."""
    return [_masked_step(model_type, device) for model_type in model_types]


def _masked_step(model_type: str, device: str) -> Step:
    made = small_of_any(model_type, tied=False)
    units = alone(made)
    target = next(iter((together(made, axes={axis for unit in units for axis in unit}) or units).values()))
    made.model.to(device)
    masks = {axis: mask.to(device).requires_grad_() for axis, mask in random_cut(made.shape, target)[1].items()}
    attached = Attached(made.model, made.family, config=made.config, axes=tuple(masks))
    attached.set(masks)
    ids = made.ids(seed=7).to(device)
    loss = next_token_loss(made.model, ids)
    loss.backward()
    attached.push()
    parameters = {**dict(made.model.named_parameters()), **masks}
    gradients = {name: p.grad.cpu() for name, p in parameters.items() if p.grad is not None}
    attached.remove()
    scores = measure(made.model, made.family, config=made.config, batches=[ids]).scores
    return Step(loss.detach().cpu(), gradients, scores)
