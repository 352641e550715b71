"""What training takes in memory, estimated before it starts, against what it then took.

    python benchmarks/memory.py WORK_FOLDER         writes benchmarks/memory.json

Random Llamas of 52 and 135 million parameters, fp32 on the CPU: `heal`, and `prune` with masks on all axes, two steps
each, a process of its own for every case. Options: windows at a time, their length, activation checkpointing, masks, a
teacher (of the same size), autocast. Of all combinations sixteen are tried of the smaller model, such that any two
options meet in all ways, and four of the other. No checkpoint is written, but in the cases that say so. What is
measured in WORK_FOLDER isn't measured again.

Measured: the most anonymous memory that the process held, sampled, above what it held once all modules were imported.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import threading
from itertools import product
from pathlib import Path
from typing import Any

MODELS: dict[str, dict[str, int]] = {
    "52m": {"hidden": 512, "layers": 12, "heads": 8, "kv": 4, "inner": 1408, "vocab": 32000},
    "135m": {"hidden": 576, "layers": 30, "heads": 9, "kv": 3, "inner": 1536, "vocab": 49152},
}
OPTIONS: dict[str, tuple[Any, Any]] = {
    "micro": (1, 4),
    "seq_len": (256, 512),
    "checkpointing": (False, True),
    "masks": (False, True),
    "teacher": (False, True),
    "autocast": ("off", "bfloat16"),
}
HALVED = {"hidden_size": "hidden", "num_hidden_layers": "layers", "intermediate_size": "inner"}
SAMPLE_SECONDS = 0.005
LIMIT_SHARE, LIMIT_BYTES = 0.2, 300_000_000
# More of the smaller model, each with weights that learn alone and with masks beside them.
MORE: list[dict[str, Any]] = [{"optimizer": "adamw8bit"}, {"lora_rank": 16}, {"activation_checkpointing": "selective"}]
NEVER = 1000  # steps between checkpoints, of a run that has fewer


def cases() -> list[dict[str, Any]]:
    """The options of every run."""
    found = []
    for levels in product((0, 1), repeat=len(OPTIONS)):
        a, b, c, d, e, f = levels
        options = {name: values[level] for (name, values), level in zip(OPTIONS.items(), levels, strict=True)}
        if (e, f) == ((b + c + d) % 2, (a + b + c) % 2):
            found.append({"model": "52m", **options, "save": False})
        if b == 0 and (d, e, f) == (a, (a + c) % 2, c):
            found.append({"model": "135m", **options, "save": False})
    plain = {name: values[0] for name, values in OPTIONS.items()}
    found.sort(key=lambda case: case["model"] != "52m")
    also = [{"model": "52m", **plain, "masks": masks, "save": False} for masks in (False, True)]
    found += [{**case, "save": True} for case in also]
    found += [{**case, "more": more} for more in MORE for case in also]
    return [*found, {**also[1], "more": {"masks_only": True}}]


def make_models(work: Path) -> None:
    """Their folders, with a tokenizer of bytes, and a store of text in it."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from shearling.recipe import Data, validated
    from shearling.verbs.data import make_store

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={"</s>": 0, **{c: i + 1 for i, c in enumerate(alphabet)}}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    for name, s in MODELS.items():
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=s["hidden"],
            num_hidden_layers=s["layers"],
            num_attention_heads=s["heads"],
            num_key_value_heads=s["kv"],
            intermediate_size=s["inner"],
            vocab_size=s["vocab"],
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=0,
        )
        LlamaForCausalLM(config).save_pretrained(work / name)
        fast.save_pretrained(work / name)
    words, draw = Path(__file__).read_text(encoding="utf-8").split(), random.Random(0)
    lines = (json.dumps({"text": " ".join(draw.choices(words, k=400))}) + "\n" for _ in range(200))
    (work / "text.jsonl").write_text("".join(lines), encoding="utf-8")
    asked = validated(Data, {"inputs": [str(work / "text.jsonl")]})
    make_store(asked, tokenizer=str(work / "52m"), out=str(work / "store"))


