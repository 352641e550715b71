"""How soon `inspect` answers: whole processes, each figure as a ratio to Python's own start, in turn.

    python benchmarks/inspect_start.py CONFIG        prints, and writes benchmarks/inspect_start.json

A config file of any supported model will do. `import torch` is there for comparison: what answering would cost if
the algebra needed it.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path
from time import perf_counter

from shearling.record import versions

REPEATS = 9


def seconds_to_first_line(command: list[str]) -> float:
    start = perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    taken = perf_counter() - start
    process.stdout.close()
    process.wait()
    return taken


def main(config: str) -> None:
    commands = {
        "python": [sys.executable, "-c", "print()"],
        "inspect": [sys.executable, "-m", "shearling.cli", "inspect", config],
        "import torch": [sys.executable, "-c", "import torch; print()"],
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(REPEATS + 1):
        for name, command in commands.items():
            times[name].append(seconds_to_first_line(command))
    found = {}
    for name in ("inspect", "import torch"):
        ratios = [a / b for a, b in zip(times[name][1:], times["python"][1:], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        found[name] = {"over_python_start": middle, "lower_quartile": low, "upper_quartile": high, "repeats": REPEATS}
    print(json.dumps(found, indent=1))
    result = {"found": found, "versions": versions()}
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
