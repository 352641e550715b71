"""What checkpoints cost: time taken from the steps, memory beside it, and going on from one.

    python benchmarks/saving.py WORK_FOLDER    prints, and writes benchmarks/saving.json

A random Llama of some fifty million parameters heals on random tokens, in fp32 with AdamW, on as many threads as torch
takes. Interleaved stretches of steps, one with a save at its beginning and one without: what a save adds, in steps and
as a share of ten minutes, in which there is one. Going on: the time from the files to tensors in place, by the time of
reading and hashing them alone. Memory: what the peak of anonymous memory grows by while a save is on its way.
"""

import json
import shutil
import statistics
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from shearling.data.batch import Batch
from shearling.loss.cross_entropy import next_token_loss
from shearling.ranks.ranks import ALONE
from shearling.record import versions
from shearling.train.checkpoint import Checkpoints, file_sum
from shearling.train.optim import adamw
from shearling.verbs.keeping import Held

STRETCH, ROUNDS, TEN_MINUTES = 6, 7, 600.0
SEQUENCES, LENGTH = 2, 256


def anonymous_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Anonymous:"))


def peak_of(work: Callable[[], object]) -> int:
    """The peak of anonymous memory while some work is done, sampled."""
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    done.set()
    watcher.join()
    return peak


def seconds_of(work: Callable[[], object]) -> float:
    before = perf_counter()
    work()
    return perf_counter() - before


def main(work: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "num_hidden_layers": 10, "intermediate_size": 1408, "vocab_size": 32000}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).train()
    held = Held(model, (adamw(model.parameters(), lr=1e-4),), {})
    ids = torch.randint(0, 32000, (SEQUENCES, LENGTH + 1))

    def step() -> None:
        next_token_loss(model, Batch(ids, (0,) * SEQUENCES).ids).backward()
        held.optimizers[0].step()
        held.optimizers[0].zero_grad(set_to_none=True)

    def stretch() -> None:
        for _ in range(STRETCH):
            step()

    step()
    number, extra, copying, steps = 0, [], [], []
    folder = work / "checkpoints"
    shutil.rmtree(folder, ignore_errors=True)
    with Checkpoints(folder, run="benchmark", ranks=ALONE) as checkpoints:
        for _ in range(ROUNDS):
            without = seconds_of(stretch)
            number += 1
            saving = seconds_of(lambda: checkpoints.save(number, held.tensors(), {}))  # noqa: B023
            with_one = saving + seconds_of(stretch) + seconds_of(checkpoints.wait)
            extra.append(with_one - without)
            copying.append(saving)
            steps.append(without / STRETCH)
        plain, number = peak_of(stretch), number + 1

        def saved() -> None:
            checkpoints.save(number, held.tensors(), {})
            stretch()
            checkpoints.wait()

        beside = peak_of(saved) - plain

    files = [path for path in (folder / f"step-{number}").rglob("*") if path.is_file()]
    nbytes = sum(path.stat().st_size for path in files)
    ratios = []
    for _ in range(ROUNDS):
        alone = seconds_of(lambda: [file_sum(path) for path in files])

        def taken_up() -> None:
            found = Checkpoints(folder, run="benchmark", ranks=ALONE).newest()
            assert found is not None
            held.load(found, ALONE)

        ratios.append(seconds_of(taken_up) / alone)
    shutil.rmtree(folder)
    step_seconds = statistics.median(steps)
    result = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "checkpoint_bytes": nbytes,
        "save_in_steps": statistics.median(extra) / step_seconds,
        "of_which_waited_for": statistics.median(copying) / step_seconds,
        "share_of_ten_minutes": statistics.median(extra) / TEN_MINUTES,
        "share_of_ten_minutes_at_most": max(extra) / TEN_MINUTES,
        "memory_beside_bytes": beside,
        "going_on_over_reading_and_hashing": statistics.median(ratios),
        "quartiles": statistics.quantiles(ratios, n=4)[::2],
        "rounds": ROUNDS,
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    print(json.dumps(result, indent=1))
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
