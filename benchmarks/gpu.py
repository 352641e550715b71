"""What only a GPU can tell: speed, the cost of masks, memory, saving and going on, in at most ten minutes.

    python benchmarks/gpu.py WORK_FOLDER            needs CUDA; writes benchmarks/gpu.json
    python benchmarks/gpu.py WORK_FOLDER --go-on    what that has no figures for yet
    python benchmarks/gpu.py WORK_FOLDER --tiny     the same at toy size on a CPU; writes WORK_FOLDER/gpu.json

Llamas with random weights, of 135 million parameters (SmolLM2's shape) and of 1.2 billion (Llama 3.2's), in bf16
autocast with fp32 weights and fused AdamW. Steps are those of the training loop itself, tokens per second and MFU those
of its own record, over stretches of steps after two that aren't counted (they compile). Ratios are of stretches in
turn.

Measurements run in order, each only if there is time for it and then no longer than there is. What was skipped or
failed is in the results with the reason, and they are written after each.
"""

import argparse
import gc
import itertools
import json
import os
import shutil
import signal
import statistics
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs for the same bits, set before it starts

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from shearling.arch import family_of
from shearling.axes.axis import MASKABLE, mask_shape
from shearling.axes.count import flops_per_token
from shearling.axes.shape import shape_of
from shearling.axes.target import resolve_target
from shearling.data.batch import Batch
from shearling.errors import Stopped
from shearling.masks.attach import Attached
from shearling.masks.learned import LearnedMasks
from shearling.masks.options import Options
from shearling.masks.relaxations import make_gates
from shearling.mixture.weights import Mixture
from shearling.ranks.ranks import ALONE
from shearling.recipe import Data, Heal, Prune, validated
from shearling.record import read, versions
from shearling.train.checkpoint import Checkpoints
from shearling.train.checkpointing import checkpointing
from shearling.train.device import peak_flops
from shearling.train.liger import use_liger
from shearling.train.loop import train
from shearling.train.objective import NextToken
from shearling.train.optim import adamw
from shearling.train.step import Settings, State
from shearling.verbs.data import make_store
from shearling.verbs.heal import heal
from shearling.verbs.keeping import Held
from shearling.verbs.prune import prune

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from killed import killed_at, losses, weights
from trainer import STARTING, theirs

BUDGET_SECONDS, NEVER = 600.0, 10**6
Found = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """A Llama's shape, and the batch that goes through it at once."""

    hidden: int
    layers: int
    heads: int
    kv: int
    inner: int
    vocab: int
    sequences: int
    seq_len: int
    tied: bool = True

    def config(self) -> Found:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv,
            "head_dim": self.hidden // self.heads,
            "intermediate_size": self.inner,
            "vocab_size": self.vocab,
            "max_position_embeddings": self.seq_len,
            "tie_word_embeddings": self.tied,
            "rms_norm_eps": 1e-5,
            "bos_token_id": None,
            "eos_token_id": 0,
            "dtype": "float32",
            "use_cache": False,
        }

    def halved(self) -> Found:
        heads = {"num_key_value_heads": max(1, self.kv // 2), "num_attention_heads": max(1, self.kv // 2)}
        return {
            "hidden_size": self.hidden // 2,
            "num_hidden_layers": self.layers // 2,
            "intermediate_size": self.inner // 2,
            **heads,
        }


SIZES = {
    "135m": Size(576, 30, 9, 3, 1536, 49152, sequences=16, seq_len=2048),
    "1b": Size(2048, 16, 32, 8, 8192, 128256, sequences=4, seq_len=2048),
}
TINY = Size(32, 2, 4, 2, 48, 300, sequences=2, seq_len=32)


@dataclass(frozen=True)
class Bench:
    """Where it runs, and how long stretches are."""

    work: Path
    device: torch.device
    tiny: bool
    brief: bool = False

    @property
    def stretch(self) -> int:
        return 1 if self.tiny else 3 if self.brief else 6

    @property
    def rounds(self) -> int:
        return 2 if self.tiny or self.brief else 5

    @property
    def backend(self) -> str:
        return "aot_eager" if self.tiny else "inductor"

    def size(self, name: str) -> Size:
        return TINY if self.tiny else SIZES[name]


def made(size: Size, device: torch.device) -> Any:
    """A model of this size with random weights."""
    config = {k: v for k, v in size.config().items() if k not in ("model_type", "dtype")}
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **config), dtype=torch.float32)


