"""What `make docs` makes is current, and every table has been proved as it is now."""

import json
import subprocess
from pathlib import Path
from runpy import run_path

import pytest
import yaml

from shearling.arch import families
from shearling.conformance.page import stale

ROOT = Path(__file__).parents[1]


def test_the_generated_pages_are_current() -> None:
    for path, text in run_path(str(ROOT / "docs" / "generate.py"))["generated"]().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is not what the tables say: run `make docs`"


def test_every_table_has_been_proved() -> None:
    proofs = json.loads((ROOT / "benchmarks" / "conformance.json").read_text())
    missing = [model_type for _, model_type in stale(families(), proofs)]
    assert not missing, f"no proof of the tables of {missing}: run `make docs`"
    assert not {model_type: proof["broken"] for model_type, proof in proofs.items() if proof["broken"]}


@pytest.mark.parametrize("name", ["kubernetes.yaml", "skypilot.yaml"])
def test_launch_files_are_yaml_that_runs_a_recipe(name: str) -> None:
    found = list(yaml.safe_load_all((ROOT / "launch" / name).read_text(encoding="utf-8")))
    said = " ".join(json.dumps(found).replace('", "', " ").split())
    assert "-m shearling.cli run" in said
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE" in said


def test_the_slurm_script_is_bash() -> None:
    subprocess.run(["bash", "-n", ROOT / "launch" / "slurm.sbatch"], check=True)
