"""Preparing a token store: how fast against the bare tokenizer on all cores, and in how much memory.

    python benchmarks/prepare.py TOKENIZER_FOLDER WORK_FOLDER [MEGABYTES]    prints, and writes benchmarks/prepare.json

Rates: uncompressed JSON lines of SPEED_MEGABYTES through `prepare`, against `encode_batch` of the same texts and ids to
numpy, by tokenizers' own threads on all cores, texts in memory; in turn, whole processes for neither. Memory: one
JSON-lines file of MEGABYTES; the sum over all processes of anonymous memory, sampled, above what one idle one holds.
"""

import json
import os
import random
import shutil
import statistics
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from time import perf_counter

import numpy as np
from tokenizers import Tokenizer

from shearling.data.prepare import prepare
from shearling.record import versions

REPEATS = 5
SPEED_MEGABYTES = 64
BATCH_DOCUMENTS = 512
SAMPLE_SECONDS = 0.02
WORDS = Path(__file__).parents[1] / "docs" / "architecture.md"


def texts_of(megabytes: int) -> Iterator[str]:
    """Shuffled words, mostly one to a few kilobytes a text."""
    draw, words, size = random.Random(0), WORDS.read_text(encoding="utf-8").split(), 0
    while size < megabytes << 20:
        text = " ".join(draw.choices(words, k=draw.randint(20, 800)))
        size += len(text)
        yield text


def write_lines(path: Path, texts: Iterable[str]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)


def bare(tokenizer: Tokenizer, texts: list[str]) -> int:
    """The tokens of texts, made and put into arrays."""
    count = 0
    for start in range(0, len(texts), BATCH_DOCUMENTS):
        encoded = tokenizer.encode_batch(texts[start : start + BATCH_DOCUMENTS], add_special_tokens=False)
        count += sum(len(np.array(one.ids, dtype=np.uint32)) for one in encoded)
    return count


def prepared(path: Path, tokenizer: Path, work: Path) -> int:
    """The tokens of a store made anew."""
    shutil.rmtree(work / "store", ignore_errors=True)
    (work / "store").mkdir()
    store = prepare([path], tokenizer=tokenizer, out=work / "store", processes=os.cpu_count())
    return sum(store.num_tokens(domain, split) for domain in store.domains for split in ("train", "eval"))


def rate(work: Callable[[], int]) -> float:
    start = perf_counter()
    return work() / (perf_counter() - start)


def speed(tokenizer: Path, work: Path) -> dict[str, object]:
    path = work / "speed.jsonl"
    texts, bare_tokenizer = list(texts_of(SPEED_MEGABYTES)), Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    write_lines(path, texts)
    rates: dict[str, list[float]] = {"bare": [], "prepare": []}
    for _ in range(REPEATS):
        rates["bare"].append(rate(lambda: bare(bare_tokenizer, texts)))
        rates["prepare"].append(rate(lambda: prepared(path, tokenizer, work)))
    ratios = [ours / theirs for ours, theirs in zip(rates["prepare"], rates["bare"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    path.unlink()
    return {
        "over_encode_batch": middle,
        "lower_quartile": low,
        "upper_quartile": high,
        "repeats": REPEATS,
        "megabytes": SPEED_MEGABYTES,
        "median_tokens_per_second": {name: statistics.median(found) for name, found in rates.items()},
    }


def family() -> Iterator[int]:
    """This process and its descendants."""
    waiting = [os.getpid()]
    while waiting:
        pid = waiting.pop()
        yield pid
        children = Path(f"/proc/{pid}/task").glob("*/children")
        waiting += [int(child) for path in children for child in path.read_text().split()]


def anonymous_bytes() -> int:
    total, own = 0, Path("/proc/self/cmdline").read_bytes()
    for pid in family():
        try:
            # Between its fork and its start a child of these words is this process, counted once more.
            if pid != os.getpid() and Path(f"/proc/{pid}/cmdline").read_bytes() == own:
                continue
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:  # ended in between
            continue
        total += sum(int(line.split()[1]) << 10 for line in rollup if line.startswith("Anonymous:"))
    return total


def memory(tokenizer: Path, work: Path, megabytes: int) -> dict[str, object]:
    path, peak, done = work / "memory.jsonl", 0, threading.Event()
    write_lines(path, texts_of(megabytes))
    input_bytes, before = path.stat().st_size, anonymous_bytes()

    def watch() -> None:
        nonlocal peak
        while not done.wait(SAMPLE_SECONDS):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    tokens = prepared(path, tokenizer, work)
    done.set()
    watcher.join()
    path.unlink()
    return {
        "input_bytes": input_bytes,
        "tokens": tokens,
        "peak_anonymous_bytes": peak,
        "above_idle_bytes": peak - before,
        "processes": os.cpu_count(),
    }


def main(tokenizer: str, work: str, megabytes: int = 300) -> None:
    folder = Path(work)
    folder.mkdir(parents=True, exist_ok=True)
    # Memory first: what the other leaves in this process would count.
    found = {"memory": memory(Path(tokenizer), folder, megabytes), "speed": speed(Path(tokenizer), folder)}
    shutil.rmtree(folder / "store")
    print(json.dumps(found, indent=1))
    result = {"found": found, "versions": versions()}
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
