"""The demo's learning rates: each arm at three rates, on seed 0.

    python benchmarks/demo_rates.py WORK_FOLDER

prints, and writes to benchmarks/demo_rates.json, the held-out loss (mean of the domains) at each. First the source's
rates; the arms start from the best source. What is finished in WORK_FOLDER is not done again.
"""

import json
import sys
from pathlib import Path

from shearling.demo.compare import RATES, compare, train_source
from shearling.record import versions

TRIED = (1.5e-3, 3e-3, 6e-3)
ARMS = {"masks": "healed", "one-shot": "one_shot", "scratch": "scratch"}


def main(work: Path) -> None:
    found: dict[str, dict[str, float]] = {arm: {} for arm in RATES}
    for rate in TRIED:
        losses = train_source(work / f"source-{rate:g}", seed=0, lr=rate).losses
        found["source"][f"{rate:g}"] = sum(losses.values()) / len(losses)
        print("source", rate, found["source"], flush=True)
    source = min(found["source"], key=found["source"].__getitem__)
    for rate in TRIED:
        rates = {**dict.fromkeys(RATES, rate), "source": float(source)}
        compared = compare(work / f"source-{source}", arms=f"arms-{rate:g}", seed=0, rates=rates)
        for arm, name in ARMS.items():
            found[arm][f"{rate:g}"] = getattr(compared, name).mean
        print(rate, {arm: found[arm] for arm in ARMS}, flush=True)
    out = Path(__file__).with_suffix(".json")
    out.write_text(json.dumps({"held_out_loss": found, "versions": versions()}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
