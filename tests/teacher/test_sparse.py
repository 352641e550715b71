"""What a few numbers a token tell of a teacher: unbiased from draws, exact at the ids from the likeliest."""

import numpy as np
import pytest
import torch
from torch import Tensor

from shearling.loss.distillation import Sparse
from shearling.teacher.sparse import Kind, Sampled, TopK

V, DRAWS = 60, 4000


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def offsets(count: int, *, seed: int = 0) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LOGITS, STUDENT = 1.5 * randn(1, V, seed=1), randn(1, V, seed=2).log_softmax(-1)
P, Q = LOGITS.softmax(-1), STUDENT.exp()
KL = (P * (P.log() - STUDENT)).sum()


def gradients(said: Sparse) -> tuple[Tensor, Tensor]:
    """KL [n] and its gradient [n, V] with respect to the student's logits."""
    return said.against(slice(None), STUDENT.repeat(len(said.ids), 1), share=1.0)


def repeated(kind: Kind) -> tuple[Tensor, Tensor]:
    return gradients(kind.read(kind.write(LOGITS.repeat(DRAWS, 1), offsets(DRAWS))))


def excess(samples: Tensor, truth: Tensor) -> float:
    """Squared distance of the samples' mean from the truth, by what their own variance leads one to expect."""
    expected = samples.var(0).sum() / len(samples)
    return float((samples.mean(0) - truth).square().sum() / expected)


@pytest.mark.parametrize("k", [1, 5, 16])
def test_draws_are_unbiased(k: int) -> None:
    """The expectation of `excess` is 1 where there is no bias; what is biased grows with the number of draws."""
    kl, grad = repeated(Sampled(k))
    assert excess(grad, Q - P) < 3
    assert excess(kl.unsqueeze(-1), KL) < 10
    twice = P.square() / P.square().sum()
    assert excess(grad, Q - twice) > 30, "the bound would let a bias pass"


def test_spread_draws_vary_less_than_independent_ones() -> None:
    _, spread = repeated(Sampled(16))
    ids = torch.multinomial(P.expand(DRAWS, V), 16, replacement=True, generator=torch.Generator().manual_seed(0))
    _, independent = gradients(Sparse(ids, torch.full(ids.shape, 1 / 16), torch.zeros(DRAWS)))
    assert excess(independent, Q - P) < 3
    assert float(spread.var(0).sum()) < 0.6 * float(independent.var(0).sum())


def test_the_likeliest_are_exact_at_their_ids_and_biased_elsewhere() -> None:
    said = TopK(5).read(TopK(5).write(LOGITS, offsets(1)))
    kl, grad = gradients(said)
    off = (grad - (Q - P)).squeeze(0)
    at = said.ids[0]
    assert set(at.tolist()) == set(P[0].topk(5).indices.tolist())
    assert float(off[at].abs().max()) < 1e-3  # half precision
    assert float(off.norm()) > 0.05 * float((Q - P).norm())
    assert 0 < float(kl) <= float(KL) + 1e-3


def test_a_student_like_its_teacher_has_no_loss_by_the_likeliest() -> None:
    said = TopK(4).read(TopK(4).write(STUDENT, offsets(1)))
    kl, grad = gradients(said)
    assert float(kl) == pytest.approx(0, abs=1e-3)
    assert float(grad.abs().max()) < 1e-3


def test_a_sure_teacher_and_a_sure_student_stay_finite() -> None:
    sure = torch.zeros(1, V)
    sure[0, 3] = 200.0
    for kind in (TopK(4), Sampled(4)):
        kl, grad = kind.read(kind.write(sure.clone(), offsets(1))).against(slice(None), sure.log_softmax(-1), share=1.0)
        assert float(kl) == pytest.approx(0, abs=1e-4)
        assert float(grad.abs().max()) < 1e-4
    other = sure.roll(1, -1).log_softmax(-1)
    kl, grad = TopK(4).read(TopK(4).write(LOGITS.float(), offsets(1))).against(slice(None), other, share=1.0)
    assert torch.isfinite(kl).all()
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize(("vocab", "size"), [(1 << 16, 2), ((1 << 16) + 1, 4)])
def test_records_are_as_narrow_as_the_ids_allow(vocab: int, size: int) -> None:
    assert TopK(8).record(vocab).itemsize == 8 * size + 9 * 2
    assert Sampled(8).record(vocab).itemsize == 8 * size + 4
    logits = torch.zeros(1, vocab)
    logits[0, -1] = 100.0
    for kind in (TopK(2), Sampled(2)):
        records = kind.write(logits.clone(), offsets(1))
        assert records.dtype == kind.record(vocab)
        assert int(kind.read(records).ids[0, 0]) == vocab - 1
        assert isinstance(records, np.ndarray)
