"""Everything that a family's table claims, tried: what `inspect --draft` and benchmarks/conformance.py ask for."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import process_time
from typing import Any

from shearling.axes.axis import MASKABLE
from shearling.axes.shape import Shape
from shearling.axes.spec import Family
from shearling.conformance.dead import dead_units
from shearling.conformance.exact import identity, masked_is_cut
from shearling.conformance.finding import Finding
from shearling.conformance.model import Small, random_model
from shearling.conformance.reload import reloaded, save_cut
from shearling.conformance.sizes import costs, counts
from shearling.conformance.small import default, shortened, small, telling
from shearling.conformance.table import defaults, names_on_disk, table_is_model
from shearling.conformance.targets import Unit, alone, together
from shearling.conformance.training import RELAXATIONS, in_bfloat16, loss_is_the_models, prune_and_heal

Configs = Mapping[str, Mapping[str, Any]]  # raw ones, by name

# What can be asked for: the table alone, axes cut one by one, training, a fresh process that loads the cut.
CHECKS = ("table", "axes", "training", "reload")


@dataclass(frozen=True)
class Proof:
    """All findings on one model type of a family, and the CPU seconds that they took in this process."""

    family: Family
    model_type: str
    findings: tuple[Finding, ...]
    seconds: float

    @property
    def broken(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if not finding.held)

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes along which everything held, alone or coupled; none where something of the family's own didn't."""
        failed = {axis for finding in self.broken for axis in finding.of or MASKABLE}
        tried = {axis for finding in self.findings for axis in finding.of}
        return tuple(axis for axis in MASKABLE if axis in tried - failed)

    @property
    def errors(self) -> dict[str, float]:
        """By check, the largest error measured."""
        found: dict[str, float] = {}
        for finding in self.findings:
            if finding.error is not None:
                found[finding.check] = max(found.get(finding.check, 0.0), finding.error)
        return found


def prove(
    family: Family,
    *,
    model_type: str = "",
    configs: Configs | None = None,
    checks: Collection[str] = CHECKS,
) -> Proof:
    """Tries everything on small random models. `configs`, raw and by name, are tried instead of those derived.

    Each axis, or coupling, is tried alone first; only what held is then cut together, trained and loaded again. What a
    check raises is a claim that did not hold, not an error. A table that isn't the model's is tried no further.
    """
    model_type, started = model_type or family.model_types[0], process_time()
    chosen = telling(family, model_type) if configs is None else configs
    others = (
        {} if configs else {"defaults": shortened(family, default(family, model_type)), **small(family, model_type)}
    )
    findings = list(_table(family, model_type, chosen, others)) if "table" in checks else []
    if all(finding.held for finding in findings):
        findings += _models(family, chosen, checks)
    return Proof(family, model_type, tuple(findings), process_time() - started)


def _table(family: Family, model_type: str, chosen: Configs, others: Configs) -> Iterator[Finding]:
    yield from _tried(model_type, defaults, family, model_type)
    for name, config in {**others, **chosen}.items():
        yield from _tried(name, table_is_model, family, config, name)
    for name, config in chosen.items():
        with TemporaryDirectory() as folder:
            yield from _tried(name, names_on_disk, family, config, Path(folder), name)


def _models(family: Family, chosen: Configs, checks: Collection[str]) -> Iterator[Finding]:
    with TemporaryDirectory() as there:
        saved: dict[str, Path] = {}
        for number, (name, config) in enumerate(chosen.items()):
            folder = Path(there) / str(number)
            yield from _tried(name, _model, family, config, name, checks, folder)
            if folder.exists():
                saved[name] = folder
        if saved:
            yield from reloaded([*saved.values()], names=[*saved])


def _model(
    family: Family, config: Mapping[str, Any], name: str, checks: Collection[str], folder: Path
) -> Iterator[Finding]:
    """All that is tried on one model. The cut along all axes that held is left in `folder`, to be loaded again."""
    made = random_model(family, config, name=name)
    for check in (identity, loss_is_the_models, costs):
        yield from _tried(name, check, made)
    held: list[str] = []
    for unit, target in alone(made).items() if "axes" in checks else ():
        found = list(_tried(name, _unit, made, {unit: target}, of=unit))
        held += unit if all(finding.held for finding in found) else ()
        yield from found
    for unit, target in together(made, axes=dict.fromkeys(held)).items():
        yield from _tried(name, _unit, made, {unit: target}, of=unit)
        if "training" in checks:
            for relaxation in RELAXATIONS:
                yield from _tried(name, prune_and_heal, made, target, relaxation=relaxation)
            yield from _tried(name, in_bfloat16, made, target)
        if "reload" in checks:
            save_cut(made, target, folder)


def _unit(made: Small, target: Mapping[Unit, Shape]) -> Iterator[Finding]:
    yield from masked_is_cut(made, target)
    yield from counts(made, target)
    yield from dead_units(made, target)


def _tried(
    name: str, check: Callable[..., Finding | Iterable[Finding]], /, *args: Any, of: Unit = (), **options: Any
) -> Iterator[Finding]:
    """What a check finds on the config of this name; what it raises is one more finding, and ends it."""
    try:
        found = check(*args, **options)
        yield from [found] if isinstance(found, Finding) else found
    except Exception as error:  # whatever a model that a table describes wrongly may do
        yield Finding(check.__name__.strip("_"), name, of, why=f"{type(error).__name__}: {error}")
