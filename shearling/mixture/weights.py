"""The mixture's update (dynamic batch loading): plain functions over plain numbers, no clock, rank or file.

w: weights by domain, summing to 1; e: excess, how far a domain's loss is above its reference, never below 0.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from math import exp, fsum, inf, isclose, isfinite
from typing import Literal

from shearling.errors import UserError, nearest, raise_all

SUM_TOLERANCE = 1e-6
SAME = 1e-12
REMINDER = 10  # updates after which a reference that wasn't reached is mentioned, and again
TINY = 1e-280  # no weight gets to 0, which it could never leave
WARN_ABOVE = 0.9  # a share at which one domain is all that is trained on


@dataclass(frozen=True)
class Rule:
    """How weights follow losses.

    "paper": w <- w exp(eta e), normalised: it accumulates (Sheared-LLaMA, arXiv 2310.06694, algorithm 1, with eta 1).
    "anchored": w = start exp(eta s), normalised, s the smoothed excess: the same losses give the same weights.
    `smoothing` is the share of the old excess in the new one, `floor` and `cap` bound a weight as multiples of its
    start, so that no domain dies out or takes over.
    """

    kind: Literal["anchored", "paper"] = "anchored"
    eta: float = 1.0
    smoothing: float = 0.5
    floor: float = 0.1
    cap: float = 10.0


@dataclass(frozen=True)
class Mixture:
    """The mixture in force and all that its next update depends on. `excess` is smoothed; empty before any update."""

    start: Mapping[str, float]
    weights: Mapping[str, float]
    excess: Mapping[str, float]
    updates: int = 0
    reached: tuple[str, ...] = ()  # the domains that were at their reference once

    @classmethod
    def starting(cls, weights: Mapping[str, float]) -> "Mixture":
        """At `weights`, before any update."""
        return cls(dict(weights), dict(weights), {})


def check_weights(weights: Mapping[str, float], domains: tuple[str, ...]) -> None:
    """Raises UserError unless each domain has one positive weight and they sum to 1."""
    errors = [
        UserError("mixture", found=repr(name), expected="a domain of the data", change=nearest(name, domains))
        for name in weights
        if name not in domains
    ]
    errors += [
        UserError(f"weight of {name!r}", found=w, expected="a positive, finite number", change="give a share above 0")
        for name, w in weights.items()
        if not (isfinite(w) and w > 0)
    ]
    if missing := [name for name in domains if name not in weights]:
        found = f"no weight for {', '.join(map(repr, missing))}"
        errors.append(UserError("mixture", found=found, expected="one for each domain", change="add them"))
    total = fsum(weights.values())
    if not errors and abs(total - 1) > SUM_TOLERANCE:
        scaled = ", ".join(f"{name}={w / total:.6g}" for name, w in weights.items())
        errors.append(UserError("mixture", found=f"a sum of {total:.6g}", expected="1", change=f"perhaps {scaled}"))
    raise_all(errors)


def updated(
    mixture: Mixture, rule: Rule, *, losses: Mapping[str, float | None], references: Mapping[str, float]
) -> tuple[Mixture, tuple[str, ...]]:
    """The mixture after one update, and a sentence for each thing about it that is out of the ordinary.

    `losses` and `references` in the same unit. A domain whose loss is missing or not finite keeps its last excess; if
    that happens to all of them, the weights stay.
    """
    notes = []
    excess = dict(mixture.excess)
    seen = {d: loss for d in mixture.start if (loss := losses.get(d)) is not None and isfinite(loss)}
    for domain in mixture.start:
        if domain in seen:
            now = max(seen[domain] - references[domain], 0.0)
            old = mixture.excess.get(domain, now)
            excess[domain] = rule.smoothing * old + (1 - rule.smoothing) * now
        else:
            what = "no samples" if losses.get(domain) is None else f"a loss of {losses[domain]}"
            notes.append(f"{domain} had {what}: its excess stays as it was")
    if not seen:
        return replace(mixture, updates=mixture.updates + 1), (*notes, "no domain had a loss: the weights stay")
    base = mixture.weights if rule.kind == "paper" else mixture.start
    highest = max(excess.values())  # taken off every exponent, so that none overflows
    raw = {d: max(base[d] * exp(rule.eta * (excess.get(d, 0.0) - highest)), TINY) for d in base}
    weights = bounded(
        raw,
        floors={domain: rule.floor * share for domain, share in mixture.start.items()},
        caps={domain: min(1.0, rule.cap * share) for domain, share in mixture.start.items()},
    )
    if all(isclose(weights[d], w, rel_tol=SAME) for d, w in mixture.weights.items()):
        weights = mixture.weights  # to the bit, so that nobody takes rounding for a change
    reached = tuple(d for d in mixture.start if d in mixture.reached or (d in seen and seen[d] <= references[d]))
    after = replace(mixture, weights=weights, excess=excess, updates=mixture.updates + 1, reached=reached)
    return after, (*notes, *_remarks(after, rule))


def bounded(raw: Mapping[str, float], *, floors: Mapping[str, float], caps: Mapping[str, float]) -> dict[str, float]:
    """Weights in the ratio of `raw` that sum to 1, each within its floor and cap; those at a bound leave the rest to
    the others.

    `raw` is above 0. The sum of clip(scale x raw) grows with the scale, so the scale is found between the bounds' own.
    Independent of the domains' order.
    """
    assert fsum(floors.values()) <= 1 + SUM_TOLERANCE <= fsum(caps.values()) + 2 * SUM_TOLERANCE
    # Beyond these the set of domains at a bound doesn't change, so the scale of those between is exact.
    edges = sorted({bounds[d] / r for bounds in (floors, caps) for d, r in raw.items()} | {0.0, inf})
    for low, high in pairwise(edges):
        at_floor = [d for d, r in raw.items() if floors[d] / r >= high]
        at_cap = [d for d, r in raw.items() if d not in at_floor and caps[d] / r <= low]
        free = [d for d in raw if d not in at_floor and d not in at_cap]
        fixed = fsum([floors[d] for d in at_floor] + [caps[d] for d in at_cap])
        between = fsum(raw[d] for d in free)
        scale = (1 - fixed) / between if free else low
        if (free and low <= scale <= high * (1 + 1e-12)) or (not free and abs(1 - fixed) <= SUM_TOLERANCE):
            found = {d: floors[d] for d in at_floor} | {d: caps[d] for d in at_cap}
            found |= {d: min(max(scale * raw[d], floors[d]), caps[d]) for d in free}
            return {d: found[d] for d in raw}
    raise AssertionError(f"no scale bounds {raw} by {floors} and {caps}")


def _remarks(mixture: Mixture, rule: Rule) -> list[str]:
    if rule.kind == "anchored" and not any(mixture.excess.values()):
        return ["every domain is at its reference: the mixture is the one it started with"]
    notes = []
    if mixture.updates % REMINDER == 0 and (never := [d for d in mixture.start if d not in mixture.reached]):
        notes.append(f"{', '.join(never)}: never at the reference in {mixture.updates} updates")
    for domain, weight in mixture.weights.items():
        start = mixture.start[domain]
        if weight <= rule.floor * start * (1 + 1e-9):
            notes.append(f"{domain} is at its floor, {rule.floor:g} of the share it started with")
        if weight >= min(1.0, rule.cap * start) * (1 - 1e-9) and len(mixture.weights) > 1:
            notes.append(f"{domain} is at its cap, {rule.cap:g} times the share it started with")
        if weight > WARN_ABOVE and start <= WARN_ABOVE:
            notes.append(f"{domain} has {weight:.0%} of every batch: little else is trained on")
    return notes
