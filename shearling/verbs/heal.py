"""`heal`: continued pre-training of a model, from the loss that the cut left it with, in one phase or in several."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from shearling.data.store import Store
from shearling.loss.held_out import by_domain
from shearling.ranks.ranks import Ranks, joined
from shearling.recipe import Heal
from shearling.record import Record, versions
from shearling.stage import Stage
from shearling.train.loop import train
from shearling.train.optim import adamw
from shearling.train.step import State
from shearling.verbs.aim import aimed, given, source_losses, source_of
from shearling.verbs.balancing import balanced
from shearling.verbs.keeping import Held, Keeping, Kept, has_checkpoint, micro_batches, tidy
from shearling.verbs.memory import Trained
from shearling.verbs.reference import read_reference
from shearling.verbs.session import Session, Watch, check_contents, choose_device, unwatched, warn_of_end
from shearling.verbs.sinks import Sinks
from shearling.verbs.source import ORIGIN, Source, figures, write_origin
from shearling.verbs.teaching import Teaching, check_teacher
from shearling.verbs.together import entered, is_done

log = logging.getLogger(__name__)

TOKENS_PER_PARAMETER = 20  # about what a model of this size can use (Hoffmann et al. 2022, arXiv 2203.15556)
STEPS_BETWEEN_UPDATES = 400  # of the mixture, at most (Sheared-LLaMA)


@dataclass(frozen=True)
class Healed:
    """What healing came to: held-out losses in nats per token by domain, with the standard errors of the last ones.

    They are taken on the windows of the first phase.
    """

    out: Path
    parameters: int
    losses_before: Mapping[str, float]
    losses: Mapping[str, float]
    tokens: int
    flops: float
    standard_errors: Mapping[str, float | None] = field(default_factory=dict)
    done_before: bool = False


@dataclass(frozen=True)
class PhasePlan:
    """One phase: what was asked, the session made of it, and whether its mixture is the one of the whole section."""

    asked: Heal
    session: Session
    same_mixture: bool


def heal(model: str, *, data: str, out: str, asked: Heal, arch: str | None = None, watch: Watch = unwatched) -> Healed:
    """Trains `model` on `data` and leaves the result as a model folder at `out`; `arch` is its family's file."""
    with joined(choose_device(asked.device), replicate=asked.replicate, offload=asked.offload) as (ranks, device):
        return _heal(model, data, Path(out), asked, arch, watch, ranks, device)


def check_heal(asked: Heal, *, student: Source, data: str | None = None) -> None:
    """Raises UserError for what can be told of a healing before there is the model: `student` is what it will be like.

    Without `data` it is what can be told before there is a store.
    """
    with joined(choose_device(asked.device), replicate=asked.replicate, offload=asked.offload) as (ranks, device):
        check_teacher(asked.teacher, student=student, ranks=ranks)
        for phase, own, same in asked.each_phase():
            if phase.mixture.reference is not None:
                read_reference(phase.mixture.reference)
            if store := own or data:
                plan = _plan(phase, source=student, data=store, same_mixture=same, device=device, ranks=ranks)
                given(phase.mixture, plan.session)


def _heal(
    model: str, data: str, out: Path, asked: Heal, arch: str | None, watch: Watch, ranks: Ranks, device: str
) -> Healed:
    source = ranks.one_before_others(lambda: Source.open(model, dtype=asked.dtype, arch=arch))
    planned = partial(_plan, source=source, device=device, ranks=ranks)
    phases = [planned(phase, data=own or data, same_mixture=same) for phase, own, same in asked.each_phase()]
    references = [given(phase.asked.mixture, phase.session) for phase in phases]
    source.identify(ranks)
    own, why = source_of(source, ranks) if asked.teacher.wanted else (None, "")
    teaching = Teaching.wanted(asked.teacher, student=source, own=own, why=why, device=device, ranks=ranks)
    identity = {"verb": "heal", **source.identity(), "references": references, **asked.identity()}
    identity["data"] = [phase.session.feed.store.digest for phase in phases]
    identity |= teaching.identity() if teaching else {}
    stage = Stage(out, identity, resumable=has_checkpoint, tidy=tidy)
    if is_done(stage, ranks):
        healed = json.loads((stage.out / ORIGIN).read_text(encoding="utf-8"))["healed"]
        return Healed(out=stage.out, done_before=True, **healed)
    before = dict(enumerate(micro_batches(stage.partial)))
    phases = [replace(p, session=_fitting(p, phases, source, teaching, before.get(n))) for n, p in enumerate(phases)]
    check_contents(source, (phase.session.feed.store for phase in phases), ranks)
    if teaching:
        for phase in phases:
            teaching.check(phase.session)
    phases = [replace(p, session=_aimed(p, source)) for p in phases]
    for note in (note for phase in phases for note in phase.session.notes):
        log.info(note)
    with entered(stage, ranks) as folder, Sinks(asked.sinks if ranks.first else (), stage.out) as sinks:
        return Healing(source, phases, asked, teaching, folder, stage.out, sinks).run(watch)


def _plan(asked: Heal, *, source: Source, data: str, same_mixture: bool, device: str, ranks: Ranks) -> PhasePlan:
    budget = TOKENS_PER_PARAMETER * source.parameters
    store = Store.open(data)
    session = Session.plan(
        asked,
        source,
        store,
        default_tokens=budget,
        most_between_updates=STEPS_BETWEEN_UPDATES,
        device=device,
        ranks=ranks,
    )
    return PhasePlan(asked, session, same_mixture)


