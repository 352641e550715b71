"""A distilled training step against a plain step and the teacher's forward pass: time and peak memory.

    python benchmarks/distilled_step.py         writes benchmarks/distilled_step.json

Time: the three in turn in one process, median and quartiles of distilled / (plain + teacher), triple by triple.
Memory: each step in a process of its own that holds both models, peak resident set above what it was before the first
step. A step is forward, backward and AdamW on all weights, in fp32; the teacher's pass goes as far as its logits, a
chunk at a time. "hidden" compares the residual streams after each of the student's layers as well.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from shearling.data.batch import Batch
from shearling.loss.distillation import Dense, chunks
from shearling.record import versions
from shearling.teacher.live import LiveTeacher
from shearling.train.distilled import Distilled, Streams
from shearling.train.objective import NextToken, Objective
from shearling.train.optim import adamw

VOCAB, SEQUENCES, SEQ_LEN = 8192, 8, 256
STUDENT = {"hidden": 256, "layers": 4, "heads": 4, "kv": 2, "inner": 704}
TEACHER = {"hidden": 512, "layers": 8, "heads": 8, "kv": 4, "inner": 1408}
LIMIT = 1.10


def model(shape: dict[str, int]) -> Any:
    torch.manual_seed(0)
    made = AutoConfig.for_model(
        "llama",
        hidden_size=shape["hidden"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv"],
        intermediate_size=shape["inner"],
        vocab_size=VOCAB,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return AutoModelForCausalLM.from_config(made).eval()


class Passes:
    """The three that are compared, over one batch."""

    def __init__(self, *, hidden: bool):
        self.student, source = model(STUDENT), model(TEACHER).requires_grad_(False)
        ids = torch.randint(0, VOCAB, (SEQUENCES, SEQ_LEN + 1))
        self.batch = Batch(ids, (0,) * SEQUENCES)
        blocks = tuple(f"model.layers.{2 * layer + 1}" for layer in range(STUDENT["layers"])) if hidden else ()
        channels = tuple(range(0, TEACHER["hidden"], 2)) if hidden else None
        self.source = LiveTeacher(source, blocks=blocks, channels=channels)
        streams = Streams(tuple(f"model.layers.{layer}" for layer in range(STUDENT["layers"])), 0.1) if hidden else None
        share: Callable[[int, int], float] = lambda step, steps: 0.5  # noqa: E731
        self.distilling = Distilled(self.source, domains=1, share=share, steps=1, streams=streams)
        self.optimizer = adamw(self.student.parameters(), lr=1e-4)
        for parameter in self.student.parameters():  # AdamW's moments are there from the start, as they are in training
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def teacher(self) -> None:
        taught = self.source(self.batch).taught
        assert isinstance(taught, Dense)
        for rows in chunks(len(taught.hidden)):
            taught.logits(rows)

    def plain(self) -> None:
        self._step(NextToken(1))

    def distilled(self) -> None:
        self._step(self.distilling)

    def _step(self, objective: Objective) -> None:
        (objective(self.student, self.batch).total / self.batch.num_targets()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def ratio(*, repeats: int, hidden: bool) -> dict[str, Any]:
    passes, names, ratios, shares = Passes(hidden=hidden), ("plain", "teacher", "distilled"), [], []
    for name in 2 * names:
        getattr(passes, name)()
    for number in range(repeats):
        times = {}
        for name in names[number % 3 :] + names[: number % 3]:
            start = perf_counter()
            getattr(passes, name)()
            times[name] = perf_counter() - start
        ratios.append(times["distilled"] / (times["plain"] + times["teacher"]))
        shares.append(times["teacher"] / times["plain"])
    lower, median, upper = statistics.quantiles(ratios, n=4)
    found = {"median": median, "lower_quartile": lower, "upper_quartile": upper, "repeats": repeats}
    return {**found, "limit": LIMIT, "teacher_over_plain": statistics.median(shares)}


def peak_bytes(which: str, *, hidden: bool) -> int:
    """Peak resident bytes of two passes above those before the first; meant for a process of its own."""
    passes = Passes(hidden=hidden)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew from here
    before = _status("VmRSS")
    for _ in range(2):
        getattr(passes, which)()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peak", metavar="WHICH", help="one memory figure, for this process")
    parser.add_argument("--hidden", action="store_true")
    parser.add_argument("--repeats", type=int, default=15)
    asked = parser.parse_args()
    if asked.peak:
        print(peak_bytes(asked.peak, hidden=asked.hidden))
        return
    found: dict[str, Any] = {}
    for name, flags in (("logits", []), ("logits and hidden", ["--hidden"])):
        found[name] = ratio(repeats=asked.repeats, hidden=bool(flags))
        command = [sys.executable, __file__, *flags, "--peak"]
        peaks = {w: int(subprocess.check_output([*command, w])) for w in ("plain", "teacher", "distilled")}
        found[name]["peak_bytes"] = {**peaks, "distilled / plain": peaks["distilled"] / peaks["plain"]}
        print(name, json.dumps(found[name]), flush=True)
    options = {
        "student": STUDENT,
        "teacher": TEACHER,
        "vocab": VOCAB,
        "batch": [SEQUENCES, SEQ_LEN],
        "dtype": "float32",
    }
    options["logits_bytes"] = SEQUENCES * SEQ_LEN * VOCAB * 4
    options["threads"] = torch.get_num_threads()
    result = {"options": options, "found": found, "versions": versions()}
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
