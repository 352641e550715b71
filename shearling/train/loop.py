"""The training loop: draw, begin, forward and backward, the terms' part, clip, step, end, log, evaluate, mix."""

from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch
from torch.optim import Optimizer

from shearling.data.batch import Batch
from shearling.train.objective import Losses, Objective
from shearling.train.step import Draw, Evaluate, Log, OnStep, Settings, State, Steering, Term


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
    log: Log = lambda event, **fields: None,
    on_step: OnStep = lambda step, loss, excess: None,
) -> State:
    """Trains `model` from `state.step` to `settings.steps`, or to the data's end, and returns the state it ends in.

    Each optimizer's groups hold their peak rate as `peak_lr`; the schedule multiplies all of them. Groups marked
    `clip=False` are left out of gradient clipping. Events logged: "step", "held_out", "mixture", "data_ended".
    """
    device = next(model.parameters()).device
    clipped = [p for opt in optimizers for g in opt.param_groups if g.get("clip", True) for p in g["params"]]
    started, seen, waited = perf_counter(), state.tokens, 0.0
    while state.step < settings.steps:
        step, before = state.step, perf_counter()
        batch, sampler = draw(state.sampler, state.mixture.weights)
        waited += perf_counter() - before
        if batch is None:
            log("data_ended", step=step, tokens=state.tokens)
            break
        for term in terms:
            term.begin(step)
        losses = _accumulate(model, batch, objective, settings, device)
        for term in terms:
            term.backward(step)
        norm = torch.nn.utils.clip_grad_norm_(clipped, settings.clip_norm)
        share = settings.schedule(step, settings.steps)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * share
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for term in terms:
            term.end(step)
        state = state.after(settings.batch_tokens, sampler, losses)
        if state.step % settings.log_every == 0 or state.step == settings.steps:
            seconds = perf_counter() - started
            fields = {**losses.means(), "gradient_norm": float(norm), "lr_share": share, "tokens": state.tokens}
            fields |= {"tokens_per_second": (state.tokens - seen) / seconds, "data_wait_share": waited / seconds}
            log("step", step=state.step, **fields, **{k: v for term in terms for k, v in term.metrics().items()})
            on_step(state.step, fields["loss"], state.mixture.excess)
        if state.step == settings.steps:
            break
        mixing = steering if steering and state.step % steering.every == 0 else None
        measured = {}
        if evaluate and (_is_due(state.step, settings.eval_every) or (mixing and mixing.wants_held_out)):
            measured["held_out"] = evaluate()
            log("held_out", step=state.step, tokens=state.tokens, losses=measured["held_out"])
        if mixing:
            assert state.tally is not None
            trained = state.tally.by_domain(settings.domains)
            mixture, said = mixing(state.mixture, {**trained, **measured})
            log("mixture", step=state.step, tokens=state.tokens, **said)
            state = replace(state, mixture=mixture, tally=None)
    return state


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _accumulate(model: Any, batch: Batch, objective: Objective, settings: Settings, device: torch.device) -> Losses:
    """Gradients of the mean loss over a batch's targets, so many windows at a time; gives what it came to."""
    targets, found = max(1, batch.num_targets()), None  # counted before the batch goes to a device that would wait
    for micro in batch.split(settings.micro_sequences):
        with torch.autocast(device.type, dtype=settings.autocast, enabled=settings.autocast is not None):
            losses = objective(model, micro.to(device))
        (losses.total / targets).backward()
        found = losses.detached() if found is None else found + losses.detached()
    assert found is not None
    return found
