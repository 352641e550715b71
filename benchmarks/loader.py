"""Reading batches: tokens per second against plain memory-map slicing and against mosaicml-streaming, in one run.

    python benchmarks/loader.py STORE WORK_FOLDER --peer PYTHON            writes benchmarks/loader.json

STORE is a token store; PYTHON an interpreter that has mosaicml-streaming, which wants an environment of its own. Each
reader gives BATCHES shuffled batches of int64 tensors [SEQUENCES, SEQ_LEN + 1]:

shearling_W  Feed.reading() with W worker threads, at the shares of tokens: counts, permutation and reading
memmap       slices of one memory map per domain in the order of np.random permutations, to int64, stacked, to torch
mosaicml_W   StreamingDataset(shuffle=True) over the same windows as MDS, in torch's DataLoader with W workers

Rounds in turn; the figures are ratios of tokens per second, round by round: median and quartiles. DataLoader's start is
in its first batch, which is left out for all.
"""

import argparse
import json
import statistics
import subprocess
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

from shearling.data.feed import Feed, by_size
from shearling.data.store import Store
from shearling.record import versions

SEQ_LEN, SEQUENCES, BATCHES, ROUNDS = 2048, 64, 60, 5

WRITE = """
import sys, numpy as np
from streaming import MDSWriter
windows = np.load(sys.argv[1], mmap_mode="r")
with MDSWriter(out=sys.argv[2], columns={"tokens": "ndarray:uint16"}) as out:
    for window in windows:
        out.write({"tokens": np.asarray(window)})
"""
READ = """
import sys, time, numpy as np, torch
from streaming import StreamingDataset
folder, workers, sequences, batches = sys.argv[1], *map(int, sys.argv[2:])
def collate(samples):
    return torch.from_numpy(np.stack([sample["tokens"] for sample in samples]).astype(np.int64))
if __name__ == "__main__":
    dataset = StreamingDataset(local=folder, shuffle=True, batch_size=sequences)
    loader = torch.utils.data.DataLoader(dataset, batch_size=sequences, num_workers=workers, collate_fn=collate)
    reading = iter(loader)
    next(reading)
    start = time.perf_counter()
    for _ in range(batches):
        next(reading)
    print(time.perf_counter() - start)
"""


def shearling(store: Store, workers: int) -> Iterator[torch.Tensor]:
    feed, weights = Feed(store, SEQ_LEN, SEQUENCES, seed=0, workers=workers), by_size(store)
    state = feed.start()
    with feed.reading() as reading:
        while True:
            batch, state = reading.draw(state, weights)
            assert batch is not None
            yield batch.ids


def memmap(streams: dict[str, np.ndarray], shares: dict[str, float]) -> Iterator[torch.Tensor]:
    generator = np.random.default_rng(0)
    names, chances = list(shares), np.array(list(shares.values()))
    orders = {name: generator.permutation((len(ids) - 1) // SEQ_LEN) for name, ids in streams.items()}
    drawn = dict.fromkeys(names, 0)
    while True:
        windows = []
        for choice in generator.choice(len(names), SEQUENCES, p=chances):
            name = names[choice]
            start = int(orders[name][drawn[name] % len(orders[name])]) * SEQ_LEN
            drawn[name] += 1
            windows.append(streams[name][start : start + SEQ_LEN + 1].astype(np.int64))
        yield torch.from_numpy(np.stack(windows))


def seconds(reading: Iterator[torch.Tensor]) -> float:
    """For BATCHES batches after the first."""
    next(reading)
    start = perf_counter()
    for _ in range(BATCHES):
        assert next(reading).shape == (SEQUENCES, SEQ_LEN + 1)
    return perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--peer", required=True)
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    store = Store.open(asked.store)
    assert store.dtype == "uint16"
    streams, shares = {}, by_size(store)
    for domain in store.domains:
        path = asked.work / f"{domain}.npy"
        np.save(path, store.slice(domain, "train"))
        streams[domain] = np.load(path, mmap_mode="r")
    windows = [ids[: (len(ids) - 1) // SEQ_LEN * SEQ_LEN + 1] for ids in streams.values()]
    np.save(
        asked.work / "windows.npy",
        np.concatenate([np.lib.stride_tricks.sliding_window_view(ids, SEQ_LEN + 1)[::SEQ_LEN] for ids in windows]),
    )
    mds = asked.work / "mds"
    if not mds.exists():
        subprocess.run([asked.peer, "-c", WRITE, str(asked.work / "windows.npy"), str(mds)], check=True)
    (asked.work / "read.py").write_text(READ)  # a file: DataLoader's workers start from it
    peer = [asked.peer, str(asked.work / "read.py"), str(mds)]

    def peers(workers: int) -> float:
        command = [*peer, str(workers), str(SEQUENCES), str(BATCHES)]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])

    times: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        for workers in (0, 2):
            times.setdefault(f"shearling_{workers}", []).append(seconds(shearling(store, workers)))
            times.setdefault(f"mosaicml_{workers}", []).append(peers(workers))
        times.setdefault("memmap", []).append(seconds(memmap(streams, shares)))
    found = {}
    for ours in ("shearling_0", "shearling_2"):
        for theirs in ("memmap", "mosaicml_0", "mosaicml_2"):
            ratios = [b / a for a, b in zip(times[ours], times[theirs], strict=True)]
            quartiles = statistics.quantiles(ratios, n=4)
            names = ("lower_quartile", "median", "upper_quartile")
            found[f"{ours} / {theirs}"] = dict(zip(names, quartiles, strict=True))
            print(f"{ours} / {theirs}", found[f"{ours} / {theirs}"], flush=True)
    peer_versions = subprocess.check_output(
        [asked.peer, "-c", "import streaming, torch; print(streaming.__version__, torch.__version__)"], text=True
    )
    result = {
        "tokens_per_second_ratios": found,
        "rounds": ROUNDS,
        "batch": [SEQUENCES, SEQ_LEN + 1],
        "peer": peer_versions.strip(),
        "versions": versions(),
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
