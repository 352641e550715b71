"""What healing takes with each option that saves memory, and the loss after equal steps.

    python benchmarks/options.py MODEL TEXT_FOLDER WORK_FOLDER    prints, and writes benchmarks/options.json

MODEL is SmolLM2-135M, cut by activations; its cut heals for STEPS steps with each option, in a process of its own, on
a CPU. Held-out loss, at the best of three rates where an option changes what is learned; and the peak of anonymous
memory, sampled, above what the imports take. No checkpoints. CPU offload needs a GPU: benchmarks/gpu.py.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from masks_only import SMALL, apart, made_store, taking

from shearling.recipe import Heal, Prune, validated
from shearling.record import read, versions
from shearling.verbs.heal import heal
from shearling.verbs.prune import prune

STEPS = 16
TRAINING = {"seq_len": 256, "batch_tokens": 1024, "micro_sequences": 2, "eval_windows": 8, "eval_every": 0}
RATES = (2.5e-4, 5e-4, 1e-3)
LORA_RATES = (1e-3, 3e-3, 1e-2)
PLAIN = "AdamW"
ARMS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    PLAIN: ({}, RATES),
    "AdamW, 8 bits": ({"optimizer": "adamw8bit"}, RATES),
    "recomputing, selective": ({"activation_checkpointing": "selective"}, ()),
    "recomputing, full": ({"activation_checkpointing": "full"}, ()),
    "teacher": ({"teacher": {"share": 0.5}}, ()),
    "teacher, 8 bits": ({"teacher": {"share": 0.5, "weights": "int8"}}, ()),
    "LoRA, rank 16": ({"lora_rank": 16}, LORA_RATES),
}


def measured(model: str, store: str, out: str, asked: dict[str, Any]) -> dict[str, Any]:
    """One healing, in this process."""
    import peft  # noqa: F401  what the arms load
    import torchao.optim  # noqa: F401

    section = validated(Heal, {**asked, "device": "cpu", "save_every": STEPS + 1})
    found, peak, before = taking(lambda: heal(model, data=store, out=out, asked=section))
    losses = list(found.losses.values())
    memory = next(event["memory"] for event in read(Path(out) / "record.jsonl") if "memory" in event)
    taken = {"above_imports_bytes": peak - before, "estimated_bytes": memory["total_bytes"]}
    return {"loss": sum(losses) / len(losses), **taken, "flops": found.flops}


def main(model: str, texts: Path, work: Path) -> None:
    store, cut = made_store(model, texts, work), work / "cut"
    to = {**SMALL, "intermediate_size": 1024}
    asked = {**TRAINING, "steps": 24, "to": to, "method": "activation", "calibration_windows": 64, "device": "cpu"}
    pruned = prune(model, data=store, out=str(cut), asked=validated(Prune, asked))
    found: dict[str, Any] = {}
    best = RATES[1]
    for name, (options, rates) in ARMS.items():
        tried = {}
        for rate in rates or (best,):
            out = work / f"{name.replace(', ', '-').replace(' ', '-')}-{rate}"
            asked = {**TRAINING, "steps": STEPS, "lr": rate, **options}
            tried[rate] = apart(str(cut), store, out, asked, script=__file__)
            print(name, rate, tried[rate], flush=True)
        chosen = min(tried, key=lambda rate: tried[rate]["loss"])
        best = chosen if name == PLAIN else best
        found[name] = {"rate": chosen, **tried[chosen], "tried": {str(r): each["loss"] for r, each in tried.items()}}
    before = sum(pruned.losses.values()) / len(pruned.losses)
    result = {"cut_loss": before, "parameters": pruned.parameters, "found": found, "steps": STEPS}
    result |= {"threads": torch.get_num_threads(), "versions": versions()}
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        time.sleep(1)  # for what the imports have left to settle
        print(json.dumps(measured(sys.argv[2], sys.argv[3], sys.argv[4], json.loads(sys.argv[5]))))
    else:
        main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
