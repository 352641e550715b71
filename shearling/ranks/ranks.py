"""The processes of one run: what they agree on and what they sum up."""

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore, PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from shearling.errors import OnAnotherRank, UserError

T = TypeVar("T")
TIMEOUT = timedelta(minutes=10)  # of what a step exchanges: longer, and somebody has died without being missed
PATIENCE = timedelta(days=7)  # of what ranks agree on: one may be preparing the data for all
JOINS = itertools.count()  # of this process


@dataclass(frozen=True)
class Ranks:
    """This process, and how many there are. `group` carries what they have to agree on, by the CPU, and `saving` the
    same for a thread that writes beside it; over `mesh` tensors are sharded (and replicated, if it has two dims).
    `offload`: what isn't used just now of what is sharded lies in the computer's memory.

    One process is not a special case: it agrees with itself, and it has a mesh if it offloads.
    """

    rank: int = 0
    count: int = 1
    group: Any = None
    saving: Any = None
    mesh: DeviceMesh | None = None
    offload: bool = False

    @property
    def first(self) -> bool:
        """Whether this is the one that speaks for all."""
        return self.rank == 0

    def any(self, *flags: bool, in_step: bool = False) -> tuple[bool, ...]:
        """Of each flag, whether it is up on some rank. Every rank comes here, and waits for the others: `in_step` for
        no longer than they may take to a step.
        """
        if self.count == 1:
            return flags
        found = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=None if in_step else self.group)
        return tuple(bool(flag) for flag in found.tolist())

    def meet(self) -> None:
        """Waits until every rank has come here."""
        self.any(False)

    def sum(self, number: int) -> int:
        """Of a number on each rank, in a step. Every rank comes here."""
        if self.count == 1:
            return number
        found = torch.tensor(number)
        dist.all_reduce(found)
        return int(found)

    def add_up(self, tensor: Tensor) -> Tensor:
        """A tensor's sum over ranks, in its place: on its own device, which nobody waits for."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def together(self, work: Callable[[], T]) -> T:
        """Does some work on every rank. Where it fails on one it fails on all: with its own error there.

        What only the first has to do, the others come here for with something that does nothing.
        """
        failed: BaseException | None = None
        found: Any = None
        try:
            found = work()
        except Exception as error:
            failed = error
        if any(self.any(failed is not None)):
            raise failed or OnAnotherRank
        return found

    def one_before_others(self, work: Callable[[], T]) -> T:
        """Does some work on every rank, on each machine's first before its others: they find what it has cached."""
        early = int(os.environ.get("LOCAL_RANK", "0")) == 0
        found: Any = self.together(work if early else lambda: None)
        return self.together((lambda: found) if early else work)

    def told(self, work: Callable[[], str]) -> str:
        """A text that the first finds, on every rank. All come here, and fail if it does."""
        found = self.together(work if self.first else str).encode()
        if self.count > 1:
            raw = torch.zeros(self.sum(len(found)), dtype=torch.uint8)
            if self.first:
                raw = torch.tensor(list(found), dtype=torch.uint8)
            dist.broadcast(raw, 0, group=self.group)
            found = bytes(raw.tolist())
        return found.decode()

    def by_the_first(self, work: Callable[[], Any]) -> None:
        """Has the first do some work, while the others wait for it."""
        self.together(work if self.first else lambda: None)


def has_own_memory(device: str) -> bool:
    """Whether what lies on a device of this kind isn't in the computer's memory."""
    return torch.device(device).type not in ("cpu", "mps")


@contextmanager
def joined(device: str, *, replicate: int = 1, offload: bool = False) -> Iterator[tuple[Ranks, str]]:
    """This process among those that torchrun has started, and its device of the kind asked for; alone without torchrun.

    `replicate` groups of ranks each hold a whole model, sharded among them. Raises UserError unless it divides them,
    where there is nothing to `offload` from, and for several ranks on MPS.
    """
    if offload and not has_own_memory(device):
        change = "leave offload out: weights are in the computer's memory already"
        raise UserError("offload", found=f"device {device}", expected="cuda", change=change)
    count = int(os.environ.get("WORLD_SIZE", "1"))
    kind, own = torch.device(device).type, not dist.is_initialized()
    if kind == "mps" and count > 1:  # torch has nothing by which they could exchange what lies there
        change = "start it without torchrun, or take --device cpu"
        raise UserError("device", found=f"mps for {count} ranks", expected="one process on mps", change=change)
    if count % replicate:
        fitting = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
        change = f"one of {fitting}"
        raise UserError("--replicate", found=replicate, expected=f"a divisor of the {count} ranks", change=change)
    if count == 1 and not offload:
        yield ALONE, device
        return
    if kind != "cpu":
        if count > 1 or ":" not in device:
            device = f"{kind}:{os.environ.get('LOCAL_RANK', torch.accelerator.current_device_index())}"
        torch.accelerator.set_device_index(device)
    if own:
        place: dict[str, Any] = {"store": HashStore(), "rank": 0, "world_size": 1}
        if count > 1:
            store = _store()
            place = {"store": store, "rank": int(os.environ["RANK"]), "world_size": count} if store else {}
        backends = {"cpu": "gloo", kind: dist.get_default_backend_for_device(kind)}
        dist.init_process_group(",".join(map(":".join, backends.items())), timeout=TIMEOUT, **place)
    try:
        group, saving = (dist.new_group(backend="gloo", timeout=PATIENCE) for _ in range(2))
        shape, names = ((count,), ("shard",))
        if replicate > 1:
            shape, names = (replicate, count // replicate), ("replicate", "shard")
        mesh = init_device_mesh(kind, shape, mesh_dim_names=names)
        yield Ranks(dist.get_rank(), count, group, saving, mesh, offload), device
    finally:
        if own:
            dist.destroy_process_group()


def _store() -> PrefixStore | None:
    """Where ranks find each other's addresses, apart for each time that they join or that torchrun starts them again.

    torchrun's own store keeps those of ranks that have died (pytorch issue 135712). Over several machines the count of
    starts isn't the same everywhere: there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 does it, see docs/scale.md.
    """
    said = os.environ
    shared = said.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if shared and said["LOCAL_WORLD_SIZE"] != said["WORLD_SIZE"]:
        return None
    start = said["TORCHELASTIC_RESTART_COUNT"] if shared else "own"
    return PrefixStore(f"start {start}, join {next(JOINS)}", _plain_store(serves=not shared and said["RANK"] == "0"))


@cache
def _plain_store(*, serves: bool) -> TCPStore:
    """This process's, as long as it lives: its port is taken until then."""
    return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=serves, timeout=TIMEOUT)


ALONE = Ranks()