class Steps:
    """The training loop over one model, plain or under masks, a stretch of steps at a time."""

    def __init__(
        self,
        bench: Bench,
        name: str,
        *,
        masked: bool = False,
        compiled: bool = False,
        again: str = "",
        liger: bool = False,
    ):
        size, device = bench.size(name), bench.device
        config = size.config()
        self.model: Any = made(size, device).eval()
        if liger:
            use_liger(self.model)
        family = family_of(config)
        shape = shape_of(family, config)
        self.terms: list[Any] = []
        gates: list[Any] = []
        if masked:
            target, _ = resolve_target(family, shape, size.halved())
            scores = {axis: torch.rand(mask_shape(axis, shape.axes)) for axis in MASKABLE if axis in shape.axes}
            learned = make_gates(shape, target, scores=scores, options=Options(), steps=1000, seed=0).to(device)
            attached = Attached(self.model, family, config=config, axes=learned.axes)
            self.terms, gates = [LearnedMasks(attached, learned)], learned.optimizers()
        if again:
            self.model.train()
            self.model.activation_checkpointing_enable(checkpointing(again))
        self.objective = NextToken(1, compiled=compiled)
        if compiled:
            torch._dynamo.reset()
            for layer in range(size.layers):
                self.model.get_submodule(family.block(layer)).compile(backend=bench.backend)
        self.optimizers = [adamw(self.model.parameters(), lr=1e-4), *gates]
        ids = [torch.randint(0, size.vocab, (size.sequences, size.seq_len + 1)) for _ in range(4)]
        batches = [Batch(some, (0,) * size.sequences) for some in ids]
        self.batches = [batch.pinned() for batch in batches] if device.type == "cuda" else batches
        self.settings = Settings(
            steps=0,
            seq_len=size.seq_len,
            batch_sequences=size.sequences,
            micro_sequences=size.sequences,
            domains=("random",),
            schedule=lambda step, steps: 1.0,
            autocast=torch.bfloat16 if device.type == "cuda" else None,
        )
        self.state = State(step=0, tokens=0, sampler=0, mixture=Mixture.starting({"random": 1.0}))
        self.flops = 3.0 * flops_per_token(family, config, shape, context=size.seq_len // 2)

    def __call__(self, steps: int) -> Found:
        """So many steps: what the record says of them, and the most memory above what was there."""
        device = next(self.model.parameters()).device
        before = _start_peak(device)
        events: list[Found] = []
        self.state = train(
            self.model,
            settings=replace(self.settings, steps=self.state.step + steps, log_every=NEVER),
            state=self.state,
            draw=lambda at, weights: (self.batches[at % len(self.batches)], at + 1),
            objective=self.objective,
            optimizers=self.optimizers,
            terms=self.terms,
            log=lambda event, **fields: events.append({"event": event, **fields}),
            flops_per_token=self.flops,
        )
        (said,) = (event for event in events if event["event"] == "step")
        said["seconds_per_step"] = self.settings.batch_tokens / said["tokens_per_second"]
        return {**said, "above_bytes": said["memory_bytes"] - before}


def _start_peak(device: torch.device) -> int:
    """Has the peak counted from here; what is there."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def speed(bench: Bench, *, name: str, **options: Any) -> Found:
    steps = Steps(bench, name, **options)
    began = perf_counter()
    steps(2)
    found: Found = {"first_two_steps_seconds": perf_counter() - began}
    told = [steps(bench.stretch) for _ in range(bench.rounds)]
    for key in ("tokens_per_second", "mfu", "seconds_per_step", "memory_bytes"):
        values = [each[key] for each in told if key in each]
        found[key] = statistics.median(values) if values else None
    found["model_flops_per_token"] = steps.flops
    return found


def ratio(bench: Bench, *, name: str, compiled: bool) -> Found:
    """Masked by plain: time of a step, and peak memory above what was there before it."""
    kinds = {
        "plain": Steps(bench, name, compiled=compiled),
        "masked": Steps(bench, name, masked=True, compiled=compiled),
    }
    for steps in kinds.values():
        steps(2)
    times, peaks = [], {}
    for number in range(bench.rounds):
        told = {kind: kinds[kind](bench.stretch) for kind in (sorted(kinds) if number % 2 else sorted(kinds)[::-1])}
        times.append(told["masked"]["seconds_per_step"] / told["plain"]["seconds_per_step"])
        peaks = {kind: each["above_bytes"] for kind, each in told.items()}
    low, middle, high = statistics.quantiles(times, n=4)
    memory = peaks["masked"] / peaks["plain"]
    return {"median": middle, "lower_quartile": low, "upper_quartile": high, "limit": 1.08, "peak_memory": memory}


def trainer(bench: Bench, *, compiled: bool) -> Found:
    """Tokens per second by those of Hugging Face's Trainer."""
    size, rounds = bench.size("135m"), 2 if bench.tiny or compiled else 3
    count = STARTING + bench.stretch
    ids = np.random.default_rng(0).integers(0, size.vocab, (count * size.sequences, size.seq_len + 1))
    options: Found = {"use_cpu": True} if bench.tiny else {"bf16": True}
    if compiled:
        options |= {"torch_compile": True, "torch_compile_backend": bench.backend}
    same = {"steps": count, "micro": size.sequences, "gathered": 1, "log_every": NEVER}
    ours = Steps(bench, "135m", compiled=compiled)
    ours(STARTING)
    ratios = []
    for _ in range(rounds):
        _free()
        seconds = theirs(made(size, bench.device), ids, bench.work, **same, **options)
        ours(STARTING)  # compiled code is made again where theirs has set something
        ratios.append(seconds / ours(bench.stretch)["seconds_per_step"])
    return {"over_trainer": statistics.median(ratios), "each": ratios}


def waits(bench: Bench, *, masked: bool) -> Found:
    """How often the host waits for the device in five steps of which the last is logged, by where it does."""
    steps = Steps(bench, "135m", masked=masked)
    steps(2)
    places: dict[str, int] = {}
    for count in (1, 5):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                steps(count)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        sign = -1 if count == 1 else 1  # the logged step, and what a stretch begins with
        for warning in seen:
            if "synchroniz" in str(warning.message):
                place = f"{Path(warning.filename).name}:{warning.lineno}"
                places[place] = places.get(place, 0) + sign
    return {"of_four_steps_not_logged": {place: count for place, count in places.items() if count}}


def kernels(bench: Bench, *, masked: bool, compiled: bool) -> Found:
    """The kernels of a step, and how long the GPU works on them; those that take longest, and those of attention."""
    steps = Steps(bench, "135m", masked=masked, compiled=compiled)
    steps(2)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        steps(1)
    ran = sorted(
        (e for e in seen.key_averages() if "CUDA" in str(e.device_type)),
        key=lambda e: -e.self_device_time_total,
    )
    found: Found = {"kernels": sum(e.count for e in ran), "seconds": sum(e.self_device_time_total for e in ran) / 1e6}
    words = ("flash", "fmha", "attention")
    found["attention"] = [e.key[:80] for e in ran if any(word in e.key.lower() for word in words)]
    return {**found, "longest": [[e.key[:200], e.count, e.self_device_time_total / 1e6] for e in ran[:12]]}


def saving(bench: Bench) -> Found:
    """What a checkpoint adds to a stretch of steps, and what of that the steps wait for."""
    steps, count = Steps(bench, "135m"), 2 if bench.tiny else 20
    held, folder = Held(steps.model, tuple(steps.optimizers), {}), bench.work / "checkpoints"
    nbytes = held.nbytes(ALONE)  # of moments that aren't there yet
    steps(2)
    extra, waited, plain = [], [], []
    shutil.rmtree(folder, ignore_errors=True)
    with Checkpoints(folder, run="gpu", ranks=ALONE) as checkpoints:
        for number in range(1, 4):
            began = perf_counter()
            steps(count)
            plain.append(perf_counter() - began)
            began = perf_counter()
            checkpoints.save(number, held.tensors(), {})
            waited.append(perf_counter() - began)
            steps(count)
            checkpoints.wait()
            extra.append(perf_counter() - began - plain[-1])
    shutil.rmtree(folder)
    step = statistics.median(plain) / count
    found = {"extra_seconds": statistics.median(extra), "waited_seconds": statistics.median(waited)}
    found |= {"extra_in_steps": statistics.median(extra) / step, "waited_in_steps": statistics.median(waited) / step}
    return {**found, "share_of_ten_minutes": statistics.median(extra) / 600, "bytes": nbytes}


def inputs(bench: Bench, name: str) -> tuple[Path, Path]:
    """A folder of a model with random weights and a tokenizer of bytes, and a store of text in it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    model, store, text = bench.work / name, bench.work / f"{name}-store", bench.work / "text.jsonl"
    if not model.exists():
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE(vocab={"</s>": 0, **{c: i + 1 for i, c in enumerate(alphabet)}}, merges=[]))
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
        made(TINY if name == "tiny" else bench.size(name), torch.device("cpu")).save_pretrained(model)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(model)
        words = Path(__file__).read_text(encoding="utf-8").split()
        lines = (json.dumps({"text": " ".join(words[i : i + 300])}) + "\n" for i in range(0, len(words), 20))
        text.write_text("".join(lines), encoding="utf-8")
        asked = validated(Data, {"inputs": [str(text)], "held_out": 0.1, "processes": 1})
        make_store(asked, tokenizer=str(model), out=str(store))
    return model, store


def asked_of(bench: Bench, size: Size, **options: Any) -> Found:
    """What a verb is asked, in a few steps."""
    return {
        "steps": 3,
        "seq_len": size.seq_len,
        "batch_tokens": size.sequences * size.seq_len,
        "micro_sequences": size.sequences,
        "device": bench.device.type,
        "eval_windows": 2,
        "eval_every": 0,
        "save_every": NEVER,
        **options,
    }


OF_GPUS = {"offload", "optimizer"}  # the 8-bit optimizer is compiled
MEMORY: dict[str, Found] = {
    "plain": {},
    "adamw8bit": {"optimizer": "adamw8bit"},
    "lora": {"lora_rank": 16},
    "distilled": {"teacher": {"share": 0.5}},
    "distilled, int8": {"teacher": {"share": 0.5, "weights": "int8"}},
    "offload": {"offload": True},
    "selective": {"activation_checkpointing": "selective"},
    "full": {"activation_checkpointing": "full"},
    "full, offload": {"activation_checkpointing": "full", "offload": True},
    "masks": {"method": "masks"},
    "masks only": {"method": "masks", "masks_only": True},
    "masks only, full": {"method": "masks", "masks_only": True, "activation_checkpointing": "full"},
}


def memory(bench: Bench, *, options: Found) -> Found:
    """The estimate before a run of three steps at 135M by the most that they then took, and the loss after them."""
    (model, store), size, out = inputs(bench, "135m"), bench.size("135m"), bench.work / "memory"
    verb: Any = heal
    section: type = Heal
    if "method" in options:
        verb, section, options = prune, Prune, {**options, "to": size.halved(), "calibration_windows": 2}
    if "teacher" in options:
        options = {**options, "teacher": {"model": str(model), **options["teacher"]}}
    shutil.rmtree(out, ignore_errors=True)
    _free()
    before = _start_peak(bench.device)
    done = verb(str(model), data=str(store), out=str(out), asked=validated(section, asked_of(bench, size, **options)))
    events = read(out / "record.jsonl")
    estimate = next(e["memory"]["total_bytes"] for e in events if "memory" in e)
    took = max(e["memory_bytes"] for e in events if e["event"] == "step") - before
    shutil.rmtree(out)
    found = {"estimate_bytes": estimate, "took_bytes": took, "held_out_loss": statistics.mean(done.losses.values())}
    # on a CPU what a step took is all of the process
    return {**found, "estimate_by_took": estimate / took} if bench.device.type == "cuda" else found


def going_on(bench: Bench) -> Found:
    """From the call that goes on to the first step that is done, and from the first call to its first step."""
    (model, store), size, out = inputs(bench, "135m"), bench.size("135m"), bench.work / "going-on"
    shutil.rmtree(out, ignore_errors=True)
    asked = validated(Heal, asked_of(bench, size, steps=6, log_every=1))
    call = partial(heal, str(model), data=str(store), out=str(out), asked=asked)
    found = {}
    for name, stops in (("start_seconds", True), ("resume_seconds", False)):
        times: list[float] = []
        stop = killed_at(3, signal.SIGTERM)
        began = perf_counter()
        with suppress(Stopped):
            call(watch=partial(_timed, times, stop if stops else None))
        found[name] = times[0] - began
    shutil.rmtree(out)
    return found


def _timed(times: list[float], watch: Any, title: str, steps: int) -> Any:
    then = watch(title, steps) if watch else lambda *told: None

    def on_step(*told: Any) -> None:
        times.append(perf_counter())
        then(*told)

    return on_step


def bits(bench: Bench, *, deterministic: bool = False, compiled: bool = False) -> Found:
    """`prune` by masks and `heal`, undisturbed and stopped by a signal and gone on: whether all bits are the same."""
    model, store = inputs(bench, "tiny")
    options = asked_of(bench, TINY, steps=6, save_every=2, log_every=1, compile=compiled)
    folder = bench.work / "bits"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    masks = {"to": TINY.halved(), "method": "masks", "calibration_windows": 2}
    found: Found = {}
    with _deterministic(deterministic) as told:
        source = model
        for name, verb, section, more in (("prune", prune, Prune, masks), ("heal", heal, Heal, {})):
            asked = validated(section, {**options, **more})
            calm, out = folder / f"{name}-calm", folder / name
            call = partial(verb, str(source), data=str(store), asked=asked)
            call(out=str(calm))
            stopped = False
            try:
                call(out=str(out), watch=killed_at(3, signal.SIGTERM))
            except Stopped:
                stopped = True
            call(out=str(out))
            found[name] = {"stopped": stopped, "weights_equal": weights(calm) == weights(out)}
            found[name]["record_equal"] = losses(calm) == losses(out)
            source = calm
    shutil.rmtree(folder)
    return {**found, "not_deterministic": sorted(told)}


@contextmanager
def _deterministic(on: bool) -> Iterator[set[str]]:
    """torch's deterministic kernels within, and what it says has none."""
    said: set[str] = set()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.use_deterministic_algorithms(on, warn_only=True)
        try:
            yield said
        finally:
            torch.use_deterministic_algorithms(False)
            said |= {str(w.message).partition(". ")[0] for w in seen if "deterministic" in str(w.message)}


@dataclass(frozen=True)
class Measurement:
    """`seconds`: about what it takes on a GPU; with less than that left it isn't begun."""

    name: str
    work: Callable[[Bench], Found]
    seconds: float
    needs_cuda: bool = False


def measurements() -> list[Measurement]:
    """In the order in which they are worth having."""
    found = []
    for name, slower in (("135m", 1), ("1b", 2)):
        for compiled in (False, True):
            end, seconds = (", compiled", 2 * slower) if compiled else ("", slower)
            work: Found = {"name": name, "compiled": compiled}
            found += [
                Measurement(f"speed, {name}{end}", partial(speed, **work), 8 * seconds),
                Measurement(f"masked by plain, {name}{end}", partial(ratio, **work), 12 * seconds),
            ]
    found.insert(2, Measurement("by the Trainer, 135m", partial(trainer, compiled=False), 20))
    for compiled, masked in itertools.product((False, True), repeat=2):
        said = f"kernels, {'masked' if masked else 'plain'}{', compiled' if compiled else ''}"
        found.append(Measurement(said, partial(kernels, masked=masked, compiled=compiled), 6, needs_cuda=True))
    found += [
        Measurement(f"memory, {name}", partial(memory, options=options), 8, needs_cuda=not OF_GPUS.isdisjoint(options))
        for name, options in MEMORY.items()
    ]
    found += [
        Measurement("saving", saving, 35),
        Measurement("speed, 135m, liger", partial(speed, name="135m", liger=True), 8, needs_cuda=True),
    ]
    found += [
        Measurement(f"speed, {name}, {again} recomputation", partial(speed, name=name, again=again), 8)
        for name, again in (("135m", "selective"), ("135m", "full"), ("1b", "selective"), ("1b", "full"))
    ]
    return [
        *found,
        Measurement("same bits, deterministic", partial(bits, deterministic=True), 15),
        Measurement("same bits", bits, 10),
        Measurement("same bits, compiled", partial(bits, compiled=True), 25, needs_cuda=True),
        Measurement("going on", going_on, 20),
        Measurement("host waits, plain", partial(waits, masked=False), 5, needs_cuda=True),
        Measurement("host waits, masked", partial(waits, masked=True), 5, needs_cuda=True),
        Measurement("by the Trainer, 135m, compiled", partial(trainer, compiled=True), 70),
        Measurement(
            "speed, 1b, full recomputation, compiled", partial(speed, name="1b", again="full", compiled=True), 20
        ),
    ]


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measured(measurement: Measurement, bench: Bench, left: float) -> Found:
    """What it found, or why it didn't; no longer than `left` seconds."""
    if measurement.needs_cuda and bench.device.type != "cuda":
        return {"skipped": "no CUDA device"}
    if left < (1 if bench.tiny else measurement.seconds):
        return {"skipped": f"{left:.0f} s left of the budget, it takes about {measurement.seconds:.0f}"}
    began = perf_counter()
    signal.setitimer(signal.ITIMER_REAL, left)
    try:
        found = measurement.work(bench)
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        found = {"failed": f"{type(error).__name__}: {error}"[:500], "at": f"{Path(at.filename).name}:{at.lineno}"}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    _free()
    return {**found, "took_seconds": perf_counter() - began}


def _out_of_time(*_: object) -> None:
    raise TimeoutError("the budget is used up")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--seconds", type=float, default=BUDGET_SECONDS)
    parser.add_argument("--brief", action="store_true", help="shorter stretches, to see that all of it works")
    parser.add_argument("--go-on", action="store_true", help="keep the figures that are there")
    parser.add_argument("--only", nargs="*", default=[], help="measurements whose names begin so")
    asked = parser.parse_args()
    began = monotonic()
    if not asked.tiny and not torch.cuda.is_available():
        parser.error("no CUDA device here; --tiny runs on a CPU")
    device = torch.device("cpu" if asked.tiny else "cuda:0")
    asked.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(asked.work.resolve(), device, asked.tiny, asked.brief)
    out = bench.work / "gpu.json" if asked.tiny else Path(__file__).with_suffix(".json")
    signal.signal(signal.SIGALRM, _out_of_time)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    result: Found = {"device": name, "peak_flops": peak_flops(device), "tiny": asked.tiny, "versions": versions()}
    result |= {"sizes": {name: vars(bench.size(name)) for name in SIZES}, "found": {}, "seconds": 0.0}
    if asked.go_on:
        then = json.loads(out.read_text(encoding="utf-8"))
        if changed := [key for key in ("device", "versions", "sizes") if then[key] != result[key]]:
            parser.error(f"{out} is of another {' and '.join(changed)}")
        result = then
    for measurement in measurements():
        if asked.only and not measurement.name.startswith(tuple(asked.only)):
            continue
        if "took_seconds" in (there := result["found"].get(measurement.name, {})) and "failed" not in there:
            continue
        found = measured(measurement, bench, asked.seconds - (monotonic() - began))
        result["found"][measurement.name] = found
        result["seconds"] += found.get("took_seconds", 0.0)
        print(f"{measurement.name}: {json.dumps(found)}", flush=True)
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
