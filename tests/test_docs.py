"""What `make docs` makes is current, and every table has been proved as it is now."""

import json
import os
import re
import signal
import subprocess
from pathlib import Path
from runpy import run_path
from time import sleep

import pytest
import yaml
from torch.distributed.run import get_args_parser

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


def stand_ins(folder: Path, **scripts: str) -> dict[str, str]:
    """An environment in which commands are those scripts."""
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder / name).chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}


SLURM = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "a,b", "SLURM_JOB_NUM_NODES": "2"}
SKY = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "8", "SKYPILOT_NODE_IPS": "a\nb", "RECIPE": "r.yaml"}


@pytest.mark.parametrize("name", ["kubernetes.yaml", "skypilot.yaml", "slurm.sbatch"])
def test_torchrun_takes_what_launch_files_give_it_and_leaves_ranks_time_to_save(tmp_path: Path, name: str) -> None:
    text = (ROOT / "launch" / name).read_text(encoding="utf-8")
    if name == "kubernetes.yaml":
        pod = list(yaml.safe_load_all(text))[1]["spec"]["template"]["spec"]
        words, grace = pod["containers"][0]["command"][1:], pod["terminationGracePeriodSeconds"]
    else:
        script = text if name == "slurm.sbatch" else yaml.safe_load(text)["run"].replace("cd /work", "")
        env = stand_ins(tmp_path, srun='shift; exec "$@"', scontrol="echo a", torchrun='printf "%s\\n" "$@"')
        ran = subprocess.run(
            ["bash", "-c", script, "-", "recipe.yaml"],
            env=env | SLURM | SKY,
            check=True,
            capture_output=True,
            text=True,
        )
        words, told = ran.stdout.splitlines(), re.search(r"--signal=B:USR1@(\d+)", text)
        grace = int(told[1]) if told else 300
    asked = get_args_parser().parse_args(words)
    assert (asked.module, asked.training_script, asked.training_script_args[0]) == (True, "shearling.cli", "run")
    assert asked.max_restarts == 3
    assert asked.shutdown_timeout == 270
    assert asked.shutdown_timeout + 30 <= grace


# In srun's place: ends with a code of its own, or is told to stop, saves for a moment and ends as torchrun does.
SRUN = """
trap 'sleep 0.5; echo saved >> told; exit 1' TERM
touch running
[[ $ENDS ]] && exit "$ENDS"
while :; do sleep 0.05; done
"""


@pytest.mark.parametrize(
    ("signals", "ends", "code", "told"),
    [
        ([], "0", 0, []),
        ([], "3", 3, []),  # by itself
        ([signal.SIGUSR1], "", 1, ["saved", "requeue 7"]),
        ([signal.SIGTERM, signal.SIGUSR1], "", 1, ["saved", "requeue 7"]),
    ],
)
def test_the_slurm_script_requeues_what_runs_out_of_time_and_nothing_else(tmp_path, signals, ends, code, told) -> None:
    env = stand_ins(tmp_path, srun=SRUN, scontrol='[[ $1 = show ]] || echo "$@" >> told') | SLURM | {"ENDS": ends}
    with subprocess.Popen(["bash", ROOT / "launch" / "slurm.sbatch", "recipe.yaml"], cwd=tmp_path, env=env) as process:
        while signals and not (tmp_path / "running").exists():
            assert process.poll() is None
            sleep(0.05)
        for number in signals:
            sleep(0.2)
            process.send_signal(number)
        assert process.wait(60) == code
    found = tmp_path / "told"
    assert (found.read_text().splitlines() if found.exists() else []) == told
