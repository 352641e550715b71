"""Cross-entropy blended with KL(teacher || student), chunked over tokens: no model's logits ever exist at once.

N tokens, n of them in a chunk, D hidden (the teacher's is its own), V vocabulary, k ids kept of a teacher's
distribution. q is the student's distribution at a token, p the teacher's, both at temperature 1, losses in nats.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from shearling.loss.logits import logits_of

# At 128k ids three matrices of 512 MiB, in fp32, exist at once. Fewer tokens would spend a GPU's time on adding up the
# head's gradient, which is read and written once for each chunk.
CHUNK_TOKENS = 1024


class Taught(Protocol):
    """What a teacher says of N tokens, in whatever form."""

    def against(self, rows: slice, log_q: Tensor, *, share: float) -> tuple[Tensor, Tensor]:
        """KL(p || q) at some tokens [n], and q - share * p [n, V]; log_q [n, V] is used up."""
        ...


@dataclass(frozen=True)
class Dense:
    """The whole distribution: what the teacher's head reads, [N, D], its weight [V, D], and its logits' soft cap."""

    hidden: Tensor
    weight: Tensor
    cap: float | None = None

    def logits(self, rows: slice) -> Tensor:
        """[n, V], in at least fp32, where the teacher is."""
        return logits_of(self.hidden[rows], self.weight, self.cap)

    def against(self, rows: slice, log_q: Tensor, *, share: float) -> tuple[Tensor, Tensor]:
        log_p = self.logits(rows).to(device=log_q.device, dtype=log_q.dtype).log_softmax(-1)
        p = log_p.exp()
        kl = log_p.sub_(log_q).mul_(p).sum(-1)
        return kl, log_q.exp_().sub_(p, alpha=share)


@dataclass(frozen=True)
class Sparse:
    """A few entries of the distribution: probabilities [N, k] at ids int64 [N, k], and its sum of p log p, [N].

    With `rest` [N], what is left goes to all other ids together, as one; ids must differ then. KL is that of the
    coarser distributions, never more than the whole one. Its gradient at the ids is the whole one's; the others get
    the rest in the proportions that the student gives them. Without, ids may repeat, and KL is an estimate of the
    whole one, unbiased as its gradient is, where the probabilities are.
    """

    ids: Tensor
    probabilities: Tensor
    negative_entropy: Tensor
    rest: Tensor | None = None

    def against(self, rows: slice, log_q: Tensor, *, share: float) -> tuple[Tensor, Tensor]:
        ids = self.ids[rows]
        p = self.probabilities[rows].to(log_q.dtype)
        log_q_there = log_q.gather(1, ids)
        kl = self.negative_entropy[rows].to(log_q.dtype) - (p * log_q_there).sum(-1)
        grad = log_q.exp_()
        if self.rest is None:
            return kl, grad.scatter_add_(1, ids, p * -share)
        rest = self.rest[rows].to(grad.dtype)
        # The others' sum, not 1 less the ids': of a sure student that would be all rounding.
        others = grad.scatter_(1, ids, 0.0).sum(-1).clamp(min=torch.finfo(grad.dtype).tiny)
        grad.mul_((1 - share * rest / others).unsqueeze(-1)).scatter_(1, ids, log_q_there.exp() - share * p)
        return kl - rest * others.log(), grad


def blended_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    taught: Taught | None,
    *,
    share: float,
    dtype: torch.dtype | None = None,
    cap: float | None = None,
    compiled: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of a student's hidden [N, D] and head weight [V, D]: the sum of (1 - share) CE + share KL, and CE, KL [N].

    Targets int64 [N]; where one is negative there is neither. Without a teacher KL is 0, and the share has to be too.
    Only the sum takes gradients, which are made with it:
    what is kept for backward are those of `hidden` and `weight`. Products are taken in `dtype`, else in `hidden`'s.
    The student's logits x are cap tanh(x / cap) where there is a `cap`. `compiled`: what is done to them without a
    teacher is one kernel or two, where it would be a pass over them for each operation.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        found: Any = _Blended.apply(
            hidden, weight, targets, taught, share, dtype or hidden.dtype, cap, compiled, torch.is_grad_enabled()
        )
    return found


def chunks(tokens: int) -> Iterator[slice]:
    """CHUNK_TOKENS at a time."""
    return (slice(start, start + CHUNK_TOKENS) for start in range(0, tokens, CHUNK_TOKENS))


class _Blended(torch.autograd.Function):
    """`blended_loss`. The logits' gradient is q - share p - (1 - share) [id = target]; sums are taken in fp32."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        taught: Taught | None,
        share: float,
        dtype: torch.dtype,
        cap: float | None,
        compiled: bool,
        wanted: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(dtype, torch.float32)
        asked, plain = targets >= 0, weight.to(dtype)
        known = targets.clamp(min=0).unsqueeze(-1)
        ce, kl = (torch.zeros(len(hidden), dtype=wide, device=hidden.device) for _ in range(2))
        to_hidden, to_weight = (wanted and needed for needed in ctx.needs_input_grad[:2])
        dhidden = torch.empty_like(hidden) if to_hidden else None
        dweight: Tensor | None = None
        alone = torch.compile(_alone) if compiled else _alone
        for rows in chunks(len(hidden)):
            h, counts = hidden[rows].to(dtype), asked[rows].unsqueeze(-1).to(dtype)
            if taught is None:
                ce[rows], grad = alone(h, plain, known[rows], cap)
            else:
                logits = logits_of(h, plain, cap)
                slope = _slope(logits, cap)
                log_q = logits.log_softmax(-1)
                del logits
                ce[rows] = -log_q.gather(1, known[rows]).squeeze(-1)
                kl[rows], grad = taught.against(rows, log_q, share=share)
                grad = grad.scatter_add_(1, known[rows], grad.new_full((len(h), 1), share - 1))
                grad = (grad if slope is None else grad.mul_(slope)).to(dtype)
            if dhidden is not None:
                dhidden[rows] = ((grad @ plain) * counts).to(hidden.dtype)
            if to_weight:
                dweight = _with_product(dweight, grad.T, h * counts, wide)
        ce, kl = ce * asked, kl * asked
        ctx.mark_non_differentiable(ce, kl)
        ctx.save_for_backward(dhidden, None if dweight is None else dweight.to(weight.dtype))
        return ((1 - share) * ce + share * kl).sum(), ce, kl

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # In place: the weight's would be there twice, when memory is at its fullest. torch refuses a second pass.
        dhidden, dweight = (None if d is None else d.mul_(grads[0]) for d in ctx.saved_tensors)
        return dhidden, dweight, None, None, None, None, None, None, None


