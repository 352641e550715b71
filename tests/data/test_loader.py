import pytest
import torch
from stores import write_store

from shearling.data.loader import batch, check_windows, held_out
from shearling.data.sampler import Position, SamplerState, draw, window_of
from shearling.data.store import Store
from shearling.errors import UserError


@pytest.fixture
def store(tmp_path):
    """Domains of counted-up ids: `wiki` from 0 (101 train, 41 eval), `code` from 200 (31 train, 4 eval)."""
    lengths = {"wiki": (0, 101, 41), "code": (200, 31, 4)}
    domains = {
        domain: {"train": [[range(first, first + train)]], "eval": [[range(first, first + held)]]}
        for domain, (first, train, held) in lengths.items()
    }
    write_store(tmp_path, domains)
    return Store.open(tmp_path)


def test_a_batch_is_the_windows_of_its_positions(store):
    positions = [Position("wiki", 3), Position("code", 0), Position("wiki", 12)]
    made = batch(store, positions, seq_len=10, seed=5)
    found = made.ids
    assert (made.domains, made.counted, made.starts) == ((0, 1, 0), None, None)
    assert (found.dtype, found.shape) == (torch.int64, (3, 11))
    for row, position in zip(found.tolist(), positions, strict=True):
        count, first = (10, 0) if position.domain == "wiki" else (3, 200)
        start = first + 10 * window_of(position, count, 5)
        assert row == list(range(start, start + 11))


def test_an_epoch_predicts_every_token_once(store):
    positions, _ = draw(SamplerState.start(store.domains), {"wiki": 10, "code": 3}, 13)
    targets = batch(store, positions, seq_len=10, seed=0).ids[:, 1:].flatten()
    assert sorted(targets.tolist()) == [*range(1, 101), *range(201, 231)]


def test_no_window_is_too_little_data(store):
    with pytest.raises(UserError) as caught:
        batch(store, [Position("code", 0)], seq_len=31, seed=0)
    found = str(caught.value)
    assert "domain 'code'" in found
    assert "too little data for one step, 31 tokens; expected at least 32 (seq_len + 1)" in found
    assert "use a shorter --seq-len or more text" in found
    with pytest.raises(UserError, match=r"(?s)'wiki'.*101 tokens.*'code'.*31 tokens"):
        check_windows(store, store.domains, seq_len=512)


@pytest.mark.parametrize(
    ("limit", "sequences", "shapes", "starts"),
    [
        (None, 3, [3, 1], [0, 10, 20, 30]),
        (100, 8, [4], [0, 10, 20, 30]),
        (2, 8, [2], [0, 20]),
        (3, 2, [2, 1], [0, 10, 20]),
        (1, 8, [1], [0]),
    ],
)
def test_held_out_windows_are_the_same_and_evenly_spread(store, limit, sequences, shapes, starts):
    for _ in range(2):
        batches = list(held_out(store, "wiki", seq_len=10, limit=limit, sequences=sequences))
        assert [tuple(found.ids.shape) for found in batches] == [(size, 11) for size in shapes]
        assert torch.cat([found.ids for found in batches])[:, 0].tolist() == starts


def test_a_short_held_out_split_is_one_short_window(store):
    (only,) = held_out(store, "code", seq_len=10, limit=7)
    assert only.ids.dtype == torch.int64
    assert only.ids.tolist() == [[200, 201, 202, 203]]
    assert only.documents is not None
    assert only.documents.tolist() == [[0, 0, 0, 0]]
