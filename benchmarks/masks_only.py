"""Masks learned with frozen weights: what it takes, and what it costs in loss.

    python benchmarks/masks_only.py MODEL TEXT_FOLDER WORK_FOLDER    prints, and writes benchmarks/masks_only.json

MODEL is SmolLM2-135M. Its masks are learned for STEPS steps with its weights and without, in processes of their own:
the cut's loss, and the peak of anonymous memory, sampled, above what the imports take. Then the same without weights at
SmolLM2-1.7B's shape, with random weights, at a short window and with activations recomputed: the limit is 6 GiB.
"""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from shearling.demo.models import write_untrained
from shearling.recipe import Data, Prune, validated
from shearling.record import versions
from shearling.verbs.data import make_store
from shearling.verbs.prune import prune
from shearling.weights.folder import resolve

T = TypeVar("T")
STEPS, DOMAINS = 8, ("stories", "code", "wiki")
SMALL = {"hidden_size": 384, "num_hidden_layers": 20, "num_attention_heads": 6, "num_key_value_heads": 2}
TRAINING = {"seq_len": 256, "batch_tokens": 1024, "micro_sequences": 1, "eval_windows": 4, "eval_every": 0}
ASKED: dict[str, dict[str, Any]] = {
    "weights too": {},
    "weights too, recomputing": {"activation_checkpointing": True},
    "masks only": {"masks_only": True},
    "masks only, recomputing": {"masks_only": True, "activation_checkpointing": True},
}
LARGE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "intermediate_size": 8192,
    "vocab_size": 49152,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
LARGE_TARGET = {"hidden_size": 1536, "num_hidden_layers": 20, "intermediate_size": 6144}
LARGE_TRAINING = {"steps": 2, "seq_len": 64, "batch_tokens": 64, "eval_windows": 1, "calibration_windows": 2}


def anonymous_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Anonymous:"))


def taking(work: Callable[[], T]) -> tuple[T, int, int]:
    """What some work gives, the most that this process held meanwhile, and what it held before."""
    before, peak, done = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    found = work()
    done.set()
    watcher.join()
    return found, peak, before


def measured(model: str, store: str, out: str, asked: dict[str, Any]) -> dict[str, Any]:
    """One prune, in this process."""
    section = validated(Prune, {**asked, "method": "masks", "device": "cpu"})
    found, peak, before = taking(lambda: prune(model, data=store, out=out, asked=section))
    losses = list(found.losses.values())
    memory = json.loads((Path(out) / "record.jsonl").read_text().splitlines()[0])["memory"]
    return {
        "parameters": found.source_parameters,
        "loss": sum(losses) / len(losses),
        "peak_bytes": peak,
        "above_imports_bytes": peak - before,
        "estimated_bytes": memory["total_bytes"] + memory["saving_bytes"],
    }


def apart(model: str, store: str, out: Path, asked: dict[str, Any], *, script: str = __file__) -> dict[str, Any]:
    """What a script has measured in a process of its own, done once."""
    said = out.with_name(f"{out.name}.json")
    if not said.exists():
        words = [sys.executable, script, "--one", model, store, str(out), json.dumps(asked)]
        said.write_text(subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
    return json.loads(said.read_text())


def made_store(model: str, texts: Path, work: Path) -> str:
    """The token store of DOMAINS, in a model's tokens."""
    corpus, store = work / "corpus", str(work / "store")
    corpus.mkdir(parents=True, exist_ok=True)
    for domain in DOMAINS:
        if not (corpus / domain).exists():
            (corpus / domain).symlink_to(texts.resolve() / domain)
    make_store(validated(Data, {"inputs": [str(corpus)]}), tokenizer=model, out=store)
    return store


def main(model: str, texts: Path, work: Path) -> None:
    store = made_store(model, texts, work)
    found: dict[str, Any] = {}
    for number, (name, options) in enumerate(ASKED.items()):
        asked = {**TRAINING, "to": {**SMALL, "intermediate_size": 1024}, "steps": STEPS, "lr": 5e-4, **options}
        found[name] = apart(model, store, work / f"small-{number}", {**asked, "calibration_windows": 16})
        print(name, found[name], flush=True)
    large = work / "large"
    if not large.exists():
        torch.set_default_dtype(torch.bfloat16)
        write_untrained(LARGE, large, tokenizer=resolve(model), seed=0)
    asked = {**LARGE_TRAINING, "to": LARGE_TARGET, "masks_only": True, "activation_checkpointing": True}
    found["1.7B, masks only, recomputing"] = apart(str(large), store, work / "large-cut", {**asked, "eval_every": 0})
    print(json.dumps(found, indent=1))
    result = {"found": found, "steps": STEPS, "threads": torch.get_num_threads(), "versions": versions()}
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        time.sleep(1)  # for what the imports have left to settle
        print(json.dumps(measured(sys.argv[2], sys.argv[3], sys.argv[4], json.loads(sys.argv[5]))))
    else:
        main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
