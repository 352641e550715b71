"""What a run reads, in which order: one answer for any number of ranks and workers, and after any stop."""

import hashlib
import itertools

import numpy as np
import pytest
import torch
from stores import write_store

from shearling.data.feed import Feed
from shearling.data.prefetch import Prefetch
from shearling.data.sampler import SamplerState
from shearling.data.store import Store

SEQ_LEN, SEQUENCES = 8, 8
EARLY, LATE = {"wiki": 0.5, "code": 0.3, "math": 0.2}, {"wiki": 0.1, "code": 0.2, "math": 0.7}
DOCUMENT = 13  # tokens in each, so that windows hold the ends of one or two


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    """wiki with 50 windows of 8, code with 20, math with 7, every id its place in the stream."""
    domains = {}
    for domain, windows in (("wiki", 50), ("code", 20), ("math", 7)):
        ids = np.arange(windows * SEQ_LEN + 1)
        documents = [ids[start : start + DOCUMENT] for start in range(0, len(ids), DOCUMENT)]
        domains[domain] = {"train": [documents[:2], documents[2:]], "eval": [documents]}
    folder = write_store(tmp_path_factory.mktemp("store"), domains, vocab_size=500)
    return Store.open(folder)


def weights_at(step: int) -> dict[str, float]:
    return EARLY if step < 7 else LATE


def digest(store: Store, *, ranks: int, workers: int, stops: tuple[int, ...], steps: int = 20) -> str:
    """The ordered hash of all that the ranks read, stopping and starting anew from a few numbers at each of `stops`."""
    feeds = [Feed(store, SEQ_LEN, SEQUENCES, seed=3, workers=workers, rank=r, ranks=ranks) for r in range(ranks)]
    states: list[SamplerState] = [feed.start() for feed in feeds]
    hashed = hashlib.sha256()
    for start, end in itertools.pairwise((0, *stops, steps)):
        readers = [feed.reading() for feed in feeds]
        for step in range(start, end):
            for rank, reader in enumerate(readers):
                found, states[rank] = reader.draw(states[rank], weights_at(step))
                assert found is not None
                hashed.update(found.ids.numpy().tobytes())
        for reader in readers:
            reader.__exit__(None, None, None)
    assert len(set(states)) == 1
    return hashed.hexdigest()


@pytest.mark.parametrize("workers", [0, 1, 2, 4])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_one_ordered_hash_for_ranks_workers_and_three_resumes(store, ranks, workers):
    plain = digest(store, ranks=1, workers=0, stops=())
    assert digest(store, ranks=ranks, workers=workers, stops=(3, 7, 12)) == plain
    assert digest(store, ranks=ranks, workers=workers, stops=(1, 6, 8)) == plain


def test_new_weights_take_effect_at_exactly_their_step(store):
    """Read ahead or not: seven steps at one share, the rest at the other, each within a window of it."""
    feed = Feed(store, SEQ_LEN, SEQUENCES, seed=3, workers=4)
    state, seen = feed.start(), []
    with feed.reading() as reader:
        for step in range(20):
            found, state = reader.draw(state, weights_at(step))
            assert found is not None
            seen += found.domains
    for part, weights in ((seen[: 7 * SEQUENCES], EARLY), (seen[7 * SEQUENCES :], LATE)):
        for number, domain in enumerate(store.domains):
            assert abs(part.count(number) - weights[domain] * len(part)) < 1


@pytest.mark.parametrize("workers", [0, 3])
def test_stop_ends_before_a_window_is_read_twice(store, workers):
    feed = Feed(store, SEQ_LEN, SEQUENCES, seed=0, repeats={"math": 1}, at_end="stop", workers=workers)
    state, step, starts = feed.start(), 0, []
    with feed.reading() as reader:
        while True:
            found, state = reader.draw(state, EARLY)
            if found is None:
                break
            starts += [int(row[0]) for row, domain in zip(found.ids, found.domains, strict=True) if domain == 2]
            step += 1
    assert len(starts) == len(set(starts)) <= 7
    assert abs(feed.ends(EARLY)["math"] - (step + 1)) <= 1


def test_redistribute_gives_a_used_up_domains_share_to_the_others(store):
    feed = Feed(store, SEQ_LEN, SEQUENCES, seed=0, repeats={"math": 2}, at_end="redistribute", workers=1)
    state, seen = feed.start(), []
    with feed.reading() as reader:
        for _ in range(40):
            found, state = reader.draw(state, EARLY)
            assert found is not None
            seen += found.domains
    last = len(seen) - seen[::-1].index(2)
    assert seen.count(2) == 14
    assert abs(seen[last:].count(0) - 5 / 8 * len(seen[last:])) < 1
    assert state.drawn == tuple(seen.count(number) for number in range(3))


def test_all_used_up_is_the_end(store):
    feed = Feed(store, SEQ_LEN, SEQUENCES, seed=0, repeats=dict.fromkeys(EARLY, 1), at_end="redistribute")
    state, steps = feed.start(), 0
    with feed.reading() as reader:
        while (drawn := reader.draw(state, EARLY))[0] is not None:
            state, steps = drawn[1], steps + 1
    assert steps == (50 + 20 + 7) // SEQUENCES


def test_repeats_are_counted_and_the_end_is_foretold(store):
    feed = Feed(store, SEQ_LEN, SEQUENCES, seed=0, repeats={"math": 3})
    assert feed.readings({"wiki": 0.5, "code": 0.25, "math": 0.25}, steps=100) == {
        "wiki": 8,
        "code": 10,
        "math": 200 / 7,
    }
    assert feed.ends(EARLY) == {"math": 3 * 7 * 5 // SEQUENCES + 1}


def test_documents_apart_say_where_each_starts(store):
    feed = Feed(store, SEQ_LEN, SEQUENCES, seed=0, separate=True)
    with feed.reading() as reader:
        found, _ = reader.draw(feed.start(), EARLY)
    assert found is not None
    assert found.starts is not None
    for ids, starts in zip(found.ids.tolist(), found.starts.tolist(), strict=True):
        first = ids[0]
        assert starts == [max(0, place // DOCUMENT * DOCUMENT - first) for place in ids]
    begins = found.ids[:, 1:] % DOCUMENT == 0
    assert torch.equal(found.targets == -100, begins)
    assert found.num_targets() == int((~begins).sum())
    assert found.position_ids is not None
    assert found.position_ids[0].tolist() == [
        min(place - found.ids[0, 0].item(), place % DOCUMENT) for place in found.ids[0, :-1].tolist()
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_readers_fault_reaches_the_one_who_draws(store, workers):
    feed = Feed(store, SEQ_LEN, SEQUENCES, seed=0)

    def gone(positions):
        raise OSError("the store is gone")

    with Prefetch(feed.following, gone, workers=workers) as reader, pytest.raises(OSError, match="the store is gone"):
        reader.draw(feed.start(), EARLY)
