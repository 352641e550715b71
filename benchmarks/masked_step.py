"""A training step with masks against the same step of the unmasked model: time and peak memory.

    python benchmarks/masked_step.py            both shapes, eager and compiled; writes benchmarks/masked_step.json

Time: the two steps in turn in one process, median of the ratios pair by pair, and their spread. Memory: each step in a
process of its own, peak resident set above what it was before the first step (model, optimizer and imports in place).
A step is forward, backward and AdamW on all weights; the masked one draws, sets and learns masks on all five axes too.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from shearling.arch import family_of
from shearling.axes.axis import mask_shape
from shearling.axes.shape import shape_of
from shearling.axes.target import resolve_target
from shearling.loss.cross_entropy import next_token_loss
from shearling.masks.attach import Attached
from shearling.masks.gates import cut_axes
from shearling.masks.learned import LearnedMasks
from shearling.masks.options import Options
from shearling.masks.relaxations import make_gates
from shearling.record import versions
from shearling.train.optim import adamw

SHAPES: dict[str, dict[str, Any]] = {
    "d512": {"hidden": 512, "layers": 8, "heads": 8, "kv": 4, "inner": 1408, "vocab": 4096, "batch": (8, 512)},
    "smollm2-135m": {
        "hidden": 576,
        "layers": 30,
        "heads": 9,
        "kv": 3,
        "inner": 1536,
        "vocab": 49152,
        "batch": (2, 256),
    },
}


class Steps:
    """Training steps of one model, plain or masked."""

    def __init__(self, name: str, *, masked: bool, relaxation: str, compiled: bool, autocast: bool):
        s = SHAPES[name]
        config = {
            "model_type": "llama",
            "hidden_size": s["hidden"],
            "num_hidden_layers": s["layers"],
            "num_attention_heads": s["heads"],
            "num_key_value_heads": s["kv"],
            "intermediate_size": s["inner"],
            "vocab_size": s["vocab"],
            "tie_word_embeddings": True,
            "use_cache": False,
        }
        torch.manual_seed(0)
        settings = dict(config)
        made = AutoConfig.for_model(settings.pop("model_type"), **settings)
        self.model = AutoModelForCausalLM.from_config(made).eval()
        self.ids = torch.randint(0, s["vocab"], (s["batch"][0], s["batch"][1] + 1))
        self.autocast, self.step, self.term = autocast, 0, None
        self.optimizers = [adamw(self.model.parameters(), lr=1e-4)]
        if masked:
            family = family_of(config)
            shape = shape_of(family, config)
            half = {"hidden_size": s["hidden"] // 2, "num_hidden_layers": s["layers"] // 2}
            half |= {"num_key_value_heads": 2, "num_attention_heads": 2, "intermediate_size": s["inner"] // 2}
            target, _ = resolve_target(family, shape, half)
            scores = {axis: torch.rand(mask_shape(axis, shape.axes)) for axis in cut_axes(shape, target)}
            options = Options(relaxation=relaxation)
            gates = make_gates(shape, target, scores=scores, options=options, steps=1000, seed=0)
            self.term = LearnedMasks(Attached(self.model, family, config=config, axes=gates.axes), gates)
            self.optimizers += gates.optimizers()
        if compiled:
            self.model.base_model.compile()

    def __call__(self) -> None:
        if self.term:
            self.term.begin(self.step)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.autocast):
            loss = next_token_loss(self.model, self.ids)
        loss.backward()
        if self.term:
            self.term.backward(self.step)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if self.term:
            self.term.end(self.step)
        self.step += 1


def ratio(name: str, *, repeats: int, **options: Any) -> dict[str, float]:
    """Masked / plain, of steps taken in turn."""
    plain, masked = Steps(name, masked=False, **options), Steps(name, masked=True, **options)
    for _ in range(2):
        plain(), masked()
    ratios = []
    for number in range(repeats):
        times = {}
        for which in ("plain", "masked") if number % 2 else ("masked", "plain"):
            start = perf_counter()
            (plain if which == "plain" else masked)()
            times[which] = perf_counter() - start
        ratios.append(times["masked"] / times["plain"])
    quartiles = statistics.quantiles(ratios, n=4)
    return {"median": quartiles[1], "lower_quartile": quartiles[0], "upper_quartile": quartiles[2], "repeats": repeats}


def peak_bytes(name: str, *, masked: bool, **options: Any) -> int:
    """Peak resident bytes of two steps, above those before the first; meant for a process of its own."""
    steps = Steps(name, masked=masked, **options)
    for optimizer in steps.optimizers:  # AdamW's moments are there before, as they are in training
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew from here
    before = _status("VmRSS")
    for _ in range(2):
        steps()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peak", nargs=2, metavar=("SHAPE", "WHICH"), help="one memory figure, for this process")
    parser.add_argument("--relaxation", default="hard_concrete")
    parser.add_argument("--no-autocast", action="store_true")
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--no-compile", action="store_true")
    asked = parser.parse_args()
    options: dict[str, Any] = {"relaxation": asked.relaxation, "autocast": not asked.no_autocast}
    if asked.peak:
        print(peak_bytes(asked.peak[0], masked=asked.peak[1] == "masked", compiled=False, **options))
        return
    found: dict[str, Any] = {}
    for name in asked.shapes:
        found[name] = {"eager": ratio(name, repeats=asked.repeats, compiled=False, **options)}
        if not asked.no_compile:
            found[name]["compiled"] = ratio(name, repeats=asked.repeats, compiled=True, **options)
        command = [sys.executable, __file__, "--relaxation", asked.relaxation, *(["--no-autocast"] * asked.no_autocast)]
        peaks = {w: int(subprocess.check_output([*command, "--peak", name, w])) for w in ("plain", "masked")}
        found[name]["peak_bytes"] = {**peaks, "ratio": peaks["masked"] / peaks["plain"]}
        print(name, json.dumps(found[name]), flush=True)
    result = {"options": {**options, "threads": torch.get_num_threads()}, "found": found, "versions": versions()}
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
