"""Distillation in the loop: figures, gradients with masks on, the hidden-state term, its schedule."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from masked_reference import assert_close, copied, reference_logits, reference_streams
from small_models import DENSE, Small, small, tokens
from torch import Tensor
from torch.nn import functional

from shearling.axes.axis import mask_shape
from shearling.data.batch import Batch
from shearling.loss.streams import Alignment, Weights
from shearling.masks.attach import Attached
from shearling.teacher.live import LiveTeacher
from shearling.train.distilled import Distilled, Streams, linear
from shearling.train.objective import NextToken

VOCAB = 40


def batch(*, sequences: int = 4) -> Batch:
    ids = tokens(VOCAB, sequences=sequences)
    counted = torch.ones_like(ids, dtype=torch.bool)
    counted[1, 4:9] = False
    return Batch(ids, tuple(2 * (row % 2) for row in range(sequences)), counted)


def teacher() -> Small:
    """A wider, deeper model than the students'."""
    made = small("qwen3", hidden=32, layers=4, seed=9)
    made.model.requires_grad_(False)
    return made


def constant(share: float):
    return lambda step, steps: share


def distilled(made: Small, *, share: float, streams: Streams | None = None, **options) -> Distilled:
    return Distilled(LiveTeacher(made.model, **options), domains=3, share=constant(share), steps=10, streams=streams)


def kl_of(log_q: Tensor, made: Small, found: Batch) -> Tensor:
    """KL in float64, summed over the tokens asked for, from the teacher's whole logits."""
    p = made.model.double()(found.ids[:, :-1]).logits.softmax(-1)
    made.model.float()
    return (functional.kl_div(log_q, p, reduction="none").sum(-1) * (found.targets != -100)).sum()


def test_at_share_0_it_is_the_next_token() -> None:
    found, (one, two) = batch(), (small("llama", tied=True) for _ in range(2))
    plain, blend = NextToken(3)(one.model, found), distilled(teacher(), share=0.0)(two.model, found)
    plain.total.backward(), blend.total.backward()
    torch.testing.assert_close(blend.sums["loss"], plain.sums["loss"])
    assert torch.equal(blend.counts, plain.counts)
    assert blend.sums["kl"][1] == 0
    assert float(blend.sums["kl"][[0, 2]].min()) > 0
    for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_with_masks_on(tied: bool) -> None:
    """Weights and masks of a masked student, two micro-batches, against the formula in float64."""
    made, source, found = small("llama", tied=tied, biases=True), teacher(), batch()
    generator = torch.Generator().manual_seed(5)
    masks = {a: torch.rand(mask_shape(a, made.shape.axes), generator=generator) for a in DENSE}
    masks["hidden"][:6] = 0
    masks = {axis: mask.requires_grad_() for axis, mask in masks.items()}
    attached = Attached(made.model, made.family, config=made.config, axes=DENSE)
    attached.set(masks)
    objective = distilled(source, share=0.6)
    parts = [objective(made.model, micro) for micro in found.split(2)]
    for part in parts:
        part.total.backward()
    attached.push()

    w, z = copied(made.model.named_parameters()), copied(masks.items())
    logits = reference_logits(made, w, z, made.shape.axes["hidden"] - 6, found.ids[:, :-1])
    ce = functional.cross_entropy(logits.flatten(0, 1), found.targets.flatten(), reduction="sum")
    kl = kl_of(logits.log_softmax(-1), source, found)
    (0.4 * ce + 0.6 * kl).backward()
    together = parts[0] + parts[1]
    assert float(together.sums["loss"].sum()) == pytest.approx(float(ce.detach()), rel=1e-5)
    assert float(together.sums["kl"].sum()) == pytest.approx(float(kl.detach()), rel=1e-5)
    for name, parameter in made.model.named_parameters():
        assert_close(parameter.grad, w[name].grad, name)
    for axis, mask in masks.items():
        assert_close(mask.grad, z[axis].grad, axis)


def test_the_hidden_state_term_with_masks_on() -> None:
    """A masked model's streams against those of one without masks, weighed by the masks: gradients against float64."""
    made, source, found = small("llama", biases=True), small("llama", biases=True, seed=4), batch()
    source.model.requires_grad_(False)
    generator = torch.Generator().manual_seed(6)
    masks = {a: torch.rand(mask_shape(a, made.shape.axes), generator=generator) for a in DENSE}
    masks["hidden"][:6], masks["layer"][1] = 0, 0
    masks = {axis: mask.requires_grad_() for axis, mask in masks.items()}
    attached = Attached(made.model, made.family, config=made.config, axes=DENSE)
    attached.set(masks)
    whole = Alignment.whole(made.family, layers=3)
    streams = Streams(whole.student, 0.3, lambda: Weights.of_masks(attached.masks))
    objective = distilled(source, share=0.0, streams=streams, blocks=whole.source)
    losses = objective(made.model, found)
    losses.total.backward()
    attached.push()

    w, z = copied(made.model.named_parameters()), copied(masks.items())
    mine: list[Tensor] = []
    logits = reference_logits(made, w, z, made.shape.axes["hidden"] - 6, found.ids[:, :-1], streams=mine)
    with torch.no_grad():
        theirs = reference_streams(source, found.ids[:, :-1])
    channels, layers = z["hidden"].detach(), z["layer"].detach()
    ratios = [((m - t) ** 2 * channels).sum(-1) / (t**2 * channels).sum(-1) for m, t in zip(mine, theirs, strict=True)]
    apart = sum(share * ratio for share, ratio in zip(layers / layers.sum(), ratios, strict=True))
    hidden = (apart * (found.targets != -100)).sum()
    (functional.cross_entropy(logits.flatten(0, 1), found.targets.flatten(), reduction="sum") + 0.3 * hidden).backward()
    assert float(losses.sums["hidden"].sum()) == pytest.approx(float(hidden.detach()), rel=1e-5)
    for name, parameter in made.model.named_parameters():
        assert_close(parameter.grad, w[name].grad, name)
    for axis, mask in masks.items():
        assert_close(mask.grad, z[axis].grad, axis)


