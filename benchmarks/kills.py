"""Killed and gone on from, at random moments: the losses and the weights of an undisturbed run, to the bit.

    python benchmarks/kills.py WORK_FOLDER [--kills 200] [--seed 0]    prints, and writes benchmarks/kills.json

Chains: a verb runs in a process of its own that gets SIGKILL at a moment drawn evenly over the undisturbed run's time,
three times in a row, each time begun again by the same call, and then to its end. Of every second chain that compiles
(by inductor), which is most of its time, the moments are drawn after the process has saved once. Processes are forked
from one that has loaded torch. Every loss, mixture and mask in the record is compared as hex floats, the weights by
their sha256.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import torch

from shearling.demo.corpus import write_corpus
from shearling.demo.models import SOURCE, write_tokenizer, write_untrained
from shearling.recipe import Data, Heal, Prune, validated
from shearling.record import versions
from shearling.verbs.data import make_store
from shearling.verbs.heal import heal
from shearling.verbs.prune import prune

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from killed import losses, weights

IN_A_ROW = 3
SMALL = {**SOURCE, "hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 128}
TARGET = {"hidden_size": 48, "num_hidden_layers": 2, "intermediate_size": 96}
TRAINING = {"steps": 30, "seq_len": 32, "batch_tokens": 256, "eval_windows": 4, "eval_every": 10, "device": "cpu"}
SAVING = {"save_every": 2}
Verb = Callable[..., Any]


def prepared(work: Path) -> tuple[Path, Path, Path]:
    """A small untrained model, a store in its tokens and its one-shot cut."""
    corpus, tokenizer, model, store = (work / name for name in ("corpus", "tokenizer", "model", "store"))
    if not store.exists():
        write_corpus(corpus)
        write_tokenizer(corpus, tokenizer)
        write_untrained(SMALL, model, tokenizer=tokenizer, seed=0)
    make_store(validated(Data, {"inputs": [str(corpus)]}), tokenizer=str(model), out=str(store))
    asked = validated(Prune, {**TRAINING, "to": TARGET, "method": "activation", "calibration_windows": 8})
    return model, store, prune(str(model), data=str(store), out=str(work / "cut"), asked=asked).out


def verbs(work: Path) -> dict[str, Verb]:
    """What is killed, by name: each takes `out`."""
    model, store, cut = prepared(work)
    base = {**TRAINING, **SAVING}
    pruning = {**base, "to": TARGET, "method": "masks", "calibration_windows": 8}
    dynamic = {"schedule": "dynamic", "rule": "paper", "every": 3}
    phases = [{"steps": 15}, {"steps": 15, "lr": 1e-3}]
    teacher = {"model": str(model), "share": 0.5}
    asked = {
        "prune, soft top-k": (prune, model, Prune, pruning),
        "prune, hard concrete": (prune, model, Prune, {**pruning, "masks": {"relaxation": "hard_concrete"}}),
        "heal": (heal, cut, Heal, base),
        "heal, distilled": (heal, cut, Heal, {**base, "teacher": teacher}),
        "heal, dynamic mixture": (heal, cut, Heal, {**base, "mixture": dynamic}),
        "heal, phases": (heal, cut, Heal, {**base, "steps": None, "phases": phases}),
        "prune, adapters": (prune, model, Prune, {**pruning, "lora_rank": 4}),
        "heal, 8-bit moments": (heal, cut, Heal, {**base, "optimizer": "adamw8bit"}),
    }
    found = {}
    for name, (verb, source, section, options) in asked.items():
        for compiled in (False, True):
            what = validated(section, {**options, "compile": compiled})
            call = partial(verb, str(source), data=str(store), asked=what)
            found[f"{name}{', compiled' if compiled else ''}"] = call
    return found


def started(work: Callable[[], Any]) -> Any:
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def where(out: Path) -> str:
    """What a process that has just died was at."""
    partly = out.with_name(f"{out.name}.partial")
    if not partly.exists():
        return "before or after all"
    if any(partly.glob("checkpoints/*.new")):
        return "in a save"
    if (partly / "config.json").exists():
        return "writing the result"
    return "training" if any(partly.glob("checkpoints/step-*")) else "before the first checkpoint"


def saved(out: Path) -> set[str]:
    """The names of its checkpoints."""
    return {folder.name for folder in out.with_name(f"{out.name}.partial").glob("checkpoints/step-*")}


def until_saved(process: Any, out: Path, already: set[str]) -> None:
    """Returns once it has saved anew, or has ended."""
    while process.is_alive() and not saved(out) - already:
        sleep(0.01)


def timed(verb: Verb, out: Path) -> tuple[float, float]:
    """Seconds of a run that nobody disturbs, and of what comes after its first checkpoint."""
    shutil.rmtree(out, ignore_errors=True)
    before = perf_counter()
    process = started(partial(verb, out=str(out)))
    until_saved(process, out, set())
    saved_at = perf_counter()
    process.join()
    assert process.exitcode == 0, f"{out.name}: exit code {process.exitcode}"
    return perf_counter() - before, perf_counter() - saved_at


def chain(verb: Verb, out: Path, seconds: float, draw: random.Random, *, late: bool) -> Iterator[str]:
    """Kills it on the way to its end, and says where that was each time. Seconds: of all, or if late after a save."""
    for _ in range(IN_A_ROW):
        already = saved(out)
        process = started(partial(verb, out=str(out)))
        if late:
            until_saved(process, out, already)
        sleep(draw.uniform(0, seconds))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        if process.exitcode == 0:
            return
        assert process.exitcode == -signal.SIGKILL, f"it ended by itself with {process.exitcode}"
        yield where(out)
    process = started(partial(verb, out=str(out)))
    process.join()
    assert process.exitcode == 0, f"exit code {process.exitcode}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # threads of a fork don't find the pool that torch had
    draw, kills, differing = random.Random(asked.seed), {}, []
    known = verbs(asked.work)
    eager = [name for name in known if not name.endswith("compiled")]
    order = [*eager, *eager, *eager, *(name for name in known if name not in eager)]
    calm: dict[str, tuple[float, float, str, str]] = {}
    turn = 0
    while sum(sum(places.values()) for places in kills.values()) < asked.kills:
        name = order[turn % len(order)]
        out = asked.work / f"run-{turn}"
        if name not in calm:
            undisturbed = asked.work / f"calm-{len(calm)}"
            timed(known[name], undisturbed)  # if it compiles, into inductor's cache, for all that follow
            seconds, after = timed(known[name], undisturbed)
            calm[name] = seconds, after, weights(undisturbed), digest(undisturbed)
        seconds, after, expected, told = calm[name]
        late = name.endswith("compiled") and turn // len(order) % 2 == 1
        places = Counter(chain(known[name], out, after if late else seconds, draw, late=late))
        kills[name] = kills.get(name, Counter()) + places
        if out.exists() and (weights(out), digest(out)) != (expected, told):
            differing.append({"verb": name, "run": out.name})
        elif out.exists():
            shutil.rmtree(out)
        turn += 1
        print(f"{name}: {dict(places)}, differing so far {differing}", flush=True)
    result = {
        "kills": sum(sum(places.values()) for places in kills.values()),
        "chains": turn,
        "differing": differing,
        "by_verb": {name: dict(places) for name, places in kills.items()},
        "versions": versions(),
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def digest(out: Path) -> str:
    """Of all losses in a record."""
    return hashlib.sha256(repr(losses(out)).encode()).hexdigest()


if __name__ == "__main__":
    main()
