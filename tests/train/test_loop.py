"""The loop: the same bits each time, the same mathematics however a batch is divided, schedules as drawn."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from small_models import small, tokens

from shearling.data.batch import Batch
from shearling.data.loader import HeldOut
from shearling.errors import UserError
from shearling.loss.cross_entropy import next_token_loss
from shearling.loss.distillation import blended_loss
from shearling.loss.held_out import held_out_losses
from shearling.mixture.weights import Mixture
from shearling.train.loop import train
from shearling.train.objective import Losses, NextToken
from shearling.train.optim import adamw, default_lr
from shearling.train.schedule import cosine, trapezoid
from shearling.train.step import Settings, State

MIXTURE = Mixture.starting({"a": 0.75, "b": 0.25})


class BrokenAt:
    """Next tokens, but the loss of some steps is NaN."""

    def __init__(self, *steps: int):
        self.steps, self.calls, self.plain = steps, 0, NextToken(2)

    def __call__(self, model, batch):
        self.calls += 1
        losses = self.plain(model, batch)
        if self.calls not in self.steps:
            return losses
        nan = torch.tensor([0.0, torch.nan])
        return Losses(losses.total * torch.nan, {"loss": losses.sums["loss"] + nan}, losses.counts)


class OutOfMemoryOnce:
    """Next tokens, but at more windows than so many there is no memory for the second half of a batch."""

    def __init__(self, most: int, error: RuntimeError | None = None):
        self.most, self.plain, self.seen = most, NextToken(2), []
        self.error = error or torch.OutOfMemoryError("injected")

    def __call__(self, model, batch):
        self.seen.append(len(batch))
        if len(batch) > self.most:
            (self.plain(model, batch).total * 7).backward()  # what the failed step leaves
            raise self.error
        return self.plain(model, batch)


def run(
    *,
    micro: int,
    steps: int = 4,
    autocast: torch.dtype | None = None,
    objective=None,
    skip_at_most: int = 10,
    halves: bool = False,
    log_every: int = 1,
    eval_every: int = 2,
):
    made = small("llama", tied=True)
    events: list[tuple[str, dict]] = []
    settings = Settings(
        steps=steps,
        seq_len=16,
        batch_sequences=4,
        micro_sequences=micro,
        domains=("a", "b"),
        schedule=partial(trapezoid, warmup=0.25, decay=0.5),
        eval_every=eval_every,
        autocast=autocast,
        skip_at_most=skip_at_most,
        halves=halves,
        log_every=log_every,
    )
    held = {"a": [HeldOut(tokens(40, seed=99))]}
    state = train(
        made.model,
        settings=settings,
        state=State(step=0, tokens=0, sampler=0, mixture=MIXTURE),
        draw=lambda at, weights: (Batch(tokens(40, sequences=4, seed=at), (0, 1, 0, 0)), at + 1),
        objective=objective or NextToken(2),
        optimizers=[adamw(made.model.parameters(), lr=1e-2)],
        evaluate=lambda: held_out_losses(made.model, held),
        log=lambda event, **fields: events.append((event, fields)),
    )
    return made.model, state, events


def test_same_seed_same_bits() -> None:
    (one, state, events), (two, _, again) = run(micro=2), run(micro=2)
    assert (state.step, state.tokens, state.sampler, state.mixture) == (4, 4 * 4 * 16, 4, MIXTURE)
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


def losses_of(model, batch: Batch) -> dict[str, float | None]:
    with torch.no_grad():
        return NextToken(2)(model, batch).by_domain(("a", "b"))["loss"]


def test_a_loss_mask_leaves_tokens_out() -> None:
    made = small("llama")
    ids = tokens(40, sequences=1)
    counted = torch.zeros_like(ids, dtype=torch.bool)
    counted[:, :5] = True
    found = losses_of(made.model, Batch(ids, (1,), counted))
    with torch.no_grad():
        assert found["b"] == pytest.approx(float(next_token_loss(made.model, ids[:, :5])), rel=1e-6)
    assert found["a"] is None


def test_losses_by_domain_are_those_of_each_alone() -> None:
    made = small("qwen2")
    ids = tokens(40, sequences=5)
    found = losses_of(made.model, Batch(ids, (1, 0, 1, 1, 0)))
    with torch.no_grad():
        assert found["a"] == pytest.approx(float(next_token_loss(made.model, ids[[1, 4]])), rel=1e-6)
        assert found["b"] == pytest.approx(float(next_token_loss(made.model, ids[[0, 2, 3]])), rel=1e-6)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen3"])
def test_documents_kept_apart_are_as_if_each_were_alone(model_type) -> None:
    """Three documents in one window: position ids and attention both as in windows of their own."""
    made = small(model_type)
    ids = tokens(40, sequences=1)
    starts = torch.tensor([[0] * 4 + [4] * 7 + [11] * 6])
    found = losses_of(made.model, Batch(ids, (0,), starts=starts))["a"]
    with torch.no_grad():
        alone = [float(next_token_loss(made.model, ids[:, a:b])) * (b - a - 1) for a, b in ((0, 4), (4, 11), (11, 17))]
        packed = float(next_token_loss(made.model, ids))
    assert found == pytest.approx(sum(alone) / (3 + 6 + 5), rel=1e-5)
    assert found != pytest.approx(packed, rel=1e-3)


def test_steering_is_asked_on_its_steps_and_takes_effect_at_the_next() -> None:
    """Losses since the last time come by domain; the last step is not followed by an update."""
    made, asked, drawn = small("llama"), [], []

    class Doubling:
        every, wants_held_out = 2, False

        def __call__(self, mixture, losses):
            asked.append(losses["loss"])
            weights = {"a": mixture.weights["a"] / 2, "b": 1 - mixture.weights["a"] / 2}
            return replace(mixture, weights=weights), {"notes": ["halved"]}

    def draw(at, weights):
        drawn.append(weights["a"])
        return Batch(tokens(40, sequences=4, seed=at), (0,) * 4), at + 1

    events = []
    train(
        made.model,
        settings=Settings(6, 16, 4, 4, ("a", "b"), partial(trapezoid, warmup=0.0, decay=0.0)),
        state=State(step=0, tokens=0, sampler=0, mixture=MIXTURE),
        draw=draw,
        objective=NextToken(2),
        optimizers=[adamw(made.model.parameters(), lr=0.0)],
        steering=Doubling(),
        log=lambda event, **fields: events.append((event, fields)),
    )
    assert drawn == [0.75, 0.75, 0.375, 0.375, 0.1875, 0.1875]
    steps = [fields["loss"] for event, fields in events if event == "step"]
    assert [losses["a"] for losses in asked] == pytest.approx([sum(steps[:2]) / 2, sum(steps[2:4]) / 2])
    assert [losses["b"] for losses in asked] == [None, None]
    assert [fields["step"] for event, fields in events if event == "mixture"] == [2, 4]


def test_the_datas_end_ends_the_run() -> None:
    made, events = small("llama"), []
    state = train(
        made.model,
        settings=Settings(6, 16, 4, 4, ("a", "b"), partial(trapezoid, warmup=0.0, decay=0.0)),
        state=State(step=0, tokens=0, sampler=0, mixture=MIXTURE),
        draw=lambda at, weights: (Batch(tokens(40, sequences=4), (0,) * 4) if at < 2 else None, at + 1),
        objective=NextToken(2),
        optimizers=[adamw(made.model.parameters(), lr=1e-3)],
        log=lambda event, **fields: events.append(event),
    )
    assert state.step == 2
    assert events == ["step", "step", "data_ended"]


def test_chunks_give_the_plain_loss_and_gradients() -> None:
    """Over more than one chunk; float64 is the judge."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2100, 16, generator=generator, requires_grad=True)
    weight = torch.randn(64, 16, generator=generator, requires_grad=True)
    targets = torch.randint(0, 64, (2100,), generator=generator)
    targets[:7] = -100
    loss, _, _ = blended_loss(hidden, weight, targets, None, share=0.0)
    loss.backward()
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    expected = torch.nn.functional.cross_entropy(h @ w.T, targets, reduction="sum")
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


