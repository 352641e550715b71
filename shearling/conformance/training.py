"""Pruning and healing for a few steps, through the real loop; masked steps compiled and in bfloat16."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from shearling.axes.shape import Shape
from shearling.conformance.exact import cut_model
from shearling.conformance.finding import Finding
from shearling.conformance.model import Small, random_model, relative
from shearling.conformance.targets import random_cut
from shearling.cut.extract import Cut
from shearling.cut.importance import measure
from shearling.data.batch import Batch
from shearling.loss.cross_entropy import next_token_loss
from shearling.masks.attach import Attached
from shearling.masks.learned import LearnedMasks
from shearling.masks.options import Options
from shearling.masks.relaxations import make_gates
from shearling.train.loop import train
from shearling.train.objective import NextToken
from shearling.train.optim import adamw
from shearling.train.step import Settings, State, Term

RELAXATIONS = ("soft_topk", "hard_concrete")
STEPS, RATE, SEQ_LEN = 3, 1e-3, 16
# Gradients sum over tokens and rows in an order that compiling changes.
GRADIENT_TOLERANCE = 1e-4
ROUNDING = 1e-6  # of the largest gradient: what is below that in all entries says nothing


def prune_and_heal(made: Small, target: Shape, *, relaxation: str) -> Iterator[Finding]:
    """Masks and weights for three steps, the cut, three steps of healing."""
    student = random_model(made.family, made.config, name=made.name, seed=1)
    term = _learned(student, target, relaxation)
    losses = _train(student, student.model, [term])
    masks = {axis: mask.cpu() for axis, mask in term.settle().items()}
    ids = made.ids(seed=5)
    masked, kept = student.logits(ids), term.gates.kept()
    term.attached.remove()
    cut = cut_model(student, Cut(made.family, made.config, target, kept, masks))
    with torch.no_grad():
        error = relative(cut(ids, use_cache=False).logits, masked)
    yield Finding(f"pruned by {relaxation}", made.name, error=error)
    losses += _train(student, cut, [])
    sound = len(losses) == 2 * STEPS and all(torch.tensor(losses).isfinite())
    yield Finding("healed", made.name, why="" if sound else f"losses {losses}")


def loss_is_the_models(made: Small) -> Finding:
    """The loss that training takes, which never holds all logits, against that of the model's own logits."""
    ids = made.ids(seed=6)
    logits = made.logits(ids[:, :-1])
    expected = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    with torch.no_grad():
        return Finding("loss", made.name, error=relative(next_token_loss(made.model, ids), expected))


def compiled(made: Small, target: Shape, *, backend: str) -> Iterator[Finding]:
    """Loss and gradients of a masked step, compiled, against the same without."""
    plain, gradients = _masked_step(made, target)
    again, found = _masked_step(made, target, backend=backend)
    yield Finding(f"loss under {backend}", made.name, error=relative(again, plain))
    # A key's bias without rotation adds the same to all of a query's scores: its gradient is rounding, nothing else.
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    said = {name: gradient for name, gradient in gradients.items() if float(gradient.abs().max()) > ROUNDING * largest}
    worst = max(relative(found[name], gradient) for name, gradient in said.items())
    yield Finding(f"gradients under {backend}", made.name, error=worst, tolerance=GRADIENT_TOLERANCE)


def in_bfloat16(made: Small, target: Shape) -> Finding:
    """A masked step in bfloat16: loss and gradients stay finite."""
    loss, gradients = _masked_step(made, target, autocast=torch.bfloat16)
    broken = [name for name, gradient in {"loss": loss, **gradients}.items() if not gradient.isfinite().all()]
    return Finding("bfloat16", made.name, why=f"not finite: {', '.join(broken[:5])}" if broken else "")


@dataclass(frozen=True)
class _Constant:
    """The mixture of a run on one domain."""

    weights: Mapping[str, float] = field(default_factory=lambda: {"random": 1.0})
    excess: Mapping[str, float] = field(default_factory=dict)


def _learned(student: Small, target: Shape, relaxation: str) -> LearnedMasks:
    batches = [student.ids(seed=seed) for seed in range(2)]
    scores = measure(student.model, student.family, config=student.config, batches=batches).scores
    options = Options(relaxation=relaxation)  # type: ignore[arg-type]
    gates = make_gates(student.shape, target, scores=scores, options=options, steps=STEPS, seed=0)
    attached = Attached(student.model, student.family, config=student.config, axes=gates.axes)
    return LearnedMasks(attached, gates)


def _train(student: Small, model: Any, terms: Sequence[LearnedMasks]) -> list[float]:
    """Some steps of the loop on random tokens: the loss of each."""
    losses: list[float] = []

    def draw(sampler: int, weights: Mapping[str, float]) -> tuple[Batch, int]:
        return Batch(student.ids(sequences=4, length=SEQ_LEN + 1, seed=sampler), (0, 0, 0, 0)), sampler + 1

    settings = Settings(
        steps=STEPS,
        seq_len=SEQ_LEN,
        batch_sequences=4,
        micro_sequences=2,
        domains=("random",),
        schedule=lambda step, steps: 1.0,
    )
    gates = [optimizer for term in terms for optimizer in term.gates.optimizers()]
    joining: list[Term] = [*terms]
    train(
        model,
        settings=settings,
        state=State(step=0, tokens=0, sampler=100, mixture=_Constant()),
        draw=draw,
        objective=NextToken(1),
        optimizers=[adamw(model.parameters(), lr=RATE), *gates],
        terms=joining,
        on_step=lambda step, figures, excess: losses.append(figures["loss"]),
    )
    return losses


def _masked_step(
    made: Small, target: Shape, *, backend: str = "", autocast: torch.dtype | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """One loss and its gradients, of weights and of masks, under random masks."""
    copy = random_model(made.family, made.config, name=made.name)
    masks = {axis: mask.requires_grad_() for axis, mask in random_cut(made.shape, target)[1].items()}
    attached = Attached(copy.model, made.family, config=made.config, axes=tuple(masks))
    attached.set(masks)
    if backend:
        torch._dynamo.reset()
        copy.model.base_model.compile(backend=backend)
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        loss = next_token_loss(copy.model, made.ids(seed=7))
    loss.backward()
    attached.push()
    parameters = {**dict(copy.model.named_parameters()), **masks}
    return loss.detach(), {name: p.grad for name, p in parameters.items() if p.grad is not None}
