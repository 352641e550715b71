"""The blend against the formula written out in float64, values and gradients; and what it keeps for backward."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from shearling.loss import distillation
from shearling.loss.distillation import Dense, Sparse, blended_loss

N, D, TEACHER_D, V = 37, 16, 24, 53


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def student(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    targets = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(3))
    targets[[0, 5, N - 1]] = -100
    hidden, weight = drawn(N, D, seed=1, dtype=dtype), drawn(V, D, seed=2, dtype=dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def dense(dtype: torch.dtype = torch.float32) -> Dense:
    return Dense(drawn(N, TEACHER_D, seed=4, dtype=dtype), drawn(V, TEACHER_D, seed=5, dtype=dtype) / 2)


def written_out(hidden: Tensor, weight: Tensor, targets: Tensor, p: Tensor, share: float) -> tuple[Tensor, ...]:
    """The total, CE and KL at each token, from whole matrices."""
    log_q = (hidden @ weight.T).log_softmax(-1)
    asked = targets != -100
    ce = functional.cross_entropy(log_q, targets, reduction="none", ignore_index=-100)
    kl = functional.kl_div(log_q, p, reduction="none").sum(-1) * asked
    return ((1 - share) * ce + share * kl).sum(), ce, kl


def assert_blend(taught, p: Tensor, share: float, *, tolerance: float, dtype: torch.dtype | None = None) -> None:
    hidden, weight, targets = student()
    total, ce, kl = blended_loss(hidden, weight, targets, taught, share=share, dtype=dtype)
    (3 * total).backward()
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    expected = written_out(h, w, targets, p, share)
    (3 * expected[0]).backward()
    for found, reference in zip((total, ce, kl, hidden.grad, weight.grad), (*expected, h.grad, w.grad), strict=True):
        assert found is not None
        assert reference is not None
        assert found.dtype == torch.float32
        error = float((found.double() - reference).detach().norm())
        assert error <= tolerance * max(1.0, float(reference.detach().norm()))


@pytest.mark.parametrize("tokens", [1, 7, 1024])  # chunks of one token, with an odd end, and all at once
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 1.0])
def test_values_and_gradients(share: float, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "CHUNK_TOKENS", tokens)
    teacher = dense()
    p = (teacher.hidden.double() @ teacher.weight.double().T).softmax(-1)
    assert_blend(teacher, p, share, tolerance=1e-6)


def test_bf16_products_stay_near() -> None:
    teacher = dense(torch.bfloat16)
    p = teacher.logits(slice(None)).double().softmax(-1)
    assert_blend(teacher, p, 0.5, tolerance=0.02, dtype=torch.bfloat16)


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_compiled_is_the_same(cap: float | None, dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(distillation, "CHUNK_TOKENS", 7)
    found = []
    for compiled in (False, True):
        hidden, weight, targets = student()
        total, ce, _ = blended_loss(hidden, weight, targets, None, share=0.0, dtype=dtype, cap=cap, compiled=compiled)
        total.backward()
        found.append((total, ce, hidden.grad, weight.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(
            one, other, rtol=1e-5 if dtype is None else 1e-2, atol=1e-5 if dtype is None else 1e-2
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpus_way_to_the_loss_comes_to_a_cpus(dtype: torch.dtype) -> None:
    logits, known = 20 * drawn(N, V, seed=7), torch.arange(N).unsqueeze(-1)
    logits[3, 4] = 1e4  # a sure student: the others' probabilities are 0
    ways = (distillation._by_one_exponential, distillation._in_few_passes)
    for one, other in zip(*(way(logits.clone(), known, dtype) for way in ways), strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=1e-5 if one.dtype == torch.float32 else 1e-2, atol=1e-6)


def test_float64_is_exact() -> None:
    hidden, weight, targets = student(torch.float64)
    teacher = dense(torch.float64)
    total, _, _ = blended_loss(hidden, weight, targets, teacher, share=0.7)
    total.backward()
    h, w = (x.detach().clone().requires_grad_() for x in (hidden, weight))
    p = (teacher.hidden @ teacher.weight.T).softmax(-1)
    expected, _, _ = written_out(h, w, targets, p, 0.7)
    expected.backward()
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(hidden.grad, h.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(weight.grad, w.grad, rtol=1e-10, atol=1e-12)


def test_a_teacher_that_agrees_is_no_loss() -> None:
    hidden, weight, targets = student()
    total, _, kl = blended_loss(hidden, weight, targets, Dense(hidden.detach(), weight.detach()), share=1.0)
    total.backward()
    assert hidden.grad is not None
    assert float(kl.abs().max()) < 1e-6
    assert float(hidden.grad.abs().max()) < 1e-6


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_sparse_with_a_rest_is_the_whole_with_the_students_tail(share: float) -> None:
    """Its gradient is that of the KL to p at the ids and q, scaled to the rest, elsewhere."""
    hidden, weight, targets = student(torch.float64)
    p = (2 * drawn(N, V, seed=6, dtype=torch.float64)).softmax(-1)
    top, ids = p.topk(5, -1)
    rest = 1 - top.sum(-1)
    sparse = Sparse(ids, top, (top * top.log()).sum(-1) + rest * rest.log(), rest)
    total, _, kl = blended_loss(hidden, weight, targets, sparse, share=share)
    total.backward()
    h, w = (x.detach().clone().requires_grad_() for x in (hidden, weight))
    q = (h @ w.T).softmax(-1)
    coarse = torch.cat([q.gather(1, ids), (1 - q.gather(1, ids).sum(-1, keepdim=True))], -1)
    aim = torch.cat([top, rest.unsqueeze(-1)], -1)
    expected_kl = (aim * (aim.log() - coarse.log())).sum(-1) * (targets != -100)
    expected = (1 - share) * functional.cross_entropy(h @ w.T, targets, reduction="sum") + share * expected_kl.sum()
    expected.backward()
    torch.testing.assert_close(kl, expected_kl.detach(), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(hidden.grad, h.grad, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(weight.grad, w.grad, rtol=1e-9, atol=1e-11)


def test_sparse_with_repeated_ids_is_the_whole_of_what_they_add_up_to() -> None:
    ids = torch.randint(0, V, (N, 8), generator=torch.Generator().manual_seed(8))
    p = torch.zeros(N, V, dtype=torch.float64).scatter_add_(1, ids, torch.full((N, 8), 1 / 8, dtype=torch.float64))
    negative_entropy = torch.special.xlogy(p, p).sum(-1).float()
    assert_blend(Sparse(ids, torch.full((N, 8), 1 / 8), negative_entropy), p, 0.5, tolerance=1e-6)


def test_no_logits_are_kept() -> None:
    hidden, weight, targets = student()
    kept: list[tuple[int, ...]] = []

    def see(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        blended_loss(hidden, weight, targets, dense(), share=0.5)
    assert sorted(kept) == sorted([(N, D), (V, D)])


def test_without_gradients_there_is_nothing_kept() -> None:
    hidden, weight, targets = student()
    with torch.no_grad():
        total, ce, kl = blended_loss(hidden, weight, targets, dense(), share=0.5)
    assert not total.requires_grad
    assert float(total) == pytest.approx(float(0.5 * (ce + kl).sum()))


def test_a_frozen_head_takes_no_gradient() -> None:
    hidden, weight, targets = student()
    total, _, _ = blended_loss(hidden, weight.detach(), targets, dense(), share=0.5)
    total.backward()
    assert hidden.grad is not None
    assert weight.grad is None
