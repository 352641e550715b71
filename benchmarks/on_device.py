"""What each option that saves memory takes of a device, to the byte, and what was estimated of it.

    python benchmarks/on_device.py MODEL TEXT_FOLDER WORK_FOLDER [ARM ...]    prints, and writes on_device.json here

MODEL is SmolLM2-135M. The device is a stand-in for an accelerator (tests/standin.cpp, needs a C++ compiler), whose
operators the CPU computes: memory of its own by torch's account, without caches or fragments. So bytes are those of all
tensors that lie there at once, with torch's plain attention. It says nothing of speed.

A cut of it heals for STEPS steps, and masks are learned on it for as many, each in a process of its own. Of arms that
are named the others' figures stay.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from masks_only import apart
from options import ARMS as HEALED
from options import TO, TRAINING, made_cut

from shearling.recipe import Heal, Prune, validated
from shearling.record import read, versions
from shearling.verbs.heal import heal
from shearling.verbs.prune import prune

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import standin

STEPS, RATE = 4, 5e-4
LEARNING = {"to": TO, "method": "masks", "calibration_windows": 8}
ARMS: dict[str, dict[str, Any]] = {
    **{name: asked for name, (asked, _) in HEALED.items() if "optimizer" not in asked},
    "LoRA, rank 16": {"lora_rank": 16, "lr": 3e-3},
    "bfloat16": {"autocast": "bfloat16"},
    "offload, recomputing": {"offload": True, "activation_checkpointing": "full"},
    "offload, bfloat16": {"offload": True, "autocast": "bfloat16"},
    "offload, LoRA, rank 16": {"offload": True, "autocast": "bfloat16", "lora_rank": 16, "lr": 3e-3},
    "masks and weights": LEARNING,
    "masks and weights, offload": {**LEARNING, "offload": True},
    "masks only": {**LEARNING, "masks_only": True},
}


def measured(model: str, store: str, out: str, asked: dict[str, Any]) -> dict[str, Any]:
    """One healing or pruning, in this process."""
    standin.register(standin.built(Path(out).parent))
    asked = {**asked, "device": "standin", "save_every": STEPS + 1}
    if "to" in asked:
        found = prune(model, data=store, out=out, asked=validated(Prune, asked))
    else:
        found = heal(model, data=store, out=out, asked=validated(Heal, asked))
    memory = next(event["memory"] for event in read(Path(out) / "record.jsonl") if "memory" in event)
    steps = [event["memory_bytes"] for event in read(Path(out) / "record.jsonl") if event["event"] == "step"]
    # Measuring what came of it, after the last step, isn't a step's memory.
    taken = {"bytes": max(steps), "estimated_bytes": memory["total_bytes"]}
    taken |= {"beside_bytes": memory["offloaded_bytes"]} if asked.get("offload") else {}
    return {"loss": sum(found.losses.values()) / len(found.losses), **taken}


def main(model: str, texts: Path, work: Path, arms: Sequence[str]) -> None:
    store, pruned = made_cut(model, texts, work)
    figures = Path(__file__).with_suffix(".json")
    found: dict[str, Any] = json.loads(figures.read_text(encoding="utf-8"))["found"] if arms else {}
    for name in arms or ARMS:
        asked = {**TRAINING, "steps": STEPS, "lr": RATE, **ARMS[name]}
        out = work / f"there-{name.replace(', ', '-').replace(' ', '-')}"
        found[name] = apart(model if "to" in asked else str(pruned.out), store, out, asked, script=__file__)
        print(name, found[name], flush=True)
    result = {"found": found, "steps": STEPS, "parameters": pruned.parameters, "of": pruned.source_parameters}
    result |= {"threads": torch.get_num_threads(), "versions": versions()}
    figures.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        print(json.dumps(measured(sys.argv[2], sys.argv[3], sys.argv[4], json.loads(sys.argv[5]))))
    else:
        main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
