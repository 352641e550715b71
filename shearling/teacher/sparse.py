"""A teacher's distribution in a few numbers a token: its k likeliest ids, or ids drawn from it.

n tokens, V vocabulary, k ids. Drawn ids give an unbiased gradient (Sparse Logit Sampling, arXiv 2503.16870), likeliest
ids one that is closer at each token and biased. Over 4,096 tokens draws came 1.3 to 10 times closer at equal bytes
(benchmarks/sparse_teacher.py): noise averages out, a bias doesn't.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from shearling.loss.distillation import Sparse
from shearling.loss.numbers import widest_float
from shearling.teacher.options import KindName


class Kind(Protocol):
    """A way to write distributions down."""

    def record(self, vocab_size: int) -> np.dtype:
        """One token's record on disk, little-endian."""
        ...

    def write(self, logits: Tensor, offsets: Tensor) -> np.ndarray:
        """The records [n] of logits [n, V]; `offsets` [n], uniform in [0, 1), is all the chance there is."""
        ...

    def read(self, records: np.ndarray) -> Sparse:
        """What the records [n] say."""
        ...


@dataclass(frozen=True)
class TopK:
    """The k likeliest ids, and the probability of all others together."""

    k: int

    def record(self, vocab_size: int) -> np.dtype:
        return np.dtype([("ids", _id_dtype(vocab_size), (self.k,)), ("p", "<f2", (self.k + 1,))])

    def write(self, logits: Tensor, offsets: Tensor) -> np.ndarray:
        p = logits.softmax(-1)
        top, ids = p.topk(self.k, -1)
        rest = p.scatter_(1, ids, 0.0).sum(-1, keepdim=True)
        records = np.empty(len(logits), self.record(logits.shape[-1]))
        records["ids"], records["p"] = ids.cpu().numpy(), torch.cat([top, rest], -1).cpu().numpy()
        return records

    def read(self, records: np.ndarray) -> Sparse:
        p = torch.from_numpy(records["p"].astype(np.float32))
        p = p / p.sum(-1, keepdim=True)  # rounded each to half precision, they miss 1 by some 1e-4
        negative_entropy = torch.special.xlogy(p, p).sum(-1)
        return Sparse(_ids(records), p[:, :-1], negative_entropy, rest=p[:, -1])


@dataclass(frozen=True)
class Sampled:
    """k ids drawn with replacement, each standing for 1/k of the probability, and the whole distribution's entropy.

    The draws of a token are at one random offset, 1/k apart, through its cumulated probabilities: each id comes
    k p times, rounded up or down at random, which is as unbiased as independent draws are and varies far less.
    """

    k: int

    def record(self, vocab_size: int) -> np.dtype:
        return np.dtype([("ids", _id_dtype(vocab_size), (self.k,)), ("negative_entropy", "<f4")])

    def write(self, logits: Tensor, offsets: Tensor) -> np.ndarray:
        log_p = logits.log_softmax(-1)
        p = log_p.exp()
        wide = widest_float(p.device)  # a long tail is lost in fp32's sums
        cumulated = p.to(wide).cumsum(-1)
        steps = torch.arange(self.k, device=p.device, dtype=wide)
        points = (steps + offsets.to(p.device, wide).unsqueeze(-1)) / self.k * cumulated[:, -1:]
        ids = torch.searchsorted(cumulated, points, right=True).clamp(max=p.shape[-1] - 1)
        records = np.empty(len(logits), self.record(logits.shape[-1]))
        records["ids"] = ids.cpu().numpy()
        records["negative_entropy"] = log_p.mul_(p).sum(-1).cpu().numpy()
        return records

    def read(self, records: np.ndarray) -> Sparse:
        ids = _ids(records)
        negative_entropy = torch.from_numpy(records["negative_entropy"].astype(np.float32))
        return Sparse(ids, torch.full(ids.shape, 1 / self.k), negative_entropy)


KINDS: Mapping[KindName, type[TopK] | type[Sampled]] = {"top_k": TopK, "sampled": Sampled}


def _id_dtype(vocab_size: int) -> str:
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


def _ids(records: np.ndarray) -> Tensor:
    return torch.from_numpy(records["ids"].astype(np.int64))
