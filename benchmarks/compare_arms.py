"""Learned masks against the one-shot cut and against training from scratch, at equal FLOPs, rates tuned for each arm.

    python benchmarks/compare_arms.py RECIPE WORK_FOLDER --rates 2e-3 4e-3 8e-3 --seeds 0 1 2 --out RESULT.json \
        [--set model=...] [--arms masks one_shot scratch]

The recipe's prune and heal stages are the masks' arm; the others get as many steps as cost the same FLOPs, forward and
backward, as its two stages together. Every arm runs at every rate and seed; what is finished in WORK_FOLDER is not done
again. Writes held-out losses by domain for each run, and for each arm its best rate by the mean over seeds.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from shearling.arch.config import config_at
from shearling.axes.count import flops_per_token
from shearling.axes.target import resolve_target
from shearling.recipe import Data, Prune, Recipe, load_recipe
from shearling.record import versions
from shearling.verbs.data import make_store
from shearling.verbs.heal import heal
from shearling.verbs.prune import prune
from shearling.verbs.source import Source
from shearling.weights.folder import carry

ARMS = ("masks", "one_shot", "scratch")


class Comparison:
    """One recipe, its data and its folder."""

    def __init__(self, recipe: Recipe, work: Path):
        assert recipe.heal is not None
        self.recipe, self.work, self.heal_settings = recipe, work, recipe.heal
        work.mkdir(parents=True, exist_ok=True)
        self.store = recipe.data if isinstance(recipe.data, str) else str(work / "store")
        if isinstance(recipe.data, Data):
            make_store(recipe.data, tokenizer=recipe.model, out=self.store)
        self.source = Source.open(recipe.model)
        self.target, _ = resolve_target(self.source.family, self.source.shape, recipe.prune.to)

    def equal_steps(self) -> int:
        """Healing steps that cost what the recipe's pruning and healing steps do."""
        context = (self.heal_settings.seq_len or 2048) // 2
        costs = [
            flops_per_token(self.source.family, self.source.config, s, context=context)
            for s in (self.source.shape, self.target)
        ]
        assert self.recipe.prune.batch_tokens == self.heal_settings.batch_tokens
        return round((self.heal_settings.steps or 0) + (self.recipe.prune.steps or 0) * costs[0] / costs[1])

    def run(self, arm: str, *, rate: float, seed: int) -> dict[str, Any]:
        name = f"{arm}-{rate:g}-{seed}"
        if arm == "masks":
            asked = self._prune("masks", lr=rate, seed=seed)
            cut = prune(self.recipe.model, data=self.store, out=str(self.work / f"{name}-cut"), asked=asked)
            steps, start, before = self.heal_settings.steps or 0, cut.out, dict(cut.losses)
        elif arm == "one_shot":
            asked = self._prune("activation", lr=None, seed=seed)
            cut = prune(self.recipe.model, data=self.store, out=str(self.work / f"one_shot-{seed}-cut"), asked=asked)
            steps, start, before = self.equal_steps(), cut.out, dict(cut.losses)
        else:
            steps, start, before = self.equal_steps(), self._untrained(seed), {}
        healing = self.heal_settings.model_copy(update={"lr": rate, "seed": seed, "steps": steps})
        healed = heal(str(start), data=self.store, out=str(self.work / name), asked=healing)
        source = dict(cut.source_losses) if arm != "scratch" else {}
        losses = dict(healed.losses)
        mean = statistics.mean(losses.values())
        run = {"arm": arm, "rate": rate, "seed": seed, "steps": steps, "mean": mean}
        return {**run, "losses": losses, "cut": before, "source": source, "heal_flops": healed.flops}

    def _prune(self, method: str, *, lr: float | None, seed: int) -> Prune:
        return self.recipe.prune.model_copy(update={"method": method, "lr": lr, "seed": seed})

    def _untrained(self, seed: int) -> Path:
        folder = self.work / f"untrained-{seed}"
        if not (folder / "config.json").exists():
            layers = tuple(range(self.target["num_hidden_layers"]))
            config = config_at(self.source.family, self.source.config, self.target, layers=layers, dtype="float32")
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
            model.save_pretrained(folder)
            carry(self.source.folder, folder)
        return folder


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """For each arm the rate with the lowest mean over seeds, that mean, and the standard deviation over seeds."""
    best = {}
    for arm in dict.fromkeys(run["arm"] for run in runs):
        by_rate: dict[float, list[float]] = {}
        for run in runs:
            if run["arm"] == arm:
                by_rate.setdefault(run["rate"], []).append(run["mean"])
        rate = min(by_rate, key=lambda r: statistics.mean(by_rate[r]))
        found = by_rate[rate]
        spread = statistics.stdev(found) if len(found) > 1 else None
        best[arm] = {"rate": rate, "mean": statistics.mean(found), "standard_deviation": spread, "seeds": len(found)}
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--rates", nargs="+", type=float, required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--set", action="append", default=[], dest="settings")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    comparison = Comparison(load_recipe(asked.recipe, asked.settings), asked.work)
    runs = json.loads(asked.out.read_text())["runs"] if asked.out.exists() else []
    done = {(run["arm"], run["rate"], run["seed"]) for run in runs}
    for arm in asked.arms:
        for seed in asked.seeds:
            for rate in asked.rates:
                if (arm, rate, seed) in done:
                    continue
                runs.append(comparison.run(arm, rate=rate, seed=seed))
                print(f"{arm} rate {rate:g} seed {seed}: {runs[-1]['mean']:.4f}", flush=True)
                prune_settings = comparison.recipe.prune.model_dump(mode="json")
                result = {"best": summarise(runs), "runs": runs, "prune": prune_settings, "versions": versions()}
                asked.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(summarise(runs), indent=1))


if __name__ == "__main__":
    main()
