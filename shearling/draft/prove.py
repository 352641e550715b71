"""A proposal held against transformers' own model, small and random: what conformance asks of any family.

The small models have everything else as the user's config says it. Layers are cut at the model's own depth too, since a
rule that goes by a layer's number may show in deep models alone.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from shearling.arch import adopt
from shearling.axes.axis import MASKABLE
from shearling.axes.spec import Family
from shearling.axes.target import uncut
from shearling.conformance.exact import masked_is_cut
from shearling.conformance.finding import Finding
from shearling.conformance.model import random_model
from shearling.conformance.proof import CHECKS, Proof, prove
from shearling.conformance.targets import alone
from shearling.draft.build import quiet
from shearling.draft.keys import Keys

LAYERS = 4  # of the small models, at least
DEEPEST = 64  # layers of a model that is tried at its own depth


@dataclass(frozen=True)
class Proved:
    """The axes along which everything held, why the others are left whole, and what was wrong with all of it."""

    axes: tuple[str, ...]
    uncut: Mapping[str, str]
    wrong: str
    errors: Mapping[str, float]


def prove_draft(family: Family, keys: Keys, depth: int, checks: Collection[str] = CHECKS) -> Proved:
    """Tries a family on small models of the config that it was drafted from; `checks` are conformance's."""
    shallow = max(depth, LAYERS)
    configs = {"small": keys.small(layers=shallow), "other sizes": keys.small(layers=shallow, **_other(keys))}
    adopt(family)
    with quiet():
        proof = prove(family, configs=configs, checks=checks)
        deep = list(_deep(family, keys, shallow)) if proof.axes else []
    return _judged(family, proof, deep)


def _other(keys: Keys) -> dict[str, int]:
    """Sizes in other proportions: as many key/value heads as heads, a narrower block."""
    return {"kv_head": 3, "group": 1, "intermediate": 27, "hidden": 30}


def _deep(family: Family, keys: Keys, shallow: int) -> Iterator[Finding]:
    """Masked = cut along layers at the model's own depth."""
    if not shallow < keys.layers <= DEEPEST or "layer" in family.uncut:
        return
    try:
        made = random_model(family, keys.small(), name="own depth")
        yield from masked_is_cut(made, alone(made, axes=("layer",)))
    except Exception as error:  # whatever a model that a table describes wrongly may do
        yield Finding("own depth", "own depth", ("layer",), why=f"{type(error).__name__}: {error}")


def _judged(family: Family, proof: Proof, deep: list[Finding]) -> Proved:
    findings = [*proof.findings, *deep]
    broken = [finding for finding in findings if not finding.held]
    wrong = next((finding for finding in broken if not finding.of), None)
    if wrong is not None:
        return Proved((), {}, str(wrong), proof.errors)
    failed = {axis: str(finding) for finding in reversed(broken) for axis in finding.of}
    tried = {axis for finding in findings for axis in finding.of}
    axes = tuple(axis for axis in MASKABLE if axis in tried and axis not in failed)
    untried = {axis for axis in MASKABLE if axis in family.axes} - tried - uncut(family, {}).keys()
    whole = {**failed, **dict.fromkeys(untried, "no smaller size of it that the family allows was found")}
    return Proved(axes, {axis: f"not proved: {why}" for axis, why in whole.items()}, "", proof.errors)
