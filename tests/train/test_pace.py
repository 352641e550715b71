"""Speed as the record has it, and what devices can do at most."""

from itertools import pairwise

import pytest
import torch

from shearling.train import pace as module
from shearling.train.device import PEAKS, peak_bytes, peak_flops, peak_flops_of
from shearling.train.pace import Pace

NAMES = {
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989.5e12,
    "NVIDIA H100 PCIe": 756.5e12,
    "NVIDIA H200": 989.5e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA A10G": 70e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
    "Tesla V100-SXM2-16GB": 125e12,
    "Tesla V100-PCIE-32GB": 112e12,
    # Parts of a device, and others of nearly the same name.
    "NVIDIA A100-SXM4-40GB MIG 1g.5gb": None,
    "NVIDIA GeForce RTX 4090 Laptop GPU": None,
    "NVIDIA GeForce RTX 3090 Ti": None,
    "NVIDIA L400": None,
    "somebody's": None,
}


@pytest.mark.parametrize(("name", "flops"), NAMES.items())
def test_peaks_by_name(name, flops) -> None:
    assert peak_flops_of(name) == flops


def test_the_more_telling_names_come_first() -> None:
    for (one, _), (_, _) in pairwise(PEAKS):
        assert peak_flops_of(f"NVIDIA {one}") == dict(PEAKS)[one]


def test_a_cpu_has_no_peak_and_its_memory_is_the_process_s() -> None:
    cpu = torch.device("cpu")
    assert peak_flops(cpu) is None
    before = peak_bytes(cpu)
    assert before > 50_000_000
    assert peak_bytes(cpu) >= before


def test_figures_since_the_last_time_without_pauses(monkeypatch) -> None:
    now = 0.0
    monkeypatch.setattr(module, "perf_counter", lambda: now)
    monkeypatch.setattr(module, "peak_flops", lambda device: 100.0)
    pace = Pace(torch.device("cpu"), ranks=2, flops_per_token=3.0, tokens=50)
    now = 4.0
    pace.waited(since=3.0)
    found = pace.figures(tokens=130)
    # 80 tokens in 4 s, 60 FLOP/s of 200.
    assert (found["tokens_per_second"], found["data_wait_share"], found["mfu"]) == (20.0, 0.25, 0.3)
    now = 10.0
    pace.paused(since=5.0)
    assert pace.figures(tokens=140)["tokens_per_second"] == 10.0
