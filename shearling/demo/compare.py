"""The demo: a source is trained, sheared and healed, and set against what the same FLOPs give in other ways."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shearling.arch import family_of
from shearling.arch.config import config_at
from shearling.axes.shape import shape_of
from shearling.axes.target import resolve_target
from shearling.demo.corpus import write_corpus
from shearling.demo.models import SOURCE, TARGET, write_tokenizer, write_untrained
from shearling.eval.generation import continue_text
from shearling.recipe import Data, Heal, Prune, validated
from shearling.stage import Stage
from shearling.verbs.data import make_store
from shearling.verbs.heal import Healed, heal
from shearling.verbs.prune import Pruned, prune
from shearling.verbs.session import Watch, unwatched
from shearling.weights.model import load_model

SEQ_LEN, BATCH_TOKENS = 128, 2048
SOURCE_STEPS, PRUNE_STEPS, HEAL_STEPS = 800, 50, 240

# The best of three rates for each arm, found beforehand on seed 0: benchmarks/demo_rates.json has all of them.
RATES = {"source": 3e-3, "masks": 3e-3, "one-shot": 6e-3, "scratch": 3e-3}

PROMPTS = {"code": "def read(self", "docs": "The function returns", "names": "000C8 LATIN CAPITAL LETTER"}
SAMPLE_TOKENS = 48


@dataclass(frozen=True)
class Arm:
    """One model, and what it took. Losses are held-out nats per token by domain; tokens and FLOPs after the source."""

    label: str
    folder: Path
    parameters: int
    losses: Mapping[str, float]
    tokens: int
    flops: float
    lr: float | None

    @property
    def mean(self) -> float:
        return sum(self.losses.values()) / len(self.losses)


@dataclass(frozen=True)
class Comparison:
    """The arms, by what they are."""

    source: Arm
    cut: Arm
    healed: Arm
    one_shot: Arm
    scratch: Arm
    samples: Mapping[str, str]

    @property
    def arms(self) -> tuple[Arm, ...]:
        return (self.source, self.cut, self.healed, self.one_shot, self.scratch)

    @property
    def passed(self) -> bool:
        """Whether the sheared model beats the same shape from scratch. That it reloads, its sample has shown."""
        return self.healed.mean < self.scratch.mean

    def verdict(self) -> str:
        """What came out, whoever won."""
        versus = self.healed.mean - self.one_shot.mean
        winner = "learned masks" if versus < 0 else "the one-shot cut"
        return (
            f"The sheared model {'beats' if self.passed else 'loses to'} the same shape from scratch at equal FLOPs, "
            f"by {abs(self.scratch.mean - self.healed.mean):.3f} nats per token. "
            f"Between learned masks and the one-shot cut, healed for the same FLOPs, {winner} came out ahead by "
            f"{abs(versus):.3f}."
        )


def train_source(work: Path, *, seed: int, lr: float = RATES["source"], watch: Watch = unwatched) -> Healed:
    """Corpus, tokenizer, token store and the model to be sheared, in `work`."""
    untrained = _prepare(work, seed)
    options = {"lr": lr, "warmup": 0.05, "mixture": {"schedule": "proportional"}}  # no source to follow
    return _train(work, untrained, work / "source", steps=SOURCE_STEPS, seed=seed, watch=watch, **options)


def compare(
    work: Path, *, seed: int, rates: Mapping[str, float] = RATES, arms: str = ".", watch: Watch = unwatched
) -> Comparison:
    """Trains, shears, heals and compares in `work`, the arms in its folder `arms`; what is finished is passed over."""
    source = train_source(work, seed=seed, lr=rates["source"], watch=watch)
    folder = work / arms

    def cut(name: str, method: str) -> Pruned:
        asked = {**_common(seed), "to": TARGET, "method": method, "steps": PRUNE_STEPS, "lr": rates["masks"]}
        checked, watched = validated(Prune, asked), _titled(watch, name)
        return prune(str(source.out), data=str(work / "store"), out=str(folder / name), asked=checked, watch=watched)

    def trained(model: Path, name: str, steps: int, rate: str, warmup: float) -> Healed:
        # All arms follow the source's losses, from scratch too; asked when they are measured anyway.
        mixture = {"reference": dict(source.losses), "every": max(1, steps // 10)}
        options = {"lr": rates[rate], "warmup": warmup, "mixture": mixture}
        return _train(work, model, folder / name, steps=steps, seed=seed, watch=watch, **options)

    pruned = cut("pruned", "masks")
    healed = trained(pruned.out, "healed", HEAL_STEPS, "masks", 0.03)
    equal_steps = round((pruned.flops + healed.flops) / (healed.flops / HEAL_STEPS))
    one_shot = trained(cut("one-shot", "activation").out, "one-shot-healed", equal_steps, "one-shot", 0.03)
    scratch = trained(_small_untrained(work, seed), "scratch", equal_steps, "scratch", 0.05)

    spent = PRUNE_STEPS * BATCH_TOKENS
    found = {
        "source": _arm("source", source, rates["source"]),
        "cut": Arm("sheared", pruned.out, pruned.parameters, pruned.losses, spent, pruned.flops, rates["masks"]),
        "healed": _arm("sheared, healed", healed, rates["masks"], tokens=spent, flops=pruned.flops),
        "one_shot": _arm("one-shot cut, healed", one_shot, rates["one-shot"]),
        "scratch": _arm("from scratch", scratch, rates["scratch"]),
    }
    return Comparison(**found, samples={arm.label: _sample(arm.folder) for arm in found.values()})


def _train(work: Path, model: Path, out: Path, *, steps: int, seed: int, watch: Watch, **options: Any) -> Healed:
    asked = validated(Heal, {**_common(seed), "steps": steps, **options})
    return heal(str(model), data=str(work / "store"), out=str(out), asked=asked, watch=_titled(watch, out.name))


def _common(seed: int) -> dict[str, Any]:
    return {"seq_len": SEQ_LEN, "batch_tokens": BATCH_TOKENS, "seed": seed, "device": "cpu"}


def _titled(watch: Watch, name: str) -> Watch:
    return lambda title, steps: watch(name, steps)


def _prepare(work: Path, seed: int) -> Path:
    """Corpus, tokenizer, token store and an untrained source, whose folder it gives."""
    inputs = Stage(work / "inputs", {"verb": "demo inputs", "source": SOURCE, "seed": seed})
    if not inputs.done:
        with inputs as folder:
            corpus = write_corpus(folder / "corpus")
            write_tokenizer(corpus, folder / "tokenizer")
            write_untrained(SOURCE, folder / "untrained", tokenizer=folder / "tokenizer", seed=seed)
    asked = validated(Data, {"inputs": [str(inputs.out / "corpus")], "held_out": 0.02})
    make_store(asked, tokenizer=str(inputs.out / "tokenizer"), out=str(work / "store"))
    return inputs.out / "untrained"


def _small_untrained(work: Path, seed: int) -> Path:
    """The target's shape with random weights."""
    family = family_of(SOURCE)
    target, _ = resolve_target(family, shape_of(family, SOURCE), TARGET)
    layers = tuple(range(target["num_hidden_layers"]))
    config = config_at(family, SOURCE, target, layers=layers, dtype="float32")
    stage = Stage(work / "small-untrained", {"verb": "demo small", "config": config, "seed": seed})
    if not stage.done:
        with stage as folder:
            write_untrained(config, folder, tokenizer=work / "inputs" / "tokenizer", seed=seed)
    return stage.out


def _arm(label: str, healed: Healed, lr: float, *, tokens: int = 0, flops: float = 0.0) -> Arm:
    return Arm(label, healed.out, healed.parameters, healed.losses, healed.tokens + tokens, healed.flops + flops, lr)


def _sample(folder: Path) -> str:
    """What the reloaded model goes on to say, a prompt for each domain."""
    model = load_model(folder)
    return "\n\n".join(continue_text(model, folder, prompt, tokens=SAMPLE_TOKENS) for prompt in PROMPTS.values())
