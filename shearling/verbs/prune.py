"""`prune`: scores, perhaps learned masks, then the cut, and what it costs in held-out loss."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shearling.axes.count import parameters
from shearling.axes.index import Kept, select
from shearling.axes.shape import Shape
from shearling.axes.target import resolve_target
from shearling.cut.extract import Cut
from shearling.cut.importance import Importance, measure
from shearling.data.store import Store
from shearling.loss.held_out import by_domain
from shearling.masks.gates import cut_axes
from shearling.masks.learned import LearnedMasks
from shearling.masks.relaxations import make_gates
from shearling.ranks.ranks import Ranks, joined
from shearling.ranks.sharded import inside
from shearling.recipe import Prune
from shearling.record import versions
from shearling.stage import Stage
from shearling.train.loop import train
from shearling.train.optim import adamw
from shearling.verbs.aim import aimed, given
from shearling.verbs.balancing import balanced
from shearling.verbs.keeping import Held, Keeping, has_checkpoint, micro_batches, tidy
from shearling.verbs.memory import Trained
from shearling.verbs.session import Session, Watch, check_contents, choose_device, unwatched, warn_of_end
from shearling.verbs.sinks import Sinks
from shearling.verbs.source import ORIGIN, Source, figures, write_origin
from shearling.verbs.teaching import Teaching
from shearling.verbs.together import entered, is_done, load_under_masks
from shearling.weights.adapters import Read

log = logging.getLogger(__name__)

PAPER_TOKENS = 420_000_000  # Sheared-LLaMA: 3,200 steps of 32 x 4,096 tokens
TOKENS_PER_PARAMETER = 4
# At 15 to 60 steps the one-shot cut, healed for the same FLOPs, came out ahead in every comparison of benchmarks/; the
# paper's masks had 3,200.
MASKS_FROM_STEPS = 1000
STEPS_BETWEEN_UPDATES = 50  # of the mixture, at most (Sheared-LLaMA)


@dataclass(frozen=True)
class Pruned:
    """What a prune came to: held-out losses in nats per token, by domain, and the standard errors of the cut's."""

    out: Path
    source_parameters: int
    parameters: int
    source_losses: Mapping[str, float]
    losses: Mapping[str, float]
    flops: float = 0.0
    misses: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    standard_errors: Mapping[str, float | None] = field(default_factory=dict)
    done_before: bool = False


def prune(
    model: str, *, data: str, out: str, asked: Prune, arch: str | None = None, watch: Watch = unwatched
) -> Pruned:
    """Cuts `model` to exactly `asked.to` and leaves the result as a model folder at `out`.

    `arch` is the file of its family, where that has no table; the result's folder holds a copy.
    """
    with joined(choose_device(asked.device), replicate=asked.replicate, offload=asked.offload) as (ranks, device):
        return _prune(model, data, Path(out), asked, arch, watch, ranks, device)


def _prune(
    model: str, data: str, out: Path, asked: Prune, arch: str | None, watch: Watch, ranks: Ranks, device: str
) -> Pruned:
    source, target, notes = ranks.one_before_others(lambda: open_target(model, asked, arch=arch))
    store = Store.open(data)
    default_tokens = min(PAPER_TOKENS, TOKENS_PER_PARAMETER * source.parameters)
    session = Session.plan(
        asked,
        source,
        store,
        default_tokens=default_tokens,
        most_between_updates=STEPS_BETWEEN_UPDATES,
        device=device,
        ranks=ranks,
    )
    references = given(asked.mixture, session)
    if asked.method == "auto":
        asked, note = _choose(asked, session.settings.steps)
        notes = (*notes, note)
    source.identify(ranks)
    teaching = Teaching.wanted(asked.teacher, student=source, own=source, why="", device=device, ranks=ranks)
    identity = {"verb": "prune", **source.identity(), "data": store.digest, "references": references}
    identity |= {**asked.identity(), **(teaching.identity() if teaching else {})}
    stage = Stage(out, identity, resumable=has_checkpoint, tidy=tidy)
    if is_done(stage, ranks):
        return _read_back(stage.out)
    for note in (*notes, *session.notes):
        log.info(note)
    if asked.method == "masks" and target != source.shape:
        (before,) = micro_batches(stage.partial) or (None,)
        axes, steps = cut_axes(source.shape, target), session.settings.steps
        session = Trained(source, session, asked, steps, teaching, axes, before).within_memory()
    check_contents(source, [store], ranks)
    if teaching:
        teaching.check(session)
    with entered(stage, ranks) as folder, Sinks(asked.sinks if ranks.first else (), stage.out) as sinks:
        return Pruning(source, target, session, asked, teaching, notes, folder, stage.out, sinks).run(watch)


