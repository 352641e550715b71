"""What a run reads next, as arithmetic on a small state: the same for any number of ranks, workers and resumes.

Counts: since the proportions last changed, domain j has had |c_j - w_j n| < 1 of n windows, at every n. Order: within
an epoch a domain's windows come by a keyed permutation that is computed, not stored.
"""

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from hashlib import shake_128

from shearling.errors import UserError, nearest, raise_all

# Four rounds make a strong permutation of wide halves (Luby and Rackoff 1988). Over halves of two bits six left some
# pairs of windows 20% too frequent, twelve none.
NARROW_BITS, NARROW_ROUNDS, WIDE_ROUNDS = 4, 12, 6

WORD = (1 << 64) - 1


@dataclass(frozen=True)
class Position:
    """The `drawn`-th window (from 0, over all epochs) that a run reads from a domain."""

    domain: str
    drawn: int


@dataclass(frozen=True)
class SamplerState:
    """How far a run has read: windows drawn of each domain, ever and since the proportions last changed.

    Plain values, in the order of `domains`; `weights` are the proportions as coprime integers, none before any draw.
    `owed` are the windows by which a domain fell short of its shares before that change (above, if negative).
    """

    domains: tuple[str, ...]
    drawn: tuple[int, ...]
    since: tuple[int, ...]
    weights: tuple[int, ...] = ()
    owed: tuple[float, ...] = ()

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
    from the last draw's start the count anew, with a window of the domain that is owed most: else one with less than a
    window between two changes would never have its turn. (It still has less than its share if they come that often.)

    `limits` are the windows that a domain may give in all. Once one has given them, its share goes to the others if
    they `redistribute`, which is a change of proportions; else, or when all have, there are fewer positions than
    `count`. Raises UserError for proportions that aren't positive and finite, or not one for each domain.
    """
    asked = _weights(state.domains, proportions)
    allowed = [(limits or {}).get(domain, math.inf) for domain in state.domains]
    drawn, since, last, owed = list(state.drawn), list(state.since), state.weights, state.owed
    positions: list[Position] = []
    turns = None
    while len(positions) < count:
        if turns is None:  # at the start, and whenever a domain has been used up
            is_open = [not redistribute or n < most for n, most in zip(drawn, allowed, strict=True)]
            weights = _coprime([w if opened else 0 for w, opened in zip(asked, is_open, strict=True)])
            if not any(weights):
                break
            if weights != last:
                owed = _owed(owed, since, last)
                last, since = weights, [0] * len(drawn)
            turns = _turns(since, weights, owed)
        pick = next(turns)
        if drawn[pick] >= allowed[pick]:
            break
        positions.append(Position(state.domains[pick], drawn[pick]))
        drawn[pick] += 1
        since[pick] += 1
        if redistribute and drawn[pick] >= allowed[pick]:
            turns = None
    return positions, replace(state, drawn=tuple(drawn), since=tuple(since), weights=last, owed=owed)


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


@lru_cache(maxsize=4096)
def key_of(seed: int, domain: str, epoch: int) -> tuple[int, ...]:
    """The keys of one epoch's order, one of 64 bits for each round of the permutation."""
    text = f"{seed}/{epoch}/{domain}".encode()
    return struct.unpack(f"<{NARROW_ROUNDS}Q", shake_128(text).digest(8 * NARROW_ROUNDS))


def permuted(index: int, count: int, key: Sequence[int]) -> int:
    """Where `index` goes in a keyed permutation of range(count), in constant memory, for counts to 2^64.

    A Feistel network over the next even power of two, walked until it lands inside (Black and Rogaway 2002). The rounds
    mix as splitmix64 does (Steele et al. 2014): an order need not be secret, and a cryptographic hash took most of the
    loader's time.
    """
    assert 0 <= index < count <= 1 << 64
    half_bits = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    rounds = key if half_bits <= NARROW_BITS else key[:WIDE_ROUNDS]
    while True:
        left, right = index >> half_bits, index & mask
        for round_key in rounds:
            mixed = (right ^ round_key) * 0xBF58476D1CE4E5B9 & WORD
            mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & WORD
            left, right = right, left ^ ((mixed ^ mixed >> 31) & mask)
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


def _owed(owed: Sequence[float], since: Sequence[int], weights: Sequence[int]) -> tuple[float, ...]:
    """What each domain is short of its shares, with the count `since` under `weights` that ends here."""
    if not weights:
        return (0.0,) * len(since)
    slots, total = sum(since), sum(weights)
    before = owed or (0.0,) * len(since)
    return tuple(b + float(Fraction(w * slots, total) - c) for b, w, c in zip(before, weights, since, strict=True))


def _turns(since: Sequence[int], weights: Sequence[int], owed: Sequence[float]) -> Iterator[int]:
    """Who is next, for ever, from where the counts `since` stand.

    The first of all is who is owed most, then the earliest deadline first among the eligible. One window out of turn
    can't make another late: the others' shares of t slots come to less than t, so whole windows to t - 1 at most.
    """
    slot, total, counts = sum(since), sum(weights), list(since)
    running = [j for j, weight in enumerate(weights) if weight]
    deadlines = {j: -(-(counts[j] + 1) * total // weights[j]) for j in running}
    while True:
        slot += 1
        pick, earliest = -1, 0
        if slot == 1 and any(owed):
            pick = max(running, key=lambda j: (owed[j], -j))
        else:
            for j in running:
                if counts[j] * total < weights[j] * slot and (pick < 0 or deadlines[j] < earliest):
                    pick, earliest = j, deadlines[j]
        yield pick
        counts[pick] += 1
        deadlines[pick] = -(-(counts[pick] + 1) * total // weights[pick])
