"""The loop: the same bits each time, the same mathematics however a batch is divided, schedules as drawn."""

from functools import partial

import pytest
import torch
from small_models import small, tokens

from shearling.data.loader import HeldOut
from shearling.loss.cross_entropy import head_loss, next_token_loss
from shearling.loss.held_out import held_out_losses
from shearling.train.loop import train
from shearling.train.optim import adamw, default_lr
from shearling.train.schedule import cosine, trapezoid
from shearling.train.step import Settings, State


def run(*, micro: int, steps: int = 4, stop: int | None = None, autocast: torch.dtype | None = None):
    made = small("llama", tied=True)
    events: list[tuple[str, dict]] = []
    settings = Settings(
        steps=steps,
        seq_len=16,
        batch_sequences=4,
        micro_sequences=micro,
        schedule=partial(trapezoid, warmup=0.25, decay=0.5),
        eval_every=2,
        autocast=autocast,
    )
    held = {"a": [HeldOut(tokens(40, seed=99))]}
    state = train(
        made.model,
        settings=settings,
        state=State(step=0, tokens=0, sampler=0),
        draw=lambda position: (tokens(40, sequences=4, seed=position), position + 1),
        optimizers=[adamw(made.model.parameters(), lr=1e-2)],
        evaluate=lambda: held_out_losses(made.model, held),
        log=lambda event, **fields: events.append((event, fields)),
    )
    return made.model, state, events


def test_same_seed_same_bits() -> None:
    (one, state, events), (two, _, again) = run(micro=2), run(micro=2)
    assert state == State(step=4, tokens=4 * 4 * 16, sampler=4)
    losses = [fields["loss"].hex() for event, fields in events if event == "step"]
    assert losses == [fields["loss"].hex() for event, fields in again if event == "step"]
    assert len(losses) == 4
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)


def test_accumulation_changes_nothing_but_rounding() -> None:
    (one, _, _), (two, _, _) = run(micro=4), run(micro=1)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert float(((a - b).norm() / a.norm()).detach()) < 1e-4


def test_events_come_in_order_and_training_learns() -> None:
    _, _, events = run(micro=4, steps=6)
    assert [event for event, _ in events] == ["step", "step", "held_out", "step", "step", "held_out", "step", "step"]
    assert events[2][1]["losses"].keys() == {"a"}
    assert events[0][1]["lr_share"] == pytest.approx(1 / 1.5)


def test_autocast_stays_finite_and_near() -> None:
    (plain, _, events), (half, _, half_events) = run(micro=4), run(micro=4, autocast=torch.bfloat16)
    assert all(torch.isfinite(p).all() for p in half.parameters())
    assert half_events[0][1]["loss"] == pytest.approx(events[0][1]["loss"], rel=0.02)
    assert not torch.equal(next(plain.parameters()), next(half.parameters()))


def test_the_loss_is_transformers_own() -> None:
    made = small("qwen2")
    ids = tokens(40)
    found = next_token_loss(made.model, ids)
    assert float(found.detach()) == pytest.approx(float(made.model(ids, labels=ids).loss.detach()), rel=1e-6)


def test_a_loss_mask_leaves_tokens_out() -> None:
    made = small("llama")
    ids = tokens(40)
    mask = torch.ones_like(ids)
    mask[:, 5:] = 0
    with torch.no_grad():
        assert float(next_token_loss(made.model, ids, loss_mask=mask)) == pytest.approx(
            float(next_token_loss(made.model, ids[:, :5])), rel=1e-6
        )


def test_chunks_give_the_plain_loss_and_gradients() -> None:
    """Enough tokens and vocabulary that the chunked path is taken; float64 is the judge."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(96, 16, generator=generator, requires_grad=True)
    weight = torch.randn(64, 16, generator=generator, requires_grad=True)
    targets = torch.randint(0, 64, (96,), generator=generator)
    targets[:7] = -100
    loss = head_loss(hidden, weight, targets)
    loss.backward()
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    expected = torch.nn.functional.cross_entropy(h @ w.T, targets)
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    for found, reference in ((hidden, h), (weight, w)):
        assert found.grad is not None
        assert reference.grad is not None
        assert float((found.grad - reference.grad).norm() / reference.grad.norm()) < 1e-5


def test_held_out_loss_is_the_same_at_any_batch_size() -> None:
    made = small("mistral")
    ids = tokens(40, sequences=6)
    together = held_out_losses(made.model, {"d": [HeldOut(ids)]})["d"]
    apart = held_out_losses(made.model, {"d": map(HeldOut, ids.split(1))})["d"]
    assert apart == pytest.approx(together, rel=1e-6)


def test_schedules() -> None:
    assert [trapezoid(s, 10, warmup=0.2, decay=0.5) for s in (0, 1, 4, 5, 9)] == pytest.approx([0.5, 1, 1, 1, 0.2])
    assert trapezoid(9, 10, warmup=0.0, decay=0.0) == 1.0
    assert cosine(0, 100, warmup=0.1) == pytest.approx(0.1)
    assert cosine(10, 100, warmup=0.1) == pytest.approx(1.0)
    assert cosine(55, 100, warmup=0.1) == pytest.approx(0.55)
    assert cosine(100, 100, warmup=0.1) == pytest.approx(0.1)


def test_default_rates_pass_through_what_was_measured() -> None:
    assert default_lr(260_000) == pytest.approx(4e-3)
    assert default_lr(1_345_423_360) == pytest.approx(1e-4, rel=0.05)
    assert default_lr(1_000) == 8e-3