def test_autocast_stays_near() -> None:
    source, found = teacher(), batch()
    full = distilled(source, share=0.5)(small("llama").model, found)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = distilled(source, share=0.5)(small("llama").model, found)
    torch.testing.assert_close(half.sums["kl"], full.sums["kl"], rtol=0.05, atol=0.0)
    assert half.sums["kl"].dtype == torch.float32


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_hidden_state_term(checkpointing: bool) -> None:
    """A student of 2 layers and 10 channels against a teacher of 4 and 32, both written out from hidden states."""
    source, found = teacher(), batch()
    made = small("qwen3", hidden=10, layers=2)
    if checkpointing:
        made.model.train()
        made.model.activation_checkpointing_enable({"use_reentrant": False})
    channels = tuple(range(1, 31, 3))
    kept = {"hidden": [{"within": [], "kept": list(channels)}], "layer": [{"within": [], "kept": [1, 2]}]}
    alignment = Alignment.of(kept, made.family, layers=2)
    objective = distilled(
        source, share=0.5, streams=Streams(alignment.student, 0.3), blocks=alignment.source, channels=channels
    )
    losses = objective(made.model, found)
    losses.total.backward()
    grads = {name: p.grad for name, p in made.model.named_parameters()}

    reference = small("qwen3", hidden=10, layers=2, dtype=torch.float64).model
    inputs, asked = found.ids[:, :-1], found.targets != -100
    outs: list[Tensor] = []
    handles = [reference.model.layers[i].register_forward_hook(lambda m, a, out: outs.append(out)) for i in range(2)]
    logits = reference(inputs).logits
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        theirs = source.model.double()(inputs, output_hidden_states=True).hidden_states
    ratios = []
    for out, layer in zip(outs, (1, 2), strict=True):
        aim = theirs[layer + 1][..., list(channels)]
        ratios.append((out - aim).square().sum(-1) / aim.square().sum(-1))
    hidden = (torch.stack(ratios).mean(0) * asked).sum()
    ce = functional.cross_entropy(logits.flatten(0, 1), found.targets.flatten(), reduction="sum")
    (0.5 * ce + 0.5 * kl_of(logits.log_softmax(-1), source, found) + 0.3 * hidden).backward()
    assert float(losses.sums["hidden"].sum()) == pytest.approx(float(hidden.detach()), rel=1e-5)
    for name, parameter in reference.named_parameters():
        assert_close(grads[name], parameter.grad, name)


def test_the_student_comes_nearer() -> None:
    source, found, made = teacher(), batch(), small("llama")
    objective, optimizer = distilled(source, share=1.0), torch.optim.Adam(made.model.parameters(), lr=1e-2)
    apart = []
    for _ in range(20):
        losses = objective(made.model, found)
        apart.append(losses.detached().means()["kl"])
        (losses.total / found.num_targets()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert apart[-1] < 0.5 * apart[0]


def test_documents_kept_apart_are_so_for_the_teacher() -> None:
    """Where the second document starts changes what the teacher says of it, and the boundary isn't asked for."""
    source, plain = teacher(), batch()
    starts = torch.zeros_like(plain.ids)
    starts[:, 8:] = 8
    apart = replace(plain, starts=starts)
    made = small("llama")
    one, two = (distilled(source, share=1.0)(made.model, b) for b in (plain, apart))
    assert int(one.counts.sum()) == int(two.counts.sum()) + 3  # in row 1 that target was left out already
    assert not torch.allclose(one.sums["kl"], two.sums["kl"], rtol=1e-3)


def test_the_share_follows_its_schedule() -> None:
    schedule = partial(linear, start=0.9, end=0.5)
    objective = Distilled(LiveTeacher(teacher().model), domains=1, share=schedule, steps=5)
    shares = []
    for step in range(5):
        objective.begin(step)
        shares.append(objective.metrics()["kl_share"])
        objective.backward(step), objective.end(step)
    assert shares == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5])
    assert linear(0, 1, start=0.9, end=0.5) == 0.9
