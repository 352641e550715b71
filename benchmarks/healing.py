"""Ways of healing one cut, rates tuned for each: mixtures of the data, or shares of a teacher.

    python benchmarks/healing.py mixtures RECIPE WORK_FOLDER --out RESULT.json --rates 2e-3 4e-3 8e-3 --seeds 0 1 2
    python benchmarks/healing.py teachers RECIPE WORK_FOLDER ...                            [--set key=value]

The recipe's model is cut once, by one-shot scores; each arm heals the cut for the recipe's healing budget. Every arm
runs at every rate on the first seed, then at its best rate on the others. What is finished in WORK_FOLDER isn't done
again.

mixtures, at equal tokens. proportional: shares of tokens, constant. uniform: equal shares, constant. anchored, paper:
start at the shares of tokens and follow the source's held-out losses.

teachers, at the shares of tokens. kl-A: the loss is (1 - A) cross-entropy + A KL to the source, at equal tokens.
kl-A-flops: the same at equal FLOPs, the teacher's forward passes counted, so for fewer steps.

Result by arm: held-out losses by domain, the mean of domains (what the rate is chosen by), the mean by tokens, and the
worst gap, the largest of loss - reference. References are the source's losses.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from shearling.axes.count import flops_per_token
from shearling.data.feed import by_size
from shearling.data.store import Store
from shearling.recipe import Data, Heal, Recipe, load_recipe, validated
from shearling.record import versions
from shearling.verbs.data import make_store
from shearling.verbs.heal import heal
from shearling.verbs.prune import Pruned, prune
from shearling.verbs.source import Source

SHARES = (0.5, 0.9, 1.0)
ARMS = {
    "mixtures": ("proportional", "uniform", "anchored", "paper"),
    "teachers": ("kl-0", *(f"kl-{a:g}" for a in SHARES), *(f"kl-{a:g}-flops" for a in SHARES)),
}


class Comparison:
    """One recipe, its data, its cut and its folder."""

    def __init__(self, recipe: Recipe, work: Path):
        assert recipe.heal is not None
        self.recipe, self.work, self.healing = recipe, work, recipe.heal
        work.mkdir(parents=True, exist_ok=True)
        self.store = recipe.data if isinstance(recipe.data, str) else str(work / "store")
        if isinstance(recipe.data, Data):
            make_store(recipe.data, tokenizer=recipe.model, out=self.store)
        self.sizes = by_size(Store.open(Path(self.store)))
        asked = recipe.prune.model_copy(update={"method": "activation"})
        self.cut: Pruned = prune(recipe.model, data=self.store, out=str(work / "cut"), asked=asked)

    def settings(self, arm: str) -> dict[str, Any]:
        """What of the recipe's healing an arm changes."""
        if arm == "uniform":
            return {"mixture": {"schedule": "constant", "weights": dict.fromkeys(self.sizes, 1 / len(self.sizes))}}
        if arm in ("anchored", "paper"):
            return {"mixture": {"schedule": "dynamic", "rule": arm}}
        settings: dict[str, Any] = {"mixture": {"schedule": "proportional"}}
        if arm.startswith("kl-"):
            settings["teacher"] = {"share": float(arm.split("-")[1])}
        if arm.endswith("-flops"):
            settings["steps"] = round((self.healing.steps or 0) / self.cost_of_teaching())
        return settings

    def cost_of_teaching(self) -> float:
        """FLOPs of a distilled step over those of a plain one."""
        context = (self.healing.seq_len or 2048) // 2
        teacher, student = (Source.open(model) for model in (self.recipe.model, str(self.cut.out)))
        forward = [flops_per_token(model.family, model.config, context=context) for model in (teacher, student)]
        return 1 + forward[0] / (3 * forward[1])

    def run(self, arm: str, *, rate: float, seed: int) -> dict[str, Any]:
        plain, own = self.healing.model_dump(mode="json"), self.settings(arm)
        mixture = {**plain["mixture"], **own.pop("mixture")}
        asked = validated(Heal, {**plain, "lr": rate, "seed": seed, "mixture": mixture, **own})
        healed = heal(str(self.cut.out), data=self.store, out=str(self.work / f"{arm}-{rate:g}-{seed}"), asked=asked)
        gaps = {d: loss - self.cut.source_losses[d] for d, loss in healed.losses.items()}
        found = {"arm": arm, "rate": rate, "seed": seed, "losses": dict(healed.losses), "gaps": gaps}
        found["mean"] = statistics.mean(healed.losses.values())
        found["mean_by_tokens"] = sum(self.sizes[d] * loss for d, loss in healed.losses.items())
        return {**found, "worst_gap": max(gaps.values()), "tokens": healed.tokens, "flops": healed.flops}


def spread(runs: list[dict[str, Any]], key: str) -> dict[str, float | None]:
    """Mean and standard deviation over seeds."""
    values = [run[key] for run in runs]
    return {"mean": statistics.mean(values), "standard_deviation": statistics.stdev(values) if values[1:] else None}


def best_rate(runs: list[dict[str, Any]], arm: str, seed: int) -> float:
    """By the mean of domains, on the first seed."""
    return min((run for run in runs if (run["arm"], run["seed"]) == (arm, seed)), key=lambda run: run["mean"])["rate"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=ARMS)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--rates", nargs="+", type=float, required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--arms", nargs="+")
    parser.add_argument("--set", action="append", default=[], dest="settings")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    arms = asked.arms or ARMS[asked.what]
    comparison = Comparison(load_recipe(asked.recipe, asked.settings), asked.work)
    runs: list[dict[str, Any]] = []

    def run(arm: str, rate: float, seed: int) -> None:
        runs.append(comparison.run(arm, rate=rate, seed=seed))
        print(f"{arm} rate {rate:g} seed {seed}: {runs[-1]['mean']:.4f}, gap {runs[-1]['worst_gap']:.4f}", flush=True)

    first, *others = asked.seeds
    for arm in arms:
        for rate in asked.rates:
            run(arm, rate, first)
    for seed in others:
        for arm in arms:
            run(arm, best_rate(runs, arm, first), seed)
    best = {}
    for arm in arms:
        rate = best_rate(runs, arm, first)
        chosen = [one for one in runs if (one["arm"], one["rate"]) == (arm, rate)]
        best[arm] = {"rate": rate, **{key: spread(chosen, key) for key in ("mean", "mean_by_tokens", "worst_gap")}}
    result = {
        "best": best,
        "source": dict(comparison.cut.source_losses),
        "cut": dict(comparison.cut.losses),
        "shares_of_tokens": comparison.sizes,
        "runs": runs,
        "heal": comparison.healing.model_dump(mode="json"),
        "versions": versions(),
    }
    asked.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(best, indent=1))


if __name__ == "__main__":
    main()
