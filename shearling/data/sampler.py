"""What a run reads next, as arithmetic on a small state: the same for any number of ranks, workers and resumes.

Counts: since the proportions last changed, domain j has had |c_j - w_j n| < 1 of n windows, at every n. Order: within
an epoch a domain's windows come by a keyed permutation that is computed, not stored.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from hashlib import blake2b

from shearling.errors import UserError, nearest, raise_all

FEISTEL_ROUNDS = 6  # four make a strong permutation of wide halves (Luby and Rackoff 1988); ours may be narrow


@dataclass(frozen=True)
class Position:
    """The `drawn`-th window (from 0, over all epochs) that a run reads from a domain."""

    domain: str
    drawn: int


@dataclass(frozen=True)
class SamplerState:
    """How far a run has read: windows drawn of each domain, ever and since the proportions last changed.

    Plain values, in the order of `domains`; `weights` are the proportions as coprime integers, none before any draw.
    """

    domains: tuple[str, ...]
    drawn: tuple[int, ...]
    since: tuple[int, ...]
    weights: tuple[int, ...] = ()

    @classmethod
    def start(cls, domains: Sequence[str]) -> "SamplerState":
        """The state before anything is read."""
        zeros = (0,) * len(domains)
        return cls(tuple(domains), zeros, zeros)


def draw(
    state: SamplerState,
    proportions: Mapping[str, float],
    count: int,
    *,
    limits: Mapping[str, int] | None = None,
    redistribute: bool = False,
) -> tuple[list[Position], SamplerState]:
    """The next `count` positions and the state after them; proportions need not sum to one.

    The earliest deadline first among the eligible: a domain with c picks is eligible for slot n (from 0) if
    c < w (n + 1), and its deadline is ceil((c + 1) / w); ties go to the first domain. This is Pfair scheduling of one
    processor (Baruah et al. 1996, Tijdeman's chairman assignment), in integers and so exact. Proportions that differ
    from the last draw's start the count anew.

    `limits` are the windows that a domain may give in all. Once one has given them, its share goes to the others if
    they `redistribute`, which is a change of proportions; else, or when all have, there are fewer positions than
    `count`. Raises UserError for proportions that aren't positive and finite, or not one for each domain.
    """
    asked = _weights(state.domains, proportions)
    drawn = list(state.drawn)
    allowed = [(limits or {}).get(domain, math.inf) for domain in state.domains]
    last, since = state.weights, list(state.since)
    positions: list[Position] = []
    while len(positions) < count:
        weights = asked
        if redistribute:
            weights = _coprime([w if drawn[j] < allowed[j] else 0 for j, w in enumerate(asked)])
        if not any(weights):
            break
        if weights != last:
            last, since = weights, [0] * len(drawn)
        pick = _earliest_deadline(since, weights)
        if drawn[pick] >= allowed[pick]:
            break
        positions.append(Position(state.domains[pick], drawn[pick]))
        drawn[pick] += 1
        since[pick] += 1
    return positions, replace(state, drawn=tuple(drawn), since=tuple(since), weights=last)


def slots_until_end(state: SamplerState, proportions: Mapping[str, float], limits: Mapping[str, int]) -> dict[str, int]:
    """After how many more windows, of all domains, each limited domain has given its last one at these proportions.

    Right to within one window of that domain: the count at n windows is within one of its share.
    """
    weights = _weights(state.domains, proportions)
    total = sum(weights)
    return {
        domain: max(0, limits[domain] - drawn) * total // weight
        for domain, drawn, weight in zip(state.domains, state.drawn, weights, strict=True)
        if domain in limits
    }


def place(position: Position, windows: int) -> tuple[int, int]:
    """The (epoch, cursor within the epoch) of a position in a domain of so many windows."""
    return divmod(position.drawn, windows)


def window_of(position: Position, windows: int, seed: int) -> int:
    """Which of a domain's `windows` windows a position reads; past the last, the next epoch in another order."""
    epoch, cursor = place(position, windows)
    return permuted(cursor, windows, key_of(seed, position.domain, epoch))


def key_of(seed: int, domain: str, epoch: int) -> bytes:
    """The key of one epoch's order, 32 bytes."""
    return blake2b(f"{seed}/{epoch}/{domain}".encode(), digest_size=32).digest()


def permuted(index: int, count: int, key: bytes) -> int:
    """Where `index` goes in a keyed permutation of range(count), in constant memory, for counts to 2^64.

    A Feistel network over the next even power of two, walked until it lands inside (Black and Rogaway 2002).
    """
    assert 0 <= index < count <= 1 << 64
    half_bits = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    while True:
        left, right = index >> half_bits, index & mask
        for number in range(FEISTEL_ROUNDS):
            message = bytes([number]) + right.to_bytes(8, "little")
            digest = blake2b(message, key=key, digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
        index = left << half_bits | right
        if index < count:
            return index


def _weights(domains: tuple[str, ...], proportions: Mapping[str, float]) -> tuple[int, ...]:
    """The proportions as coprime integers: every float is a fraction, and these are exactly in their ratio."""
    errors = []
    for name, value in proportions.items():
        if name not in domains:
            change = nearest(name, domains)
            errors.append(UserError("proportions", found=f"{name!r}", expected="a domain of the data", change=change))
        elif not (math.isfinite(value) and value > 0):
            what, change = f"proportion of {name!r}", "give a positive one, or leave the domain out of the data"
            errors.append(UserError(what, found=value, expected="a positive, finite number", change=change))
    if missing := [name for name in domains if name not in proportions]:
        found = f"none for {', '.join(map(repr, missing))}"
        errors.append(UserError("proportions", found=found, expected="one for each domain", change="add them"))
    raise_all(errors)
    fractions = [Fraction(proportions[name]) for name in domains]
    scale = math.lcm(*(fraction.denominator for fraction in fractions))
    return _coprime([int(fraction * scale) for fraction in fractions])


def _coprime(weights: Sequence[int]) -> tuple[int, ...]:
    divisor = math.gcd(*weights) or 1
    return tuple(weight // divisor for weight in weights)


def _earliest_deadline(since: Sequence[int], weights: Sequence[int]) -> int:
    slot, total = sum(since), sum(weights)
    eligible = (j for j, weight in enumerate(weights) if since[j] * total < weight * (slot + 1))
    return min(eligible, key=lambda j: (-(-(since[j] + 1) * total // weights[j]), j))
