"""A store read under fixed proportions: what the training loop draws from, and what its held-out loss is taken on."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from shearling.data.loader import batch, check_windows, held_out
from shearling.data.sampler import SamplerState, draw
from shearling.data.store import Store


@dataclass(frozen=True)
class Feed:
    """Batches of `sequences` windows, [B, seq_len + 1], domains in `proportions`; all that changes is the state."""

    store: Store
    proportions: Mapping[str, float]
    seq_len: int
    sequences: int
    seed: int

    def __post_init__(self) -> None:
        check_windows(self.store, self.store.domains, seq_len=self.seq_len)
        draw(self.start(), self.proportions, 0)  # says at once what is wrong with the proportions

    def start(self) -> SamplerState:
        """The state before anything is read."""
        return SamplerState.start(self.store.domains)

    def draw(self, state: SamplerState) -> tuple[Tensor, SamplerState]:
        """The next batch and the state after it."""
        positions, after = draw(state, self.proportions, self.sequences)
        return batch(self.store, positions, seq_len=self.seq_len, seed=self.seed), after

    def held_out(self, *, limit: int | None, sequences: int) -> dict[str, Iterator[Tensor]]:
        """The same held-out windows each time, at most `limit` a domain, so many sequences at once."""
        return {
            domain: held_out(self.store, domain, seq_len=self.seq_len, limit=limit, sequences=sequences)
            for domain in self.store.domains
        }

    def calibration(self, windows: int) -> Iterator[Tensor]:
        """Ids [1, T] of the first windows of the train split that this seed gives."""
        positions, _ = draw(self.start(), self.proportions, windows)
        for position in positions:
            yield batch(self.store, [position], seq_len=self.seq_len, seed=self.seed)[:, :-1]


def by_size(store: Store) -> dict[str, float]:
    """Each domain's share of the train tokens."""
    tokens = {domain: store.num_tokens(domain, "train") for domain in store.domains}
    return {domain: count / sum(tokens.values()) for domain, count in tokens.items()}
