"""Held-out loss: the same windows each time, the same figure at any batch size and however the windows are shared out.

B sequences, T tokens, M documents of a split.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import exp, sqrt
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from shearling.errors import UserError
from shearling.loss.cross_entropy import token_losses
from shearling.ranks.sharded import device_of, inside

LARGEST_EXPONENT = 709.0  # of a float64


class Windows(Protocol):
    """Ids [B, T + 1], the documents they belong to, and 0 in `counted` where a token's loss doesn't count."""

    @property
    def ids(self) -> Tensor: ...
    @property
    def documents(self) -> Tensor | None: ...
    @property
    def counted(self) -> Tensor | None: ...


@dataclass(frozen=True)
class Sums:
    """One domain's sums by document, [M] on the CPU: `nats` in float64 and the number of `tokens` they are of.

    Sums add up to what all windows together would have given; documents that weren't seen may be left out at the end.
    """

    nats: Tensor
    tokens: Tensor
    windows: int

    @classmethod
    def none(cls) -> "Sums":
        """Of no windows."""
        return cls(torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.int64), 0)

    def over(self, documents: int) -> "Sums":
        """The same, for at least so many documents."""
        missing = max(0, documents - len(self.nats))
        return Sums(functional.pad(self.nats, (0, missing)), functional.pad(self.tokens, (0, missing)), self.windows)

    def __add__(self, other: "Sums") -> "Sums":
        mine, others = self.over(len(other.nats)), other.over(len(self.nats))
        return Sums(mine.nats + others.nats, mine.tokens + others.tokens, mine.windows + others.windows)


@dataclass(frozen=True)
class Measured:
    """Held-out figures of one domain.

    The standard error, in nats per token, is over documents: how far another draw of as many documents would move the
    mean. None for a single document. Nats per byte are None where nobody said how many bytes a token has.
    """

    nats_per_token: float
    standard_error: float | None
    nats_per_byte: float | None
    perplexity: float
    tokens: int
    documents: int
    windows: int


def held_out_losses(model: Any, batches: Mapping[str, Iterable[Windows]]) -> dict[str, float]:
    """Mean nats per counted token by domain. Raises UserError for a domain without any."""
    return {domain: figures.nats_per_token for domain, figures in measure(model, batches).items()}


def alone(sums: Sums) -> Sums:
    """What one process has measured is all there is."""
    return sums


def measure(
    model: Any,
    batches: Mapping[str, Iterable[Windows]],
    *,
    bytes_per_token: Mapping[str, float] | None = None,
    together: Callable[[Sums], Sums] = alone,
) -> dict[str, Measured]:
    """Held-out figures by domain. Raises UserError for a domain without a token that counts.

    Where `batches` are one rank's share, `together` gives the sum of all ranks' sums; each rank calls it once a domain,
    in the same order.
    """
    ratios = bytes_per_token or {}
    return {
        domain: measured(together(held_out_sums(model, windows)), domain=domain, bytes_per_token=ratios.get(domain))
        for domain, windows in batches.items()
    }


def by_domain(figures: Mapping[str, Measured]) -> dict[str, dict[str, Any]]:
    """Losses and standard errors in nats per token, each by domain, as records and results hold them."""
    return {
        "losses": {domain: found.nats_per_token for domain, found in figures.items()},
        "standard_errors": {domain: found.standard_error for domain, found in figures.items()},
    }


@torch.no_grad()
def held_out_sums(model: Any, batches: Iterable[Windows]) -> Sums:
    """One domain's sums over its windows, or over one rank's share of them."""
    device, total = device_of(model), Sums.none()
    for windows in batches:
        total += window_sums(inside(model, token_losses, windows.ids.to(device)).cpu(), windows)
    return total


def window_sums(losses: Tensor, windows: Windows) -> Sums:
    """Sums of the losses [B, T] of the windows' predicted tokens, each in the document that the token stands in."""
    documents = torch.zeros_like(windows.ids) if windows.documents is None else windows.documents
    counted = torch.ones_like(windows.ids) if windows.counted is None else windows.counted
    where, counts = documents[:, 1:].flatten(), (counted[:, 1:] != 0).flatten()
    # Left out rather than multiplied by 0, which would let the NaN of a token that doesn't count through.
    nats = losses.flatten()[counts].double()
    size = int(documents.max()) + 1
    return Sums(
        nats=torch.zeros(size, dtype=torch.float64).index_add_(0, where[counts], nats),
        tokens=torch.bincount(where[counts], minlength=size),
        windows=len(windows.ids),
    )


def measured(sums: Sums, *, domain: str, bytes_per_token: float | None = None) -> Measured:
    """The figures that a domain's sums come to: the mean m = sum s / sum n over documents d, its standard error

        sqrt(D / (D - 1) sum (s_d - m n_d)^2) / sum n

    where D documents have a token that counts (a ratio estimate with documents as the units: Cochran, Sampling
    Techniques, chapter 6). Raises UserError where none has.
    """
    tokens = int(sums.tokens.sum())
    if tokens == 0:
        raise UserError(
            f"held-out text of domain {domain!r}",
            found="no token whose loss counts",
            expected="at least one after the first",
            change="prepare the data with more held-out text",
        )
    mean = float(sums.nats.sum()) / tokens
    documents = int((sums.tokens > 0).sum())
    residuals = sums.nats - mean * sums.tokens
    error = None
    if documents > 1:
        error = sqrt(documents / (documents - 1) * float(residuals.square().sum())) / tokens
    return Measured(
        nats_per_token=mean,
        standard_error=error,
        nats_per_byte=mean / bytes_per_token if bytes_per_token else None,
        perplexity=float("inf") if mean > LARGEST_EXPONENT else exp(mean),
        tokens=tokens,
        documents=documents,
        windows=sums.windows,
    )
