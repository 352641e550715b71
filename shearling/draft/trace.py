"""One forward pass of a model, written down: what came into each of its modules and what went out.

B sequences, T tokens, D hidden.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shearling.draft.refused import Refused

TOLERANCE = 1e-6  # relative; probes run in float64, but many norms compute in float32


@dataclass(frozen=True)
class Call:
    """One call of one module: its path, and the first tensor of its arguments and of its results."""

    path: str
    module: nn.Module
    input: Tensor
    output: Tensor

    @property
    def own(self) -> tuple[str, ...]:
        """Names of the parameters that are the module's own, none of a module inside it."""
        return tuple(name for name, _ in self.module.named_parameters(recurse=False))


@dataclass(frozen=True)
class Trace:
    """All calls in the order in which they ended, the blocks' paths in order, the ids and the logits."""

    calls: tuple[Call, ...]
    blocks: tuple[str, ...]
    ids: Tensor
    logits: Tensor

    def at(self, path: str) -> Call:
        return next(call for call in self.calls if call.path == path)

    def units(self) -> tuple[Call, ...]:
        """The calls of modules that have parameters of their own."""
        return tuple(call for call in self.calls if call.own)

    def inside(self, block: str) -> tuple[Call, ...]:
        """The units of one block, in order."""
        return tuple(call for call in self.units() if call.path.startswith(f"{block}."))


def blocks_of(model: nn.Module, layers: int) -> tuple[str, ...]:
    """The paths of the layers' modules. Raises Refused where no list of so many holds most of the inner parameters."""
    lists = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == layers]
    if not lists:
        raise Refused(f"no list of {layers} modules was found for {layers} layers")
    path, _ = max(lists, key=lambda item: (sum(p.numel() for p in item[1].parameters()), -len(item[0])))
    return tuple(f"{path}.{i}" for i in range(layers))


@torch.no_grad()
def trace(model: nn.Module, ids: Tensor, *, layers: int) -> Trace:
    """Runs ids [B, T]. Raises Refused for a module that is called twice."""
    calls: list[Call] = []
    handles = []
    for path, module in model.named_modules():

        def note(module: nn.Module, args: tuple, kwargs: dict, output: Any, path: str = path) -> None:
            came, went = _first((*args, *kwargs.values())), _first((output,))
            if came is not None and went is not None:
                calls.append(Call(path, module, came.clone(), went.clone()))

        if path:
            handles.append(module.register_forward_hook(note, with_kwargs=True))
    try:
        logits = model(ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    found = Trace(tuple(calls), blocks_of(model, layers), ids, logits)
    paths = [call.path for call in found.units()]
    twice = sorted({path for path in paths if paths.count(path) > 1})
    if twice:
        raise Refused(f"{twice[0]} is called {paths.count(twice[0])} times in one pass")
    return found


def explain(target: Tensor, candidates: Sequence[Tensor]) -> dict[int, float] | None:
    """target = sum of c_j candidates[j]: the c_j that aren't 0, by j; None where no such sum is the target.

    Candidates of another number of entries are broadcast to the target's shape or left out.
    """
    columns = {j: column for j, c in enumerate(candidates) if (column := _as(c, target)) is not None}
    found: dict[int, float] = {}
    for _ in range(2):  # a second time with the non-zero ones alone, for exact coefficients
        if not columns:
            return None
        matrix = torch.stack([column.double() for column in columns.values()], dim=1)
        weights = torch.linalg.lstsq(matrix, target.double().reshape(-1, 1), driver="gelsd").solution.squeeze(1)
        left = matrix @ weights - target.double().reshape(-1)
        if float(left.norm()) > TOLERANCE * max(float(target.double().norm()), 1e-12):
            return None
        found = {j: float(w) for j, w in zip(columns, weights.tolist(), strict=True) if abs(w) > TOLERANCE}
        columns = {j: columns[j] for j in found}
    return found


def same(left: Tensor, right: Tensor) -> bool:
    """Whether two activations are equal entry by entry, whatever their leading dims."""
    if left.numel() != right.numel():
        return False
    left, right = left.detach().reshape(-1).double(), right.detach().reshape(-1).double()
    return bool((left - right).norm() <= TOLERANCE * max(float(right.norm()), 1e-12))


def _as(candidate: Tensor, target: Tensor) -> Tensor | None:
    if candidate.numel() == target.numel() and candidate.shape[-1] == target.shape[-1]:
        return candidate.reshape(-1)
    try:
        return candidate.expand_as(target).reshape(-1)
    except RuntimeError:
        return None


def _first(values: Sequence[Any]) -> Tensor | None:
    return next((t for t in _tensors(values) if t.is_floating_point() or t.dtype == torch.int64), None)


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)
        elif hasattr(value, "to_tuple"):
            yield from _tensors(value.to_tuple())
