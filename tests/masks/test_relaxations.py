"""Gates: their values, their constraint, and what they come to at the end."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import DENSE, small

from shearling.axes.axis import mask_shape
from shearling.axes.index import places
from shearling.axes.target import resolve_target
from shearling.masks import hard_concrete
from shearling.masks.constraint import Slide, penalty
from shearling.masks.options import PAPER, Options
from shearling.masks.relaxations import HardConcreteGates, SoftTopKGates, make_gates
from shearling.masks.soft_topk import soft_topk, soft_topks

WANTED = {
    "hidden_size": 18,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 9,
}


def gates_of(options: Options, *, steps: int = 20, seed: int = 0):
    made = small("llama", kv_heads=3, group=2)
    target, _ = resolve_target(made.family, made.shape, WANTED)
    generator = torch.Generator().manual_seed(1)
    scores = {axis: torch.rand(mask_shape(axis, made.shape.axes), generator=generator) for axis in DENSE}
    return make_gates(made.shape, target, scores=scores, options=options, steps=steps, seed=seed)


def test_hard_concrete_by_hand() -> None:
    assert float(hard_concrete.keep_probability(torch.tensor(0.0))) == pytest.approx(1 / (1 + 11 ** (-2 / 3)))
    assert float(hard_concrete.soft_value(torch.tensor(2.0))) == pytest.approx(1 / (1 + math.exp(-2.4)))
    assert float(hard_concrete.soft_value(torch.tensor(-9.0))) == pytest.approx(0.01)
    assert float(hard_concrete.sample(torch.tensor(0.0), uniform=torch.tensor(0.5))) == pytest.approx(0.5)


@pytest.mark.parametrize("log_alpha", [-2.0, 0.0, 2.0])
def test_draws_are_open_as_often_as_their_probability_says(log_alpha: float) -> None:
    uniform = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    location = torch.full_like(uniform, log_alpha)
    share = float((hard_concrete.sample(location, uniform=uniform) > 0).double().mean())
    probability = float(hard_concrete.keep_probability(torch.tensor(log_alpha)))
    assert share == pytest.approx(probability, abs=5 * (probability * (1 - probability) / 200_000) ** 0.5)


def test_at_the_paper_s_start_nearly_all_draws_are_exactly_open() -> None:
    """Why a small budget wants another start: a gate whose draw is 1 learns nothing (4.7% of draws at log 100)."""
    uniform = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    draws = hard_concrete.sample(torch.full_like(uniform, math.log(100)), uniform=uniform)
    assert float((draws < 1).double().mean()) == pytest.approx(0.047, abs=0.002)


def test_penalty_by_hand() -> None:
    sparsity, linear, quadratic = torch.tensor([0.2, 0.5]), torch.tensor([1.0, -2.0]), torch.tensor([3.0, 4.0])
    found = penalty(sparsity, target=0.4, linear=linear, quadratic=quadratic)
    assert float(found) == pytest.approx(1.0 * -0.2 + 3.0 * 0.04 + -2.0 * 0.1 + 4.0 * 0.01)


def test_the_target_slides_and_then_rests() -> None:
    assert [Slide(4).progress(step) for step in (0, 1, 4, 9)] == [0.0, 0.25, 1.0, 1.0]
    assert Slide(0).progress(0) == 1.0


@given(
    st.lists(st.floats(-5, 5), min_size=2, max_size=12),
    st.floats(0.02, 0.98),
    st.floats(0.01, 2.0),
)
def test_soft_topk_sums_to_k_in_the_scores_order(scores: list[float], share: float, temperature: float) -> None:
    k = share * len(scores)
    z = soft_topk(torch.tensor(scores, dtype=torch.float64), k=k, temperature=temperature)
    assert float(z.sum()) == pytest.approx(k, abs=1e-6)
    order = sorted(range(len(scores)), key=scores.__getitem__)
    assert all(z[a] <= z[b] + 1e-12 for a, b in pairwise(order))


def test_soft_topk_of_several_is_each_ones_own() -> None:
    """Values as one by one, and gradients as finite differences have them."""
    generator = torch.Generator().manual_seed(0)
    shapes, ks = [(7,), (2, 3, 4), (2, 9)], [2.5, 1.0, 8.99]
    scores = [torch.rand(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    found = soft_topks(scores, ks=ks, temperature=0.1)
    for z, s, k in zip(found, scores, ks, strict=True):
        assert z.shape == s.shape
        torch.testing.assert_close(z, soft_topk(s, k=k, temperature=0.1))
    assert torch.autograd.gradcheck(lambda *s: soft_topks(s, ks=ks, temperature=0.1), scores)


@pytest.mark.parametrize("temperature", [0.03, 3e-4])
@pytest.mark.parametrize("k", [1399.0, 700.3, 0.7])
def test_soft_topk_in_single_precision(temperature: float, k: float) -> None:
    """Ranked scores at the first temperature and the last, some closed."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(1500, generator=generator)
    scores[:100] = -100
    z, exact = (soft_topk(s, k=k, temperature=temperature) for s in (scores, scores.double()))
    assert float(z.double().sum()) == pytest.approx(k, rel=1e-6)
    assert float((z.double() - exact).abs().max()) < 1e-4
    assert not z[:100].any()


