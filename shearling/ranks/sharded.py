"""A model whose weights are shared out among ranks: each block, and the rest of it, is whole only while it is used.

torch's `fully_shard` does it (FSDP2). It makes a module whole around its forward pass, and a loss reads the head's
weight outside the model's own: so what the root's forward pass runs is whatever is asked for, `inside(model, ...)`.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.utils import _pytree

from shearling.ranks.ranks import Ranks

T = TypeVar("T")


class Root(nn.Module):
    """A causal model as what is sharded last: in its forward pass all that isn't in a block is there whole."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, work: Callable[..., T], *args: Any) -> T:
        return work(self.model, *args)


def inside(model: Any, work: Callable[..., T], *args: Any, stays: bool = False) -> T:
    """`work(model, *args)`, where the model's weights can be used.

    Where gradients are off they are given up after it, unless all that isn't in a block `stays`: for a model that isn't
    trained, and whose head is used on. Where they are on, what this gives has to be gone backward from: weights that
    stayed whole would get no gradients the next time.
    """
    sharded = getattr(model, "sharded_as", None)
    if sharded is None:
        return work(model, *args)
    (root,) = sharded
    found = root(work, *args)
    if torch.is_grad_enabled():
        tensors = [leaf for leaf in _pytree.tree_leaves(found) if isinstance(leaf, Tensor)]
        assert any(tensor.requires_grad for tensor in tensors), "nothing to go backward from: use no_grad around it"
    elif not stays:
        root.reshard()  # after a backward pass it does that itself
    return found


def shard(
    model: Any,
    blocks: Sequence[str],
    *,
    read: Callable[[str], Tensor],
    ranks: Ranks,
    device: str,
    compute: torch.dtype | None = None,
) -> None:
    """Gives a model on the meta device its weights, read by name on the first rank, of which each rank keeps its rows.

    One block is there whole at a time. Weights stay in the model's dtype; blocks compute in `compute`, their gradients
    are reduced in float32. Where ranks offload, the rows that they keep and their gradients lie in the computer's
    memory.
    """
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32 if compute else None)
    options: dict[str, Any] = {"mesh": ranks.mesh, "mp_policy": policy}
    if ranks.offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=device.startswith("cuda"))
    names = {id(p): name for name, p in model.named_parameters()}
    places = _places(model)
    for path in blocks:
        block = model.get_submodule(path)
        _fill(block.parameters(), names, places, read, ranks, device)
        fully_shard(block, **options)
    _fill((p for p in model.parameters() if p.is_meta), names, places, read, ranks, device)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    root = Root(model)
    fully_shard(root, **options)
    model.sharded_as = (root,)  # in a tuple, so that it isn't taken for a part of the model
    model.computes_on = torch.device(device)


def device_of(model: Any) -> torch.device:
    """Where a model computes, wherever its weights lie."""
    return getattr(model, "computes_on", None) or next(model.parameters()).device


def _places(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Where each parameter is: at several places if it is tied."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            found.setdefault(id(parameter), []).append((module, name))
    return found


def _copy(whole: Tensor, read: Callable[[str], Tensor], name: str) -> None:
    whole.copy_(read(name))


def _fill(
    parameters: Iterable[nn.Parameter],
    names: dict[int, str],
    places: dict[int, list[tuple[nn.Module, str]]],
    read: Callable[[str], Tensor],
    ranks: Ranks,
    device: str,
) -> None:
    for old in list(parameters):
        whole = torch.empty(old.shape, dtype=old.dtype, device=device)
        ranks.by_the_first(partial(_copy, whole, read, names[id(old)]))
        dist.broadcast(whole, 0)
        new = nn.Parameter(whole, requires_grad=old.requires_grad)
        for module, name in places[id(old)]:
            module.register_parameter(name, new)
