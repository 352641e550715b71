"""What memory there is, out of what a machine, its cgroups of either version and a process's own limits say."""

import resource

import pytest

from shearling.train import room
from shearling.train.room import Room, room_on


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Writes files of /proc and of /sys/fs/cgroup; no limits on this process."""
    monkeypatch.setattr(room, "PROC", tmp_path / "proc")
    monkeypatch.setattr(room, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    def write(**files: str) -> None:
        for name, text in files.items():
            path = tmp_path.joinpath(*name.split("__"))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    write(proc__meminfo="MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    return write


def test_a_machine_by_itself(machine) -> None:
    assert room_on("cpu") == Room(8000 * 1024, "this machine")


def test_version_2_counts_all_groups_around(machine, tmp_path) -> None:
    machine(proc__self__cgroup="0::/box/inner\n")
    machine(**{"cgroup__box__inner__memory.max": "max\n", "cgroup__box__inner__memory.current": "10\n"})
    machine(**{"cgroup__box__memory.max": "5000\n", "cgroup__box__memory.current": "3000\n"})
    machine(**{"cgroup__box__memory.stat": "anon 100\ninactive_file 500\nactive_file 70\n"})
    assert room_on("cpu") == Room(2570, f"the limit of the cgroup {tmp_path / 'cgroup' / 'box'}")


def test_version_1(machine) -> None:
    machine(proc__self__cgroup="9:name=systemd:/\n4:memory:/box\n3:cpuset:/\n0::/\n")
    machine(**{"cgroup__memory__box__memory.limit_in_bytes": "5000\n"})
    machine(**{"cgroup__memory__box__memory.usage_in_bytes": "6000\n"})
    machine(**{"cgroup__memory__box__memory.stat": "total_inactive_file 400\n"})
    found = room_on("cpu")
    assert found is not None
    assert found.nbytes == 0


def test_a_limit_of_the_process(machine, monkeypatch) -> None:
    machine(proc__self__status="VmSize: 40 kB\nVmData: 30 kB\n")
    monkeypatch.setattr(
        resource, "getrlimit", lambda which: (100 << 10, 0) if which == resource.RLIMIT_AS else (-1, -1)
    )
    assert room_on("cpu") == Room(60 << 10, "this process's limit (RLIMIT_AS)")


def test_where_nothing_tells(machine, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(room, "PROC", tmp_path / "none")
    assert room_on("cpu") is None
