"""The GPU's benchmark at toy size, on a CPU: every measurement gives figures, or says that it needs CUDA."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

OF_CUDA = (
    *(f"host waits, {kind}" for kind in ("plain", "masked")),
    *(f"kernels, {kind}{end}" for kind in ("plain", "masked") for end in ("", ", compiled")),
    *(f"memory, {options}" for options in ("adamw8bit", "offload", "full, offload")),
    "same bits, compiled",
    "speed, 135m, liger",
)
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


@pytest.mark.slow
def test_gpu_py_runs_tiny_on_a_cpu(tmp_path) -> None:
    done = subprocess.run([sys.executable, SCRIPT, tmp_path, "--tiny"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "gpu.json").read_text())
    found = result["found"]
    assert {name: said for name, said in found.items() if "failed" in said} == {}
    skipped = {name: said["skipped"] for name, said in found.items() if "skipped" in said}
    assert skipped == dict.fromkeys(OF_CUDA, "no CUDA device")
    for verb in ("prune", "heal"):
        same = found["same bits, deterministic"][verb]
        assert same == {"stopped": True, "weights_equal": True, "record_equal": True}
    assert found["speed, 135m"]["tokens_per_second"] > 0
    assert found["speed, 135m"]["mfu"] is None  # nobody knows what a CPU can do


@pytest.mark.slow
def test_gpu_py_says_what_there_was_no_time_for(tmp_path) -> None:
    command = [sys.executable, SCRIPT, tmp_path, "--tiny", "--seconds", "0"]
    assert subprocess.run(command, capture_output=True).returncode == 0
    found = json.loads((tmp_path / "gpu.json").read_text())["found"]
    assert all("skipped" in said for said in found.values())
    assert "left of the budget" in found["memory, masks"]["skipped"]