def open_target(model: str, asked: Prune, *, arch: str | None = None) -> tuple[Source, Shape, tuple[str, ...]]:
    """The source, the whole target and what was filled in; raises UserError for all that can be told without data."""
    source = Source.open(model, dtype=asked.dtype, arch=arch)
    dtype = source.dtype_name(asked.dtype)
    target, notes = resolve_target(source.family, source.shape, asked.to, source.config, dtype=dtype)
    return source, target, (*notes, *source.notes())


def _choose(asked: Prune, steps: int) -> tuple[Prune, str]:
    """Masks or one-shot scores, by the budget, and why."""
    if asked.frozen:
        return asked.model_copy(update={"method": "masks"}), "method masks: weights stay as they are"
    method, reason = ("masks", "at least") if steps >= MASKS_FROM_STEPS else ("activation", "fewer than")
    note = f"method {method}: the budget is {steps} steps, {reason} {MASKS_FROM_STEPS} (--method chooses otherwise)"
    note += "; nothing is trained, so rates, masks' options and a teacher aren't used" if method == "activation" else ""
    return asked.model_copy(update={"method": method}), note


@dataclass(frozen=True)
class Pruning:
    """One prune under way in the stage's `folder`, everything settled."""

    source: Source
    target: Shape
    session: Session
    asked: Prune
    teaching: Teaching | None
    notes: tuple[str, ...]
    folder: Path
    out: Path
    sinks: Sinks

    def run(self, watch: Watch) -> Pruned:
        """Scores, perhaps learned masks, the cut, and the losses before and after."""
        source, session, ranks = self.source, self.session, self.session.ranks
        keeping = Keeping(self.folder, self.asked, sinks=self.sinks, ranks=ranks)
        record, misses, flops, read = keeping.record, (), 0.0, source.reads(ranks)
        with keeping:
            before, importance = self.before(keeping)
            if self.learns:
                aim = aimed(session, self.asked.mixture, lambda: (before["losses"], "the source's own losses"))
                scores = keeping.tensors("scores") if importance is None else importance.scores
                cut, misses, tokens, read = replace(self, session=aim).learn(scores, before, keeping, watch)
                flops = self.flops(tokens)
            else:
                assert importance is not None
                cut = self.score(importance)
        record.write("cut", kept=cut.kept.to_json(), misses=list(misses))
        config = source.save(
            self.folder,
            shape=self.target,
            layers=cut.kept.layers,
            rotary=cut.kept.rotary,
            dtype=self.asked.dtype,
            tensor=lambda row, layer: cut.tensor(row, layer, read),
            writes=ranks.first,
        )
        read = source.read  # the model that was trained goes
        ranks.meet()  # it is there
        after = by_domain(session.measure(session.load(source.at(self.folder), dtype=session.dtype)))
        record.write("held_out", step=session.settings.steps, of="cut", **after)
        result = Pruned(
            out=self.out,
            source_parameters=source.parameters,
            parameters=parameters(source.family, config),
            source_losses=before["losses"],
            losses=after["losses"],
            standard_errors=after["standard_errors"],
            flops=flops,
            misses=misses,
            notes=self.notes,
        )
        ranks.by_the_first(lambda: write_origin(self.folder, self.origin(cut.kept, result)))
        return result

    def before(self, keeping: Keeping) -> tuple[dict[str, Any], Importance | None]:
        """The source's losses and, unless a checkpoint has what is needed of them, its scores."""
        if keeping.saved is not None:
            return keeping.saved.plain["losses"], None
        source, session, record = self.source, self.session, keeping.record
        chosen = {"target": dict(self.target), "method": self.asked.method, "notes": list(self.notes)}
        record.write("prune", **chosen, versions=versions(), **session.describe())
        model = session.load(source, dtype=session.dtype)
        losses = by_domain(session.measure(model))
        record.write("held_out", step=0, of="source", **losses)
        calibration = session.feed.calibration(self.asked.calibration_windows, session.mixture.weights)
        scored = partial(measure, family=source.family, config=source.config, batches=calibration)
        with torch.no_grad():
            return losses, inside(model, scored)

    def flops(self, tokens: int) -> float:
        """Of learning masks on so many tokens, the teacher's forward passes included."""
        own = self.session.flops(self.source, self.source.shape, tokens=tokens)
        return own + (self.teaching.flops(self.session, tokens) if self.teaching else 0.0)

    @property
    def learns(self) -> bool:
        """Whether masks are learned."""
        return self.asked.method == "masks" and self.target != self.source.shape

    def score(self, importance: Importance) -> Cut:
        """The cut that one-shot scores choose, its norms' energy made good."""
        scores = {axis: score.tolist() for axis, score in importance.scores.items()}
        kept = select(scores, source=self.source.shape, target=self.target)
        scales = importance.norm_scales(kept)
        return Cut(self.source.family, self.source.config, self.target, kept, norm_scales=scales)

    def learn(
        self, scores: Mapping[str, Tensor], before: dict[str, Any], keeping: Keeping, watch: Watch
    ) -> tuple[Cut, tuple[str, ...], int, Read]:
        """Trains masks, and weights or adapters on them unless masks alone learn: the cut, what missed its target, the
        tokens that it took, the weights to cut.

        `scores` and the losses `before` are the source's.
        """
        source, session, steps, record = self.source, self.session, self.session.settings.steps, keeping.record
        options, seed, ranks = self.asked.masks, self.asked.seed, session.ranks
        gates = make_gates(source.shape, self.target, scores=scores, options=options, steps=steps, seed=seed).to(
            session.device
        )
        attached = load_under_masks(
            source,
            gates.axes,
            device=session.device,
            ranks=ranks,
            dtype=session.dtype,
            compute=session.settings.autocast,
            adapters=session.adapters,
        )
        model: Any = attached.model
        if session.adapters is None:
            model.requires_grad_(not session.frozen)
        over_ranks = (lambda gradient: ranks.add_up(gradient) / ranks.count) if ranks.count > 1 else None
        term = LearnedMasks(attached, gates, over_ranks=over_ranks)
        distilled = self.teaching.objective(session, under=attached) if self.teaching else None
        objective = distilled or session.objective()
        balance = balanced(objective, source)
        session.prepare(model, self.asked, source.blocks())

        def held_out() -> dict[str, float]:
            term.settle()
            return session.losses(model)

        learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
        weights = [adamw(learned, lr=session.lr, bits=self.asked.bits)] if learned else []
        optimizers = (*weights, *gates.optimizers())
        starts = nn.ParameterDict({axis: nn.Parameter(score, requires_grad=False) for axis, score in scores.items()})
        held = Held(model, optimizers, {"gates": gates, "scores": starts})
        keeping.take_up(held, steps)
        (state,) = keeping.states(session.device) or (session.state(),)
        if keeping.saved is None:
            record.write("mixture", step=0, tokens=0, **session.describe_mixture(state))
        with session.feed.reading() as reading:
            state = train(
                model,
                settings=session.settings,
                state=state,
                draw=session.telling(reading.draw, state, record.write),
                objective=balance or objective,
                optimizers=optimizers,
                terms=[*([distilled] if distilled else []), *([balance] if balance else []), term],
                evaluate=held_out,
                steering=session.steering,
                keep=keeping.keep(held, losses=before, micro_sequences=[session.settings.micro_sequences]),
                log=record.write,
                on_step=watch("learning masks", steps),
                ranks=ranks,
                flops_per_token=self.flops(1),
            )
        warn_of_end(session, state)
        kept = gates.kept()
        misses = tuple(str(miss) for miss in gates.misses(kept))
        for miss in misses:
            log.warning("off target before the cut: %s", miss)
        masks = {axis: mask.cpu() for axis, mask in term.settle().items()}
        record.write("held_out", step=steps, of="masked", **by_domain(session.measure(model)))
        record.write("masks", **{axis: mask.tolist() for axis, mask in masks.items()})
        cut = Cut(source.family, source.config, self.target, kept, masks=masks)
        return cut, misses, state.tokens, session.reader(source, model)

    def origin(self, kept: Kept, result: Pruned) -> dict[str, Any]:
        """What shearling.json says of the result."""
        folder = Path(self.source.name).expanduser()
        name = str(folder.resolve()) if folder.exists() else self.source.name  # wherever it is asked for from
        source = {"name": name, "fingerprint": self.source.fingerprint, "shape": dict(self.source.shape)}
        return {
            "format": "shearling-model",
            "version": 1,
            "source": source,
            "shape": dict(self.target),
            "kept": kept.to_json(),
            "method": self.asked.method,
            "measured": self.session.measured_on(),
            "pruned": figures(result),
        }


def _read_back(out: Path) -> Pruned:
    pruned = json.loads((out / ORIGIN).read_text(encoding="utf-8"))["pruned"]
    misses, notes = tuple(pruned.pop("misses")), tuple(pruned.pop("notes"))
    return Pruned(out=out, done_before=True, misses=misses, notes=notes, **pruned)
