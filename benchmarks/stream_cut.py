"""Cutting a large single-file checkpoint: peak anonymous memory, and bytes per second against copying the file.

    python benchmarks/stream_cut.py WORK_FOLDER     writes benchmarks/stream_cut.json; wants 12 GB of disk

The checkpoint is synthetic: a Llama's shape in bf16, random weights, 4 GB or more in one file. The cut halves hidden,
kv heads and intermediate and drops a third of the layers, norm scales folded in, by the code that `prune` calls.
"""

import json
import shutil
import statistics
import sys
import threading
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from shearling.arch.config import config_at
from shearling.axes.axis import MASKABLE, mask_shape
from shearling.axes.index import select
from shearling.axes.spec import Tensor as Row
from shearling.axes.target import resolve_target
from shearling.cut.extract import Cut
from shearling.record import versions
from shearling.verbs.source import Source
from shearling.weights.model import save_model
from shearling.weights.writer import Entry, write

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 11008,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
WANTED = {
    "hidden_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "intermediate_size": 5504,
}
REPEATS = 3


class PeakAnonymous:
    """The highest RssAnon of this process while the block runs, sampled every millisecond."""

    def __enter__(self) -> "PeakAnonymous":
        self.before = self.peak = _anonymous_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.001):
            self.peak = max(self.peak, _anonymous_bytes())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def _anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1]) * 1024


def make_source(folder: Path) -> Source:
    """The synthetic checkpoint, written once."""
    if not (folder / "model.safetensors").exists():
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(CONFIG))
        from shearling.arch import family_of
        from shearling.axes.shape import shape_of

        family = family_of(CONFIG)
        sizes = shape_of(family, CONFIG).axes
        rows = {row.at(layer): row for row, layer in family.named(CONFIG)}
        shapes = {name: tuple(dim.size(sizes) for dim in row.dims) for name, row in rows.items()}
        entries = [Entry(name, "BF16", shape) for name, shape in shapes.items()]
        write(folder, entries, lambda name: torch.randn(shapes[name]).to(torch.bfloat16), shard_bytes=1 << 40)
    return Source.open(str(folder))


def cut_to(source: Source, out: Path) -> None:
    """What `prune --method activation` does once scores are there."""
    target, _ = resolve_target(source.family, source.shape, WANTED)
    generator = torch.Generator().manual_seed(0)
    scores = {a: torch.rand(mask_shape(a, source.shape.axes), generator=generator).tolist() for a in MASKABLE}
    kept = select(scores, source=source.shape, target=target)
    norms = {
        f"model.layers.{i}.{n}.weight": 1.1 for i in range(24) for n in ("input_layernorm", "post_attention_layernorm")
    }
    cut = Cut(source.family, source.config, target, kept, norm_scales=norms)

    def tensor(row: Row, layer: int | None) -> torch.Tensor:
        return cut.tensor(row, layer, source.read)

    out.mkdir()
    save_model(
        out,
        family=source.family,
        config=config_at(source.family, source.config, target, layers=kept.layers, dtype="bfloat16"),
        shape=target,
        dtype=torch.bfloat16,
        tensor=tensor,
    )


def main(work: Path) -> None:
    source = make_source(work / "source")
    file = work / "source" / "model.safetensors"
    largest = max(4 * info.nbytes // 2 for info in source.checkpoint.tensors.values())
    figures: dict[str, list[Any]] = {"copy_seconds": [], "cut_seconds": [], "peak_anonymous_bytes": []}
    for _ in range(REPEATS):
        start = perf_counter()
        shutil.copyfile(file, work / "copy")
        figures["copy_seconds"].append(perf_counter() - start)
        (work / "copy").unlink()
        with PeakAnonymous() as memory:
            start = perf_counter()
            cut_to(source, work / "cut")
            figures["cut_seconds"].append(perf_counter() - start)
        figures["peak_anonymous_bytes"].append(memory.peak - memory.before)
        shutil.rmtree(work / "cut")
    limit = 3 * largest + 300_000_000
    found = {
        "source_bytes": file.stat().st_size,
        "largest_tensor_float32_bytes": largest,
        "peak_anonymous_bytes": max(figures["peak_anonymous_bytes"]),
        "limit_bytes": limit,
        "within_limit": max(figures["peak_anonymous_bytes"]) <= limit,
        "cut_source_bytes_per_second_over_copy": statistics.median(
            copy / cut for copy, cut in zip(figures["copy_seconds"], figures["cut_seconds"], strict=True)
        ),
        "repeats": REPEATS,
        "versions": versions(),
    }
    print(json.dumps(found, indent=1))
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
