"""Two ranks of one thread against one process of two threads, on a CPU: what sharding loses.

    python benchmarks/two_ranks.py WORK_FOLDER    prints, and writes benchmarks/two_ranks.json

A Llama of some ten million parameters heals for STEPS steps, by torchrun on two ranks (gloo, FSDP2) and in one process,
in turn. Ratios of tokens per second, as the records have them over the steps after the first.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
from datetime import datetime
from itertools import pairwise
from pathlib import Path

from shearling.demo.corpus import write_corpus
from shearling.demo.models import SOURCE, write_tokenizer, write_untrained
from shearling.recipe import Data, validated
from shearling.record import read, versions
from shearling.verbs.data import make_store

STEPS, PAIRS, TOKENS = 8, 5, 4096
MODEL = {**SOURCE, "hidden_size": 320, "num_hidden_layers": 8, "head_dim": 40, "intermediate_size": 896}


def healed(work: Path, launcher: list[str], threads: int) -> float:
    """Seconds a step, after the first."""
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    words = ["heal", work / "model", "--data", work / "store", "--out", out, "--steps", STEPS, "--device", "cpu"]
    words += ["--batch-tokens", TOKENS, "--seq-len", 256, "--micro-batch", 8, "--mixture", "proportional", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, *launcher, "-m", "shearling.cli", *map(str, words)]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    times = [datetime.fromisoformat(e["time"]) for e in read(out / "record.jsonl") if e["event"] == "step"]
    return statistics.median((b - a).total_seconds() for a, b in pairwise(times))


def main(work: Path) -> None:
    if not (work / "model").exists():
        write_corpus(work / "corpus")
        write_tokenizer(work / "corpus", work / "tokenizer")
        write_untrained(MODEL, work / "model", tokenizer=work / "tokenizer", seed=0)
    asked = validated(Data, {"inputs": [str(work / "corpus")]})
    make_store(asked, tokenizer=str(work / "model"), out=str(work / "store"))
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    ratios = [healed(work, [], 2) / healed(work, two, 1) for _ in range(PAIRS)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    result = {"over_one_process": middle, "quartiles": [low, high], "pairs": PAIRS, "versions": versions()}
    print(json.dumps(result, indent=1))
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