def _alone(hidden: Tensor, weight: Tensor, known: Tensor, cap: float | None) -> tuple[Tensor, Tensor]:
    """Of a chunk the cross-entropy [n] at ids [n, 1] and its gradient of the logits, [n, V] in the products' dtype."""
    logits = logits_of(hidden, weight, cap)
    slope = _slope(logits, cap)
    # Compiled, either is one kernel.
    by = _in_few_passes if logits.is_cuda and not torch.compiler.is_compiling() else _by_one_exponential
    loss, at, q = by(logits, known, hidden.dtype if slope is None else logits.dtype)
    del logits
    if slope is not None:
        q, at = q.mul_(slope), at * slope.gather(1, known)
    grad = q.to(hidden.dtype)
    grad[torch.arange(len(grad), device=grad.device), known.squeeze(-1)] = at.squeeze(-1).to(grad.dtype)
    return loss.squeeze(-1), grad


def _slope(logits: Tensor, cap: float | None) -> Tensor | None:
    """Of capped logits by those before."""
    return None if cap is None else 1 - (logits / cap).square_()


def _by_one_exponential(logits: Tensor, known: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy at ids [n, 1], q - 1 there, and q [n, V] in `dtype`. The logits are used up.

    For a CPU, which takes as long for an exponential as for a product.
    """
    logits -= logits.amax(-1, keepdim=True)
    there = logits.gather(1, known)
    q = logits.exp_()
    whole = q.sum(-1, keepdim=True)
    q /= whole
    return whole.log() - there, there.exp() / whole - 1, q.to(dtype)


def _in_few_passes(logits: Tensor, known: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The same for a GPU, whose time goes into reading and writing the logits."""
    log_q = logits.log_softmax(-1)
    there = log_q.gather(1, known)
    return -there, there.expm1(), torch.exp(log_q, out=torch.empty_like(log_q, dtype=dtype))


def _with_product(total: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """The total and a @ b, in its place, in `dtype`."""
    if total is None:
        return (a @ b).to(dtype)
    return total.addmm_(a, b) if a.dtype == dtype else total.add_(a @ b)