@pytest.mark.parametrize("options", [Options(), Options(relaxation="hard_concrete"), PAPER, Options(start="open")])
def test_the_end_is_always_exactly_the_target(options: Options) -> None:
    gates = gates_of(options)
    with torch.no_grad():
        for location in gates.location.values():
            location.copy_(torch.randn_like(location))
    kept = gates.kept()
    assert {axis: kept.counts()[axis] for axis in gates.axes} == {axis: gates.target.axes[axis] for axis in gates.axes}
    for axis, mask in gates.masks(kept).items():
        assert mask.shape == mask_shape(axis, gates.source.axes)
        for place in places(axis, kept):
            chosen = set(kept.along(axis, place))
            values = mask[place].tolist()
            assert all((value >= 0.0099) == (i in chosen) for i, value in enumerate(values))
            assert all(value == 0 for i, value in enumerate(values) if i not in chosen)


def test_what_misses_its_target_is_named_by_axis_and_place() -> None:
    gates = gates_of(Options(relaxation="hard_concrete"))
    with torch.no_grad():
        for axis in gates.axes:  # exactly the target's number clearly open, the others clearly shut
            gates.location[axis].fill_(-4)
            gates.location[axis][..., : gates.target.axes[axis]] = 4
    assert gates.misses(gates.kept()) == []
    with torch.no_grad():
        gates.location["intermediate"][1, :3] = -4
        gates.location["hidden"][20] = 3.9
    found = {str(miss) for miss in gates.misses(gates.kept())}
    assert found == {"hidden: 19 open, 18 asked", "intermediate in [1]: 6 open, 9 asked"}


def test_noise_follows_from_seed_and_step_alone() -> None:
    options = Options(relaxation="hard_concrete", level=0.0, spread=1.0)
    first, again, other = gates_of(options, seed=1), gates_of(options, seed=1), gates_of(options, seed=2)
    again.draw(3)
    for axis, mask in first.draw(5).items():
        assert torch.equal(mask, again.draw(5)[axis])
    assert not torch.equal(first.draw(5)["hidden"], other.draw(5)["hidden"])
    assert not torch.equal(first.draw(5)["hidden"], first.draw(6)["hidden"])


def test_soft_topk_hardens_onto_the_target() -> None:
    gates = gates_of(Options(), steps=20)
    assert isinstance(gates, SoftTopKGates)
    sizes = [gates.size("hidden", step) for step in range(20)]
    assert sizes[0] > sizes[5] > sizes[-1] == gates.target.axes["hidden"]
    for axis, mask in gates.draw(19).items():
        # All but the entries at the very threshold are 0 or 1 by then.
        assert float(((mask > 0.01) & (mask < 0.99)).float().mean()) < 0.2, axis


def test_the_paper_s_gates() -> None:
    gates = gates_of(PAPER)
    assert isinstance(gates, HardConcreteGates)
    assert all(float((location.detach() - 5).abs().max()) < 0.1 for location in gates.location.values())
    gates.end(0)
    assert all(float(location.detach().max()) == pytest.approx(math.log(100)) for location in gates.location.values())
    moving, climbing = gates.optimizers()
    assert [g["peak_lr"] for o in (moving, climbing) for g in o.param_groups] == [1.0, 1.0]
    assert climbing.param_groups[0]["maximize"]


def test_the_lagrangian_settles_on_its_target_in_a_short_run() -> None:
    """Every open entry is worth something to the loss, and still the sizes come to the target instead of swinging."""
    steps = 100
    gates = gates_of(Options(relaxation="hard_concrete"), steps=steps)
    optimizers = gates.optimizers()
    for step in range(steps):
        worth = sum(mask.mean() for mask in gates.draw(step).values())
        penalty_now = gates.penalty(step)
        assert penalty_now is not None
        (penalty_now - worth).backward()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"]
            optimizer.step()
            optimizer.zero_grad()
        gates.end(step)
    for axis in gates.axes:
        expected = gates.expected(axis, steps - 1) / gates.source.axes[axis]
        wanted = gates.target.axes[axis] / gates.source.axes[axis]
        assert float((expected.detach() - wanted).abs().max()) < 0.05, axis
