"""What a training step takes in memory: the step is rehearsed on tensors that have no storage, and counted.

Nothing of it is a formula, so nothing of it is about a family, a mask or a loss: the objective that will train runs on
the model that will be trained, and each storage that the tensors would have is counted from when it is made until the
last tensor in it is gone. What can't be seen is what kernels take inside themselves, and what an allocator loses.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._library.custom_ops import _maybe_get_opdef as opdef_of
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shearling.data.batch import Batch
from shearling.train.objective import Losses

FULL = torch.float32.itemsize  # of what learns, and of its gradients where they are kept
GROUPED = torch.ops.aten._grouped_mm.default


class Ledger(TorchDispatchMode):
    """Counts the bytes on a device by part, while it is entered; `peak` are the parts when most was there.

    What is made belongs to the part that is `current`, except casts of weights, which autocast keeps. Weights that were
    there before are held by `hold`.
    """

    def __init__(self, device: str):
        super().__init__()
        self.device = torch.empty(0, device=device).device  # which has a number where that had none
        self.current = "activations"
        self.peak: Mapping[str, int] = {}
        self._live: dict[int, tuple[int, str]] = {}
        self._sums: Counter[str] = Counter()
        self._now = self._most = 0
        self._weights: set[int] = set()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What is made within belongs to `name`."""
        before, self.current = self.current, name
        try:
            yield
        finally:
            self.current = before

    def hold(self, tensors: Iterable[Tensor], part: str, nbytes: Callable[[Tensor], int] | None = None) -> None:
        """Counts tensors as they are, or by what `nbytes` says that each will take."""
        for tensor in tensors:
            self._weights.add(tensor.untyped_storage()._cdata)
            self._note(tensor, part, None if nbytes is None else nbytes(tensor))

    def move(self, tensor: Tensor, part: str, nbytes: int | None = None) -> None:
        """Has what a tensor is in belong to another part from now on, and take so many bytes there."""
        key = tensor.untyped_storage()._cdata
        if key in self._live:
            nbytes = self._live[key][0] if nbytes is None else nbytes
            self._gone(key)
            self._count(key, nbytes, part)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "prim":  # which asks for a tensor's device, very often
            return func(*args, **(kwargs or {}))
        found = self._run(func, args, kwargs or {})
        cast = func is torch.ops.aten._to_copy.default and args[0].untyped_storage()._cdata in self._weights
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                self._note(leaf, "casts" if cast else self.current)
        return found

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is GROUPED:
            return _grouped(*args, **kwargs)
        written = opdef_of(func)
        if written is None:
            return func(*args, **kwargs)
        with self:  # written in Python, as torch's chunked cross-entropy is: what it makes inside counts too
            return written._init_fn(*args, **kwargs)

    def _note(self, tensor: Tensor, part: str, nbytes: int | None = None) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        device = tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device
        if key in self._live or device != self.device:
            return
        self._count(key, storage.nbytes() if nbytes is None else nbytes, part)
        weakref.finalize(storage, self._gone, key)

    def _count(self, key: int, nbytes: int, part: str) -> None:
        self._live[key] = (nbytes, part)
        self._sums[part] += nbytes
        self._now += nbytes
        if self._now > self._most:
            self._most, self.peak = self._now, dict(self._sums)

    def _gone(self, key: int) -> None:
        nbytes, part = self._live.pop(key)
        self._sums[part] -= nbytes
        self._now -= nbytes


@contextmanager
def pretending(device: str) -> Iterator[None]:
    """Within it tensors have sizes and devices and no storage; they are made on `device` if nothing else is said."""
    with FakeTensorMode(), torch.device(device):
        yield


def rehearse(
    model: Any,
    objective: Callable[[Any, Batch], Losses],
    batch: Batch,
    *,
    ledger: Ledger,
    autocast: torch.dtype | None,
    accumulates: bool,
    apart: Iterable[nn.Module] = (),
    whole: Iterable[Tensor] | None = None,
) -> None:
    """A micro-batch forward and backward, into gradients that are there already if it `accumulates`.

    Within `pretending`, all of it, and the model's weights held by the ledger. What the models make that are `apart`
    (a teacher) belongs to "teacher". Where the model is sharded, `whole` are the parameters whose gradients wait for
    the step's end before they are shared out: until then those belong to "gathered".
    """
    kind = batch.ids.device.type
    parameters = [p for p in model.parameters() if p.requires_grad]
    waiting = None if whole is None else {id(p) for p in whole}

    def made(parameter: Tensor) -> None:
        assert parameter.grad is not None
        if waiting is not None and id(parameter) in waiting:
            ledger.move(parameter.grad, "gathered")
        elif waiting is not None and accumulates:
            parameter.grad = None
        else:
            ledger.move(parameter.grad, "gradients", FULL * parameter.numel())

    with ledger, ExitStack() as hooks:
        kept = []
        if accumulates:
            with ledger.part("gradients"):
                kept = [torch.empty_like(p, dtype=torch.float32) for p in parameters]
        if waiting is None:
            for parameter, grad in zip(parameters, kept, strict=False):
                parameter.grad = grad
        for parameter in parameters:
            hooks.callback(parameter.register_post_accumulate_grad_hook(made).remove)
        for other in apart:
            hooks.callback(other.register_forward_pre_hook(lambda *_: _turn(ledger, "teacher")).remove)
        hooks.callback(model.base_model.register_forward_pre_hook(lambda *_: _turn(ledger, "activations")).remove)
        hooks.callback(model.base_model.register_forward_hook(lambda _, args, out: _after(ledger, out)).remove)
        with torch.autocast(kind, dtype=autocast, enabled=autocast is not None):
            losses = objective(model, batch)
        losses.total.backward()
        ledger.current = "activations"


def _turn(ledger: Ledger, part: str) -> None:
    ledger.current = part


def _after(ledger: Ledger, output: Any) -> None:
    """From the model's last hidden states to their gradient all is the head's."""
    ledger.current = "logits"
    hidden = output.last_hidden_state
    if hidden.requires_grad:
        hidden.register_hook(lambda grad: _turn(ledger, "activations"))


def _grouped(a: Tensor, b: Tensor, offsets: Tensor | None = None, *rest: Any, **options: Any) -> Tensor:
    # Of experts' products. What torch has for tensors without storage refuses fp32, which the kernels take.
    if a.dim() == 2 and b.dim() == 2:
        assert offsets is not None
        return a.new_empty(len(offsets), a.shape[0], b.shape[1])
    if a.dim() == 3 and b.dim() == 2:
        return a.new_empty(a.shape[1], b.shape[1])
    return a.new_empty(*a.shape[:-1], b.shape[-1])
