"""Our training loop against Hugging Face's Trainer: tokens per second on the same model, data, batch and precision.

    python benchmarks/trainer.py WORK_FOLDER    prints, and writes benchmarks/trainer.json

A random Llama heals on random tokens: AdamW (fused), a constant rate, clipping at 1, micro-batches gathered to a batch,
a loss logged at each step, no evaluation and no saving. Interleaved pairs, the same number of steps each, of which the
first isn't counted. Windows come from memory for both.
"""

import json
import logging
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from shearling.data.batch import Batch
from shearling.mixture.weights import Mixture
from shearling.record import Record, versions
from shearling.train.loop import train
from shearling.train.objective import NextToken
from shearling.train.optim import adamw
from shearling.train.step import Settings, State

STEPS, STARTING, PAIRS = 5, 1, 7
LENGTH, MICRO, GATHERED = 256, 2, 2
SIZES = {"hidden_size": 384, "num_hidden_layers": 8, "intermediate_size": 1024, "vocab_size": 16384}
HEADS = {"num_attention_heads": 6, "num_key_value_heads": 3, "tie_word_embeddings": True}
RATE = 1e-4
CASES = {"fp32": {}, "bf16": {"bf16": True}, "fp32, checkpointed": {"gradient_checkpointing": True}}


class Windows(Dataset):
    """As many windows as the steps take."""

    def __init__(self, ids: np.ndarray):
        self.ids = torch.from_numpy(ids)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index, :-1], "labels": self.ids[index, :-1]}


def model_of() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS)).train()


class Clock(TrainerCallback):
    """Seconds from the end of the step numbered `first` to the end of the last."""

    def __init__(self, first: int):
        self.first, self.began, self.ended = first, 0.0, 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in (self.first, state.max_steps):
            if args.device.type == "cuda":
                torch.cuda.synchronize()
            self.began, self.ended = self.ended, perf_counter()


def theirs(
    model: Any,
    ids: np.ndarray,
    work: Path,
    *,
    steps: int,
    micro: int,
    gathered: int,
    log_every: int = 1,
    **options: Any,
) -> float:
    """Seconds of a step of the Trainer's, after the first STARTING of them."""
    arguments = TrainingArguments(
        output_dir=str(work / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=gathered,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        logging_steps=log_every,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_num_workers=0,
        **options,
    )
    clock = Clock(STARTING)
    Trainer(model=model, args=arguments, train_dataset=Windows(ids), callbacks=[clock]).train()
    return (clock.ended - clock.began) / (steps - STARTING)


def ours(ids: np.ndarray, work: Path, options: dict[str, Any]) -> float:
    """The same of ours, its record written."""
    model, sequences = model_of(), MICRO * GATHERED
    if "gradient_checkpointing" in options:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    (work / "record.jsonl").unlink(missing_ok=True)
    record, ended = Record(work / "record.jsonl"), []

    def draw(at: int, weights: Any) -> tuple[Batch, int]:
        return Batch(torch.from_numpy(ids[at : at + sequences]), (0,) * sequences), at + sequences

    settings = Settings(
        steps=STEPS,
        seq_len=LENGTH,
        batch_sequences=sequences,
        micro_sequences=MICRO,
        domains=("random",),
        schedule=lambda step, steps: 1.0,
        autocast=torch.bfloat16 if "bf16" in options else None,
    )
    train(
        model,
        settings=settings,
        state=State(0, 0, 0, Mixture.starting({"random": 1.0})),
        draw=draw,
        objective=NextToken(1),
        optimizers=[adamw(model.parameters(), lr=RATE)],
        log=record.write,
        on_step=lambda step, figures, excess: ended.append(perf_counter()),
    )
    return (ended[-1] - ended[STARTING - 1]) / (STEPS - STARTING)


def pairs(ids: np.ndarray, work: Path, options: dict[str, Any]) -> Iterator[float]:
    """Ours by theirs, in tokens per second."""
    same = {"steps": STEPS, "micro": MICRO, "gathered": GATHERED, "use_cpu": True}
    for _ in range(PAIRS):
        yield theirs(model_of(), ids, work, **same, **options) / ours(ids, work, options)


def main(work: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    ids = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (STEPS * MICRO * GATHERED, LENGTH + 1))
    found: dict[str, Any] = {}
    for name, options in CASES.items():
        ratios = list(pairs(ids, work, options))
        low, middle, high = statistics.quantiles(ratios, n=4)
        found[name] = {"over_trainer": middle, "quartiles": [low, high], "pairs": PAIRS}
        print(name, found[name], flush=True)
    result = {"found": found, "threads": torch.get_num_threads(), "versions": versions()}
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