def _aimed(phase: PhasePlan, source: Source) -> Session:
    return aimed(phase.session, phase.asked.mixture, lambda: source_losses(source, phase.session))


def _fitting(
    phase: PhasePlan, phases: Sequence[PhasePlan], source: Source, teaching: Teaching | None, before: int | None
) -> Session:
    steps = sum(each.session.settings.steps for each in phases)
    return Trained(source, phase.session, phase.asked, steps, teaching, before=before).within_memory()


@dataclass(frozen=True)
class Healing:
    """One healing under way in the stage's `folder`, everything settled."""

    source: Source
    phases: Sequence[PhasePlan]
    asked: Heal
    teaching: Teaching | None
    folder: Path
    out: Path
    sinks: Sinks

    def run(self, watch: Watch) -> Healed:
        """The phases in order, and the losses before and after."""
        source, first = self.source, self.phases[0].session
        ranks, keeping = first.ranks, Keeping(self.folder, self.asked, sinks=self.sinks, ranks=first.ranks)
        record = keeping.record
        with keeping:
            model, before, states = self.heal(keeping, watch)
        layers = tuple(range(source.shape["num_hidden_layers"]))
        tensor = first.reader(source, model)
        source.save(
            self.folder,
            shape=source.shape,
            layers=layers,
            dtype=self.asked.dtype,
            tensor=tensor,
            writes=ranks.first,
        )
        del model, tensor
        ranks.meet()  # it is there
        # Of what was saved, which may have been rounded.
        after = by_domain(first.measure(first.load(source.at(self.folder), dtype=first.dtype)))
        record.write("held_out", step=states[-1].step, of="healed", **after)
        tokens = [0, *(state.tokens for state in states)]
        spent = [b - a for a, b in pairwise(tokens)]
        result = Healed(
            out=self.out,
            parameters=source.parameters,
            losses_before=before["losses"],
            losses=after["losses"],
            standard_errors=after["standard_errors"],
            tokens=tokens[-1],
            flops=sum(self.flops(p.session, n) for p, n in zip(self.phases, spent, strict=True)),
        )
        ranks.by_the_first(lambda: write_origin(self.folder, {**source.origin(), "healed": figures(result)}))
        return result

    def heal(self, keeping: Keeping, watch: Watch) -> tuple[Any, dict[str, Any], list[State]]:
        """The model after all phases, its losses before them, and the state that each phase ended in."""
        first, record, saved = self.phases[0].session, keeping.record, keeping.saved
        model = first.load(self.source, dtype=first.dtype, adapters=first.adapters)
        if saved is None:
            record.write("heal", versions=versions(), **first.describe())
            before = by_domain(first.measure(model))
            record.write("held_out", step=0, of="cut", **before)
        else:
            before = saved.plain["losses"]
        first.prepare(model, self.asked, self.source.blocks())
        held = Held(model, (adamw(model.parameters(), lr=first.lr, bits=self.asked.bits),), {})
        keeping.take_up(held, sum(phase.session.settings.steps for phase in self.phases))
        states = keeping.states(first.device)
        micro = [phase.session.settings.micro_sequences for phase in self.phases]
        for number in range(max(0, len(states) - 1), len(self.phases)):
            ended, at = states[:number], states[number] if number < len(states) else None
            kept = keeping.keep(held, ended, losses=before, micro_sequences=micro)
            states[number:] = [self.train(held, number, ended, at, kept, record, watch)]
        return model, before, states

    def train(
        self,
        held: Held,
        number: int,
        before: Sequence[State],
        at: State | None,
        kept: Kept,
        record: Record,
        watch: Watch,
    ) -> State:
        """One phase, from the state `at` or from where the last one left the tokens' count; the state it ends in."""
        phase, model = self.phases[number], held.model
        session, title = phase.session, "healing"
        state = at or session.state()
        if len(self.phases) > 1:
            title = f"healing, phase {number + 1}"
        if at is None:
            if len(self.phases) > 1:
                record.write("phase", number=number + 1, **session.describe())
            if before:
                last = self.phases[number - 1]
                same = phase.same_mixture and last.same_mixture
                state = session.state_after(before[-1], last.session, same_mixture=same)
            record.write("mixture", step=0, tokens=state.tokens, **session.describe_mixture(state))
        (optimizer,) = held.optimizers
        for group in optimizer.param_groups:
            group["peak_lr"] = session.lr
        distilled = self.teaching.objective(session) if self.teaching else None
        objective = distilled or session.objective()
        balance = balanced(objective, self.source)
        with session.feed.reading() as reading:
            state = train(
                model,
                settings=session.settings,
                state=state,
                draw=session.telling(reading.draw, state, record.write),
                objective=balance or objective,
                optimizers=[optimizer],
                terms=[part for part in (distilled, balance) if part],
                evaluate=session.evaluate(model),
                steering=session.steering,
                keep=kept,
                log=record.write,
                on_step=watch(title, session.settings.steps),
                ranks=session.ranks,
                flops_per_token=self.flops(session, 1),
            )
        warn_of_end(session, state)
        return state

    def flops(self, session: Session, tokens: int) -> float:
        """Of so many tokens of a session, the teacher's forward passes included."""
        own = session.flops(self.source, self.source.shape, tokens=tokens)
        if session.adapters:  # no gradients of weights; those of adapters are left out
            own *= 2 / 3
        return own + (self.teaching.flops(session, tokens) if self.teaching else 0.0)
