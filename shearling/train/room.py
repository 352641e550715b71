"""How much memory there is for a run: what is free on its device, and what it may take of that."""

import resource
from dataclasses import dataclass
from pathlib import Path

import torch

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
# Of what is read of files the kernel drops what it needs to; by (memory.stat's key) in either version of cgroups.
DROPPED = {"memory.max": ("inactive_file", "active_file"), "memory.limit_in_bytes": ("total_inactive_file",)}
USED = {"memory.max": "memory.current", "memory.limit_in_bytes": "memory.usage_in_bytes"}


@dataclass(frozen=True)
class Room:
    """Bytes that can still be taken, and who says so."""

    nbytes: int
    by: str


def room_on(device: str) -> Room | None:
    """On a device, the least of what limits it; None where nothing tells."""
    kind = torch.device(device).type
    if kind == "cpu":
        found = [*_machine(), *_groups(), *_limits()]
        return min(found, key=lambda room: room.nbytes, default=None)
    if kind == "mps":
        return Room(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory(), device)
    free, _ = torch.accelerator.get_memory_info(device)
    unused = torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device)
    return Room(free + unused, device)


def _machine() -> list[Room]:
    free = _field(PROC / "meminfo", "MemAvailable:")
    return [] if free is None else [Room(free * 1024, "this machine")]


def _groups() -> list[Room]:
    """Of the cgroups that this process is in, and of those around them."""
    found = []
    for line in _lines(PROC / "self" / "cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        limit = "memory.limit_in_bytes" if controllers else "memory.max"
        root = CGROUPS / controllers
        for folder in (inner := root / path.lstrip("/"), *inner.parents):
            if folder.is_relative_to(root):
                found += _group(folder, limit)
    return found


def _group(folder: Path, limit: str) -> list[Room]:
    most, used = (_lines(folder / name) for name in (limit, USED[limit]))
    if not most or not used or not most[0].isdecimal():  # "max" is none
        return []
    dropped = sum(_field(folder / "memory.stat", key) or 0 for key in DROPPED[limit])
    return [Room(max(0, int(most[0]) - int(used[0]) + dropped), f"the limit of the cgroup {folder}")]


def _limits() -> list[Room]:
    """Of this process, as `ulimit` sets them."""
    found = []
    for name, field in (("RLIMIT_AS", "VmSize:"), ("RLIMIT_DATA", "VmData:")):
        most, taken = resource.getrlimit(getattr(resource, name))[0], _field(PROC / "self" / "status", field)
        if most != resource.RLIM_INFINITY and taken is not None:
            found.append(Room(max(0, most - taken * 1024), f"this process's limit ({name})"))
    return found


def _field(path: Path, name: str) -> int | None:
    return next((int(words[1]) for line in _lines(path) if (words := line.split())[:1] == [name]), None)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