def asked_of(case: dict[str, Any], work: Path) -> Any:
    """The section of a recipe that a case is."""
    from shearling.recipe import Heal, Prune, validated

    model = str(work / case["model"])
    sequences = 4 if case["micro"] == 4 else 2
    asked: dict[str, Any] = {
        "steps": 2,
        "seq_len": case["seq_len"],
        "batch_tokens": sequences * case["seq_len"],
        "micro_sequences": case["micro"],
        "activation_checkpointing": case["checkpointing"],
        "autocast": case["autocast"],
        "device": "cpu",
        "eval_windows": 1,
        "save_every": 1 if case["save"] else NEVER,
        "teacher": {"model": model, "share": 0.5} if case["teacher"] else {},
        **case.get("more", {}),
    }
    if not case["masks"]:
        return validated(Heal, asked)
    s = MODELS[case["model"]]
    to = {name: s[of] // 2 for name, of in HALVED.items()} | {"num_key_value_heads": 2, "num_attention_heads": 2}
    return validated(Prune, {**asked, "to": to, "method": "masks", "calibration_windows": 2})


def run(case: dict[str, Any], work: Path, out: Path) -> int:
    """Does what a case says and gives the most memory that it took; meant for a process of its own."""
    import peft  # noqa: F401  what options load, a rehearsal and compiled steps of an optimizer
    import torch._dynamo
    import torch._inductor.compile_fx  # noqa: F401
    import torchao.optim  # noqa: F401
    from transformers import LlamaForCausalLM  # noqa: F401

    from shearling.verbs.heal import heal
    from shearling.verbs.prune import prune

    before, peak, done = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(SAMPLE_SECONDS):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    verb: Any = prune if case["masks"] else heal
    verb(str(work / case["model"]), data=str(work / "store"), out=str(out), asked=asked_of(case, work))
    done.set()
    watcher.join()
    return peak - before


def estimated(case: dict[str, Any], work: Path) -> dict[str, int]:
    """What the verb says before it starts: bytes by part, the copy for a checkpoint among them where one is written."""
    from shearling.axes.target import resolve_target
    from shearling.data.store import Store
    from shearling.masks.gates import cut_axes
    from shearling.ranks.ranks import ALONE
    from shearling.verbs.memory import Trained
    from shearling.verbs.session import Session
    from shearling.verbs.source import Source
    from shearling.verbs.teaching import Teaching

    source, asked = Source.open(str(work / case["model"])), asked_of(case, work)
    store = Store.open(work / "store")
    session = Session.plan(asked, source, store, default_tokens=0, most_between_updates=1)
    teaching = Teaching.wanted(asked.teacher, student=source, own=None, why="", device="cpu", ranks=ALONE)
    target = resolve_target(source.family, source.shape, asked.to, source.config)[0] if case["masks"] else source.shape
    need = Trained(source, session, asked, asked.steps, teaching, cut_axes(source.shape, target)).need()
    return {**need.parts, "saving": need.saving}


def anonymous_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def compared(case: dict[str, Any], work: Path) -> dict[str, Any]:
    name = re.sub(r"\W+", "-", "-".join(str(value) for value in case.values()))
    done, out = work / f"case-{name}.json", work / "out"
    if not done.is_file():
        subprocess.run(["rm", "-rf", out, f"{out}.partial"], check=True)
        command = [sys.executable, __file__, str(work), "--case", json.dumps(case)]
        measured = int(subprocess.check_output(command, text=True).splitlines()[-1])
        done.write_text(json.dumps({"measured_bytes": measured}), encoding="utf-8")
    measured, parts = json.loads(done.read_text(encoding="utf-8"))["measured_bytes"], estimated(case, work)
    estimate = sum(parts.values())
    within = abs(estimate - measured) <= LIMIT_SHARE * measured + LIMIT_BYTES
    found = {"estimate_bytes": estimate, "measured_bytes": measured, "ratio": estimate / measured, "within": within}
    return {**case, **found, "parts": parts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--case", help="one case, for this process: prints its figure")
    asked = parser.parse_args()
    if asked.case:
        print(run(json.loads(asked.case), asked.work, asked.work / "out"))
        return
    asked.work.mkdir(parents=True, exist_ok=True)
    if not (asked.work / "store").is_dir():
        make_models(asked.work)
    from shearling.record import versions

    found = []
    for case in cases():
        found.append(compared(case, asked.work))
        print(json.dumps({name: value for name, value in found[-1].items() if name != "parts"}), flush=True)
    ratios = sorted(one["ratio"] for one in found if not one["save"])
    summary = {
        "cases": len(found),
        "within": sum(one["within"] for one in found),
        "least_ratio": ratios[0],
        "greatest_ratio": ratios[-1],
        "greatest_difference_bytes": max(abs(one["estimate_bytes"] - one["measured_bytes"]) for one in found),
    }
    print(json.dumps(summary, indent=1))
    result = {"summary": summary, "found": found, "threads": os.environ.get("OMP_NUM_THREADS"), "versions": versions()}
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
