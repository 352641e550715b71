"""A whole run: the stages in order. Each is a folder of its own, and one that is finished is passed over."""

import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from shearling.data.files import masked
from shearling.ranks.ranks import Ranks, joined
from shearling.recipe import Data, Recipe, check_out, write_recipe
from shearling.record import Record, Unwritten, versions
from shearling.report.run_page import write_run_page
from shearling.stage import Stage, locked
from shearling.verbs.data import make_store
from shearling.verbs.heal import check_heal, heal
from shearling.verbs.prune import open_target, prune
from shearling.verbs.session import Watch, choose_device, unwatched
from shearling.verbs.sinks import check_sinks
from shearling.verbs.source import Source
from shearling.weights.adapters import check_rank

STAGES = ("data", "prune", "heal")  # each a folder in the run's


@dataclass(frozen=True)
class Ran:
    """Where a run left its result, and held-out losses by stage and domain."""

    model: Path
    report: Path
    losses: Mapping[str, Mapping[str, float]]


def run(
    recipe: Recipe,
    *,
    watch: Watch = unwatched,
    documents: Callable[[str, int, int], None] | None = None,
) -> Ran:
    """data, prune, heal, model, report. Of several ranks the first does alone what isn't training."""
    out = Path(recipe.out).expanduser()
    lock = Path(f"{os.path.abspath(out)}.lock")
    with joined(choose_device(recipe.prune.device)) as (ranks, _), ExitStack() as held:
        student = _check(recipe, ranks)
        ranks.by_the_first(lambda: held.enter_context(locked(lock)))
        return _run(recipe, out, student, watch, documents, ranks)


def _check(recipe: Recipe, ranks: Ranks) -> Source:
    """What the cut will be like. A mistake in model, target or options shows here, before hours of data."""
    source, target, _ = ranks.one_before_others(lambda: open_target(recipe.model, recipe.prune, arch=recipe.arch))
    for stage, shape in ((recipe.prune, source.shape), (recipe.heal, target)):
        check_rank(stage.lora_rank if stage else None, source.family, source.config, shape.axes)
    check_sinks([sink for stage in (recipe.prune, recipe.heal) if stage for sink in stage.sinks])
    student = source.shaped(target)
    if recipe.heal is not None:
        check_heal(recipe.heal, student=student)
    return student


def _run(
    recipe: Recipe,
    out: Path,
    student: Source,
    watch: Watch,
    documents: Callable[[str, int, int], None] | None,
    ranks: Ranks,
) -> Ran:
    ranks.by_the_first(lambda: check_out(recipe, out))
    said, begun = masked(recipe.model_dump(mode="json")), ranks.told(lambda: _begun(out))  # URLs may hold passwords

    def passed(stage: str) -> None:
        # A stage that was begun may be of another recipe, and refuse: until then the folder keeps the one that it has.
        if stage == begun:
            ranks.by_the_first(lambda: write_recipe(said, out))

    passed("")
    record = Record(out / "record.jsonl") if ranks.first else Unwritten()
    record.write("run", recipe=said, versions=versions())

    store = str(out / "data") if isinstance(recipe.data, Data) else recipe.data
    if isinstance(recipe.data, Data):
        making = partial(make_store, recipe.data, tokenizer=recipe.model, out=store, progress=documents)
        ranks.by_the_first(making)
        record.write("stage", name="data", folder=store)
    passed("data")

    if recipe.heal is not None:  # again with the data: nor is a mistake to show after days of pruning
        check_heal(recipe.heal, student=student, data=store)
    pruned = prune(recipe.model, data=store, out=str(out / "prune"), asked=recipe.prune, arch=recipe.arch, watch=watch)
    record.write("stage", name="prune", folder=str(pruned.out), losses=pruned.losses)
    passed("prune")
    folders, losses = {"prune": pruned.out}, {"source": pruned.source_losses, "cut": pruned.losses}

    if recipe.heal is not None:
        healed = heal(str(pruned.out), data=store, out=str(out / "heal"), asked=recipe.heal, watch=watch)
        record.write("stage", name="heal", folder=str(healed.out), losses=healed.losses)
        folders["heal"], losses["healed"] = healed.out, healed.losses
    passed("heal")

    model, report = out / "model", out / "report.html"
    ranks.by_the_first(lambda: _publish(list(folders.values())[-1], model))
    ranks.by_the_first(lambda: write_run_page(report, title=f"Shearling: {recipe.model}", folders=folders))
    return Ran(model, report, losses)


def _begun(out: Path) -> str:
    """The last stage that was begun there before; empty where none was."""
    there = [stage for stage in STAGES if any(os.path.lexists(out / f"{stage}{end}") for end in ("", ".partial"))]
    return there[-1] if there else ""


def _publish(stage: Path, out: Path) -> None:
    """The last stage's model under the run's own name for it."""
    publishing = Stage(out, {"verb": "publish", "stage": stage.name, "record": (stage / "stage.json").read_text()})
    if not publishing.done:
        with publishing as folder:
            shutil.copytree(
                stage, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("stage.json", "checkpoints")
            )
