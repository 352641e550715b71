"""A store as one training run reads it: batches by position, repeats and the data's end, held-out windows."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from shearling.data.batch import Batch
from shearling.data.loader import HeldOut, batch, check_windows, held_out
from shearling.data.prefetch import Prefetch
from shearling.data.sampler import Position, SamplerState, draw, slots_until_end
from shearling.data.store import Store

AtEnd = Literal["refuse", "stop", "redistribute", "repeat"]


@dataclass(frozen=True)
class Feed:
    """Batches of `sequences` windows, [B, seq_len + 1]; all that changes is the sampler's state.

    `repeats`: how often a domain may be read, for those where it is limited. `at_end` says what happens then: the run
    stops, the domain's share goes to the others, or it is read again all the same ("refuse" is for whoever starts a
    run). `rank` of `ranks` reads its share of each batch. `separate` keeps documents apart in attention and positions.
    """

    store: Store
    seq_len: int
    sequences: int
    seed: int
    repeats: Mapping[str, int] = field(default_factory=dict)
    at_end: AtEnd = "repeat"
    separate: bool = False
    workers: int = 1
    rank: int = 0
    ranks: int = 1
    pin: bool = False

    def __post_init__(self) -> None:
        check_windows(self.store, self.store.domains, seq_len=self.seq_len)
        assert self.sequences % self.ranks == 0

    def start(self) -> SamplerState:
        """The state before anything is read."""
        return SamplerState.start(self.store.domains)

    def reading(self) -> Prefetch:
        """Draws batches while those that follow are read; a context manager."""
        return Prefetch(self.following, self.read, workers=self.workers)

    def following(self, state: SamplerState, weights: Mapping[str, float]) -> tuple[list[Position], SamplerState]:
        """This rank's positions of the next batch, none at the data's end, and the state after it."""
        limits = {} if self.at_end == "repeat" else self.limits()
        found, after = draw(state, weights, self.sequences, limits=limits, redistribute=self.at_end == "redistribute")
        if len(found) < self.sequences:
            return [], state
        share = self.sequences // self.ranks
        return found[self.rank * share : (self.rank + 1) * share], after

    def read(self, positions: Sequence[Position]) -> Batch:
        """The windows at `positions`."""
        found = batch(self.store, positions, seq_len=self.seq_len, seed=self.seed, separate=self.separate)
        return found.pinned() if self.pin else found

    def limits(self) -> dict[str, int]:
        """Windows that each limited domain gives in all."""
        return {d: n * self.windows(d) for d, n in self.repeats.items()}

    def used_up(self, state: SamplerState, weights: Mapping[str, float]) -> list[str]:
        """The limited domains that have no window left for what the next batch asks."""
        _, after = draw(state, weights, self.sequences, limits=self.limits())
        drawn = dict(zip(after.domains, after.drawn, strict=True))
        return [domain for domain, most in self.limits().items() if drawn[domain] >= most]

    def used_up_between(self, before: SamplerState, after: SamplerState) -> list[str]:
        """The limited domains whose last window was drawn on the way from one state to the other."""
        limits, drawn = self.limits(), zip(before.domains, before.drawn, after.drawn, strict=True)
        return [domain for domain, old, new in drawn if old < limits.get(domain, 0) <= new]

    def shares_left(self, state: SamplerState, weights: Mapping[str, float]) -> dict[str, float]:
        """The shares at which windows are drawn from here: used-up domains have none if theirs go to the others."""
        limits = self.limits() if self.at_end == "redistribute" else {}
        drawn = dict(zip(state.domains, state.drawn, strict=True))
        left = {d: 0.0 if d in limits and drawn[d] >= limits[d] else weight for d, weight in weights.items()}
        total = sum(left.values())
        return {domain: weight / total if total else 0.0 for domain, weight in left.items()}

    def longest_share(self, domain: str, steps: int) -> float:
        """The share of the data up to which a limited domain lasts for so many steps."""
        return self.limits()[domain] / (steps * self.sequences)

    def windows(self, domain: str) -> int:
        """Windows in one reading of a domain."""
        return self.store.window_count(domain, "train", self.seq_len)

    def ends(self, weights: Mapping[str, float], state: SamplerState | None = None) -> dict[str, int]:
        """The step at which each limited domain will have run out, if the weights stay; right to within one step."""
        slots = slots_until_end(state or self.start(), weights, self.limits())
        return {domain: count // self.sequences + 1 for domain, count in slots.items()}

    def readings(self, weights: Mapping[str, float], steps: int) -> dict[str, float]:
        """How often so many steps read each domain, if the weights stay."""
        total = sum(weights.values())
        return {d: steps * self.sequences * w / total / self.windows(d) for d, w in weights.items()}

    def held_out(
        self, *, limit: int | None, sequences: int, rank: int = 0, ranks: int = 1
    ) -> dict[str, Iterator[HeldOut]]:
        """The same held-out windows each time, at most `limit` a domain, so many sequences at once.

        `rank` of `ranks` has its share of them, for a `measure` that adds the shares up.
        """
        shared = {"seq_len": self.seq_len, "limit": limit, "sequences": sequences, "rank": rank, "ranks": ranks}
        return {domain: held_out(self.store, domain, **shared) for domain in self.store.domains}

    def calibration(self, windows: int, weights: Mapping[str, float]) -> Iterator[Tensor]:
        """Ids [1, T] of the first windows of the train split that this seed gives."""
        positions, _ = draw(self.start(), weights, windows)
        for position in positions:
            yield batch(self.store, [position], seq_len=self.seq_len, seed=self.seed).ids[:, :-1]


def by_size(store: Store) -> dict[str, float]:
    """Each domain's share of the train tokens."""
    tokens = {domain: store.num_tokens(domain, "train") for domain in store.domains}
    return {domain: count / sum(tokens.values()) for domain, count in tokens.items()}
