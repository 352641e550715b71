"""`inspect --draft`: a family for a model type without a table, proved along the axes that it names, or refused."""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

from shearling.arch import families, towered
from shearling.arch.file import dump
from shearling.axes.spec import Family
from shearling.conformance.proof import CHECKS
from shearling.draft.layout import choose
from shearling.draft.probe import probe
from shearling.draft.propose import propose
from shearling.draft.prove import prove_draft
from shearling.draft.refused import Refused
from shearling.errors import UserError


@dataclass(frozen=True)
class Draft:
    """What came of one config. `axes` are those along which masked = cut held; without a family, why it is refused."""

    model_type: str
    family: Family | None = None
    axes: tuple[str, ...] = ()
    refused: str = ""
    errors: Mapping[str, float] = field(default_factory=dict)  # by check, the largest
    seconds: float = 0.0

    def text(self) -> str:
        """The file that holds the family."""
        assert self.family is not None
        head = f"# Drafted from transformers' own class and proved along: {', '.join(self.axes)}.\n"
        return (
            head + "# It holds for configs that say all of `requires`. See docs/add-a-family.md.\n" + dump(self.family)
        )

    def to_json(self) -> dict[str, Any]:
        uncut = dict(self.family.uncut) if self.family else {}
        return {**{k: v for k, v in asdict(self).items() if k != "family"}, "uncut": uncut}


def draft(config: Mapping[str, Any], *, checks: Collection[str] = CHECKS) -> Draft:
    """Proposes a table for a raw config and proves it. What can't be explained is refused, never guessed.

    `checks` are those of conformance/proof.py.
    """
    started, model_type = perf_counter(), str(config.get("model_type"))
    try:
        found = _draft(config, checks)
    except Refused as refused:
        found = Draft(model_type, refused=str(refused))
    return Draft(**{**found.__dict__, "seconds": round(perf_counter() - started, 1)})


def _draft(config: Mapping[str, Any], checks: Collection[str]) -> Draft:
    found = probe(config)
    proposal = propose(found)
    choice, unlike = choose(proposal)
    family = proposal.family(choice, unlike)
    proved = prove_draft(family, found.keys, found.depth, checks)
    if proved.wrong:
        raise Refused(f"the table that was proposed isn't the model: {proved.wrong}")
    if not proved.axes:
        reasons = "; ".join(f"{axis}: {why}" for axis, why in {**family.uncut, **proved.uncut}.items())
        raise Refused(f"it can be cut along no axis ({reasons})")
    family = proposal.family(choice, {**unlike, **proved.uncut})
    return Draft(family.model_types[0], family, proved.axes, errors=proved.errors)


def draft_model(model: str) -> Draft:
    """The same for a model folder, a config file or a Hub id. Raises UserError for a type that has a table already."""
    from shearling.weights.config import read_config
    from shearling.weights.folder import resolve

    path = Path(model).expanduser()
    config = read_config(path if path.exists() and path.suffix != ".gguf" else resolve(model))
    listed = {**{model_type: family for family in families() for model_type in family.model_types}, **towered()}
    family = listed.get(str(config.get("model_type")))
    if family is not None:
        change = "leave --draft out"
        raise UserError(
            "--draft", found=f"{config['model_type']}, which {family.name} is for", expected="a new type", change=change
        )
    return draft(config)
