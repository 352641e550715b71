"""What can be chosen of the mixture, and why the defaults are what they are."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from shearling.errors import UserError, check_ranges
from shearling.mixture.weights import Rule

Schedule = Literal["auto", "dynamic", "constant", "proportional"]
Signal = Literal["held_out", "training", "teacher_kl"]

# The paper's has no floor and no cap; LLM-Shearing's code mixes in a uniform share of 1e-4, which is this floor's like.
RULES = {
    "anchored": Rule("anchored", eta=1.0, smoothing=0.5, floor=0.1, cap=10.0),
    "paper": Rule("paper", eta=1.0, smoothing=0.0, floor=1e-3, cap=1e6),
}


@dataclass(frozen=True)
class Options:
    """How the domains' shares are chosen.

    `schedule`: "dynamic" follows losses, "constant" stays at `weights`, "proportional" at the tokens' shares; "auto" is
    dynamic where there is a reference. `weights` sum to 1; left out: by tokens. `reference`: a file of `shearling
    reference`, or losses by domain; left out: the source model's own. `signal`: what is held against the reference:
    held-out losses, those of the batches trained on (free), or the KL to the teacher. `every`: steps between updates.
    The rest bounds and smooths the update (`Rule`); left out: the rule's own.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    schedule: Schedule = "auto"
    weights: dict[str, float] | None = None
    reference: str | dict[str, float] | None = None
    signal: Signal = "held_out"
    rule: Literal["anchored", "paper"] = "anchored"
    every: int | None = None
    eta: float | None = None
    smoothing: float | None = None
    floor: float | None = None
    cap: float | None = None

    def __post_init__(self) -> None:
        check_ranges(
            self, {"every": (1, None), "eta": (0, None), "smoothing": (0, 0.99), "floor": (0, 0.9), "cap": (1, None)}
        )
        if self.schedule == "proportional" and self.weights is not None:
            change = "leave the weights out, or take constant, which stays at them"
            raise UserError("mixture.weights", found="them with proportional", expected="one of them", change=change)

    def chosen_rule(self) -> Rule:
        """The rule with what was asked for."""
        base = RULES[self.rule]
        asked = {name: getattr(self, name) for name in ("eta", "smoothing", "floor", "cap")}
        values = {name: getattr(base, name) if value is None else value for name, value in asked.items()}
        return Rule(base.kind, **values)
