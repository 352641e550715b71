"""The mixture in a training run: which losses it is held against, how often, and what the record says."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shearling.mixture.options import Signal
from shearling.mixture.weights import Mixture, Rule, updated

# What the training loop calls each signal.
NAMES: Mapping[Signal, str] = {"held_out": "held_out", "training": "loss", "teacher_kl": "kl"}


@dataclass(frozen=True)
class Steered:
    """Updates the mixture by `rule` every so many steps; `references` in the unit of the signal, nats per token."""

    rule: Rule
    references: Mapping[str, float]
    signal: Signal
    every: int

    @property
    def wants_held_out(self) -> bool:
        return self.signal == "held_out"

    def __call__(
        self, mixture: Mixture, losses: Mapping[str, Mapping[str, float | None]]
    ) -> tuple[Mixture, dict[str, Any]]:
        """The mixture from the next step on, and what the record says of the change."""
        found = losses[NAMES[self.signal]]
        after, notes = updated(mixture, self.rule, losses=found, references=self.references)
        said = {
            "before": mixture.weights,
            "weights": after.weights,
            "losses": found,
            "references": self.references,
            "excess": after.excess,
            "notes": [*notes, _sentence(mixture, after)],
        }
        return after, said


def _sentence(before: Mixture, after: Mixture) -> str:
    """Who gained most, and why."""
    change = {domain: after.weights[domain] - before.weights[domain] for domain in after.weights}
    gained = max(change, key=lambda d: change[d])
    if change[gained] < 5e-5:
        return "the weights stay as they are"
    shares = f"{gained} goes from {before.weights[gained]:.1%} to {after.weights[gained]:.1%} of the data"
    excess, old = after.excess.get(gained, 0.0), before.excess.get(gained, 0.0)
    if excess > 0 and (excess >= old or not before.excess):
        return f"{shares}: it is {excess:.3f} above its reference"
    lost = min(change, key=lambda d: change[d])
    return f"{shares}, of what {lost} gives back: that is {after.excess.get(lost, 0.0):.3f} above its reference by now"
