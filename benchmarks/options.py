"""What healing takes with each option that saves memory, and the loss after equal steps.

    python benchmarks/options.py MODEL TEXT_FOLDER WORK_FOLDER [ARM ...]    prints, and writes benchmarks/options.json

MODEL is SmolLM2-135M, cut by activations; its cut heals for STEPS steps with each option, in a process of its own, on
a CPU. Held-out loss, at the best of three rates where an option changes what is learned; and the peak of anonymous
memory, sampled, above what the imports take. No checkpoints. Of arms that are named the others' figures stay.

Offload is for GPUs (benchmarks/gpu.py measures it there). Here it runs by the same policy with a CPU for the device, so
that there is one memory for both sides: its loss, and what is estimated of each.
"""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from masks_only import SMALL, apart, made_store, taking
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.device_mesh import init_device_mesh

from shearling.ranks.ranks import Ranks
from shearling.recipe import Heal, Prune, validated
from shearling.record import read, versions
from shearling.verbs import heal as verb
from shearling.verbs.prune import Pruned, prune

STEPS = 16
TRAINING = {"seq_len": 256, "batch_tokens": 1024, "micro_sequences": 2, "eval_windows": 8, "eval_every": 0}
TO = {**SMALL, "intermediate_size": 1024}
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
    "offload": ({"offload": True}, ()),
}


@contextmanager
def offloading(device: str, **options: Any) -> Iterator[tuple[Ranks, str]]:
    """In the place of `joined`, which has nothing to offload from on a CPU: a mesh of one rank all the same."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        yield Ranks(mesh=init_device_mesh(device, (1,), mesh_dim_names=("shard",)), offload=True), device
    finally:
        dist.destroy_process_group()


def measured(model: str, store: str, out: str, asked: dict[str, Any]) -> dict[str, Any]:
    """One healing, in this process."""
    import peft  # noqa: F401  what the arms load
    import torchao.optim  # noqa: F401

    section = validated(Heal, {**asked, "device": "cpu", "save_every": STEPS + 1})
    if section.offload:
        verb.joined = offloading
    found, peak, before = taking(lambda: verb.heal(model, data=store, out=out, asked=section))
    losses = list(found.losses.values())
    memory = next(event["memory"] for event in read(Path(out) / "record.jsonl") if "memory" in event)
    taken = {"above_imports_bytes": peak - before, "estimated_bytes": memory["total_bytes"]}
    if section.offload:
        on_device = memory["total_bytes"] - memory["allocator_bytes"]
        taken |= {"estimated_on_device_bytes": on_device, "estimated_beside_bytes": memory["offloaded_bytes"]}
    return {"loss": sum(losses) / len(losses), **taken, "flops": found.flops}


def made_cut(model: str, texts: Path, work: Path) -> tuple[str, Pruned]:
    """The token store, and the cut that is healed on it."""
    store = made_store(model, texts, work)
    asked = {**TRAINING, "steps": 24, "to": TO, "method": "activation", "calibration_windows": 64, "device": "cpu"}
    return store, prune(model, data=store, out=str(work / "cut"), asked=validated(Prune, asked))


def main(model: str, texts: Path, work: Path, arms: Sequence[str]) -> None:
    store, pruned = made_cut(model, texts, work)
    figures = Path(__file__).with_suffix(".json")
    found: dict[str, Any] = json.loads(figures.read_text(encoding="utf-8"))["found"] if arms else {}
    best = found[PLAIN]["rate"] if found else RATES[1]
    for name, (options, rates) in ARMS.items():
        if arms and name not in arms:
            continue
        tried = {}
        for rate in rates or (best,):
            out = work / f"{name.replace(', ', '-').replace(' ', '-')}-{rate}"
            asked = {**TRAINING, "steps": STEPS, "lr": rate, **options}
            tried[rate] = apart(str(pruned.out), store, out, asked, script=__file__)
            print(name, rate, tried[rate], flush=True)
        chosen = min(tried, key=lambda rate: tried[rate]["loss"])
        best = chosen if name == PLAIN else best
        found[name] = {"rate": chosen, **tried[chosen], "tried": {str(r): each["loss"] for r, each in tried.items()}}
    before = sum(pruned.losses.values()) / len(pruned.losses)
    result = {"cut_loss": before, "parameters": pruned.parameters, "found": found, "steps": STEPS}
    result |= {"threads": torch.get_num_threads(), "versions": versions()}
    figures.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        time.sleep(1)  # for what the imports have left to settle
        print(json.dumps(measured(sys.argv[2], sys.argv[3], sys.argv[4], json.loads(sys.argv[5]))))
    else:
        main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
