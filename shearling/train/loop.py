"""The training loop: draw, begin, forward and backward, the terms' part, clip, step, end, log, evaluate, mix."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch.optim import Optimizer

from shearling.data.batch import Batch
from shearling.errors import UserError
from shearling.ranks.ranks import ALONE, Ranks
from shearling.ranks.rows import gathered
from shearling.ranks.sharded import device_of, inside
from shearling.train.halving import with_room
from shearling.train.objective import Losses, Objective
from shearling.train.optim import not_finite, set_rates, step_unless
from shearling.train.pace import Pace
from shearling.train.step import Draw, Evaluate, Keep, Log, OnStep, Settings, State, Steering, Term
from shearling.weights.pretend import whole_windows


def train(
    model: Any,
    *,
    settings: Settings,
    state: State,
    draw: Draw,
    objective: Objective,
    optimizers: Sequence[Optimizer],
    terms: Sequence[Term] = (),
    evaluate: Evaluate | None = None,
    steering: Steering | None = None,
    keep: Keep | None = None,
    log: Log = lambda event, **fields: None,
    on_step: OnStep = lambda step, figures, excess: None,
    ranks: Ranks = ALONE,
    flops_per_token: float = 0.0,
) -> State:
    """Trains `model` from `state.step` to `settings.steps`, or to the data's end, and returns the state it ends in.

    Each optimizer's groups hold their peak rate as `peak_lr`; the schedule multiplies all of them. Groups marked
    `clip=False` are left out of gradient clipping. A step whose gradients aren't finite changes no weights. Raises
    UserError after so many of them in a row. Each of the `ranks` draws its share of a batch; what they find is summed
    up, so that all end in the same state. `flops_per_token` of training are for the record alone. Events
    logged: "step", "skipped", "held_out", "mixture", "data_ended", "micro_batch".
    """
    device = device_of(model)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    clipped = [p for group in groups if group.get("clip", True) for p in group["params"]]
    others = [p for group in groups if not group.get("clip", True) for p in group["params"]]
    pace = Pace(device, ranks=ranks.count, flops_per_token=flops_per_token, tokens=state.tokens)
    if state.micro_sequences not in (None, settings.micro_sequences):
        log("micro_batch", before=state.micro_sequences, micro_sequences=settings.micro_sequences)
    while state.step < settings.steps:
        step, before = state.step, perf_counter()
        batch, sampler = draw(state.sampler, state.mixture.weights)
        pace.waited(before)
        if batch is None:
            log("data_ended", step=step, tokens=state.tokens)
            break
        forth_and_back = partial(_begin, model, batch, objective, device=device, ranks=ranks, terms=terms, step=step)
        losses, settings = with_room(forth_and_back, settings, optimizers=optimizers, log=log)
        for term in terms:
            term.backward(step)
        norm = gathered(torch.nn.utils.clip_grad_norm_(clipped, settings.clip_norm)).to(device)  # 0 if there are none
        left_out = not_finite(others, norm)
        share = settings.schedule(step, settings.steps)
        set_rates(groups, share)
        step_unless(left_out, optimizers)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        for term in terms:
            term.end(step)
        state = state.after(settings, sampler, losses, left_out)
        measuring = evaluate is not None and _is_due(state.step, settings.eval_every)
        if _is_due(state.step, settings.log_every) or state.step == settings.steps or measuring:
            # The figures wait for the device, so what is measured after them is all the host's.
            fields = {**losses.means(), "gradient_norm": float(norm), "lr_share": share, "tokens": state.tokens}
            fields |= pace.figures(state.tokens)
            log("step", step=state.step, **fields, **{k: v for term in terms for k, v in term.metrics().items()})
            state = _tell_skipped(state, settings, log, keep)
            on_step(state.step, fields, state.mixture.excess)
        if state.step < settings.steps:
            before = perf_counter()
            state = _look_up(state, settings, evaluate, steering, log)
            pace.paused(before)
        if keep:
            keep(state)
    return state


def _look_up(state: State, settings: Settings, evaluate: Evaluate | None, steering: Steering | None, log: Log) -> State:
    """Held-out losses and the mixture, where they are due; the state with what the next step is to follow."""
    mixing = steering if steering and state.step % steering.every == 0 else None
    measured = {}
    if evaluate and (_is_due(state.step, settings.eval_every) or (mixing and mixing.wants_held_out)):
        measured["held_out"] = evaluate()
        log("held_out", step=state.step, tokens=state.tokens, losses=measured["held_out"])
    if mixing is None:
        return state
    assert state.tally is not None
    trained = state.tally.by_domain(settings.domains)
    mixture, said = mixing(state.mixture, {**trained, **measured})
    log("mixture", step=state.step, tokens=state.tokens, **said)
    return replace(state, mixture=mixture, tally=None)


def _tell_skipped(state: State, settings: Settings, log: Log, keep: Keep | None) -> State:
    """Says so if steps were left out that nobody was told of; the state in which that is done.

    Raises UserError if there were too many in a row.
    """
    assert state.skipped is not None
    in_a_row, in_all, most, last = state.skipped.counts.tolist()
    if not most:
        return state
    domains = [d for d, times in zip(settings.domains, state.skipped.domains.tolist(), strict=True) if times]
    log("skipped", step=last, in_a_row=in_a_row, in_all=in_all, domains=domains)
    if most >= settings.skip_at_most:
        of = f" (of the loss of {', '.join(domains)})" if domains else ""
        raise UserError(
            "training",
            found=f"gradients{of} that aren't finite, in {most} steps in a row up to step {last}",
            expected=f"fewer than {settings.skip_at_most}",
            change="look at the data, or begin anew with a lower --lr; the last good checkpoint: "
            + (keep.last if keep else "none"),
        )
    return replace(state, skipped=state.skipped.told())


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _begin(
    model: Any,
    batch: Batch,
    objective: Objective,
    settings: Settings,
    *,
    device: torch.device,
    ranks: Ranks,
    terms: Sequence[Term],
    step: int,
) -> Losses:
    """A step up to its gradients; again, if there was no memory for it."""
    for term in terms:
        term.begin(step)
    return _accumulate(model, batch, objective, settings, device, ranks)


def _accumulate(
    model: Any, batch: Batch, objective: Objective, settings: Settings, device: torch.device, ranks: Ranks
) -> Losses:
    """Gradients of the mean loss over all ranks' targets, so many windows at a time; gives what it came to."""
    targets = max(1, ranks.sum(batch.num_targets()))  # before the batch goes to a device that would wait
    found = None
    autocast = torch.autocast(device.type, dtype=settings.autocast, enabled=settings.autocast is not None)
    for micro in batch.split(settings.micro_sequences):
        with autocast, whole_windows() if batch.starts is None else nullcontext():
            losses = inside(model, objective, micro.to(device))
        # Sharded gradients are averages over ranks.
        (losses.total * (ranks.count / targets)).backward()
        found = losses.detached() if found is None else found + losses.detached()
    assert found is not None
    return found.over(ranks)