def test_fault_21_a_step_without_finite_gradients_changes_nothing() -> None:
    """Counted, said with its domain, and the steps after it go on as if only their own data had been seen."""
    made = small("llama", tied=True)
    model, state, events = run(micro=4, steps=1, objective=BrokenAt(1))
    assert state.skipped is not None
    assert state.skipped.counts[:2].tolist() == [1, 1]
    for before, after in zip(made.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(before, after)
    assert [fields for event, fields in events if event == "skipped"] == [
        {"step": 1, "in_a_row": 1, "in_all": 1, "domains": ["b"]}
    ]

    model, state, events = run(micro=4, steps=6, objective=BrokenAt(2, 3, 5), skip_at_most=3)
    assert state.skipped is not None
    assert (state.step, state.skipped.counts[:2].tolist()) == (6, [0, 3])
    said = [(fields["step"], fields["in_a_row"], fields["in_all"]) for event, fields in events if event == "skipped"]
    assert said == [(2, 1, 1), (3, 2, 2), (5, 1, 3)]
    assert all(torch.isfinite(p).all() for p in model.parameters())

    # Told when a step is logged, of what came before.
    _, _, events = run(micro=4, steps=9, objective=BrokenAt(2, 3, 7), log_every=5, eval_every=0)
    assert [fields for event, fields in events if event == "skipped"] == [
        {"step": 3, "in_a_row": 0, "in_all": 2, "domains": ["b"]},
        {"step": 7, "in_a_row": 0, "in_all": 3, "domains": ["b"]},
    ]


def test_fault_22_so_many_of_them_in_a_row_end_the_run() -> None:
    told = r"of the loss of b\) that aren't finite, in 3 steps in a row up to step 4; .*the last good checkpoint: none"
    with pytest.raises(UserError, match=told):
        run(micro=4, steps=6, objective=BrokenAt(2, 3, 4), skip_at_most=3)
    with pytest.raises(UserError, match="in 3 steps in a row up to step 3"):  # and a good one before it is told
        run(micro=4, steps=6, objective=BrokenAt(1, 2, 3), skip_at_most=3, log_every=5, eval_every=0)


CPU_IS_FULL = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("injected"), RuntimeError(CPU_IS_FULL)])
def test_a_micro_batch_too_large_is_halved_and_nothing_else_changes(error) -> None:
    objective = OutOfMemoryOnce(1, error)
    halved, _, events = run(micro=4, objective=objective, halves=True)
    assert objective.seen == [4, 2, *[1] * 16]
    said = [fields for event, fields in events if event == "micro_batch"]
    assert said == [
        {"out_of_memory_at": 4, "micro_sequences": 2},
        {"out_of_memory_at": 2, "micro_sequences": 1},
    ]
    plain, _, _ = run(micro=1)
    for a, b in zip(halved.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("micro", "halves"), [(4, False), (1, True)])
def test_out_of_memory_where_nothing_can_be_halved(micro, halves) -> None:
    with pytest.raises(UserError, match=f"none left, with {micro} windows at a time"):
        run(micro=micro, objective=OutOfMemoryOnce(0), halves=halves)
