"""The training loop. A step: draw, begin, forward and backward, the terms' part, clip, step, end, log, evaluate."""

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from shearling.loss.cross_entropy import next_token_loss
from shearling.train.step import Draw, Evaluate, Log, Settings, State, Term


def train(
    model: Any,
    *,
    settings: Settings,
    state: State,
    draw: Draw,
    optimizers: Sequence[Optimizer],
    terms: Sequence[Term] = (),
    evaluate: Evaluate | None = None,
    log: Log = lambda event, **fields: None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> State:
    """Trains `model` from `state.step` to `settings.steps` and returns the state it ends in.

    Each optimizer's groups hold their peak rate as `peak_lr`; the schedule multiplies all of them. Groups marked
    `clip=False` are left out of gradient clipping. Events logged: "step" and "held_out".
    """
    device = next(model.parameters()).device
    clipped = [p for opt in optimizers for g in opt.param_groups if g.get("clip", True) for p in g["params"]]
    started, seen = perf_counter(), state.tokens
    while state.step < settings.steps:
        step = state.step
        ids, sampler = draw(state.sampler)
        for term in terms:
            term.begin(step)
        loss = _accumulate(model, ids.to(device, non_blocking=True), settings)
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
        state = state.after(settings.batch_tokens, sampler)
        if state.step % settings.log_every == 0 or state.step == settings.steps:
            fields = {"loss": float(loss), "gradient_norm": float(norm), "lr_share": share, "tokens": state.tokens}
            fields["tokens_per_second"] = (state.tokens - seen) / (perf_counter() - started)
            log("step", step=state.step, **fields, **{k: v for term in terms for k, v in term.metrics().items()})
            on_step(state.step, fields["loss"])
        if evaluate and settings.eval_every and state.step % settings.eval_every == 0 and state.step < settings.steps:
            log("held_out", step=state.step, tokens=state.tokens, losses=evaluate())
    return state


def _accumulate(model: Any, ids: Tensor, settings: Settings) -> Tensor:
    """Gradients of the mean loss over a batch of ids [B, T + 1], so many sequences at a time; gives that mean."""
    total = torch.zeros((), device=ids.device)
    for micro in ids.split(settings.micro_sequences):
        with torch.autocast(ids.device.type, dtype=settings.autocast, enabled=settings.autocast is not None):
            loss = next_token_loss(model, micro) * (len(micro) / len(ids))
        loss.backward()
        total += loss.detach()
    return total
