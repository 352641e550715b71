"""Held-out figures: the same at any batch size and over any number of ranks, with an error that documents decide."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import small
from stores import write_store
from torch.nn import functional

import shearling
from shearling.data.loader import HeldOut, bytes_per_token, held_out
from shearling.data.store import Store
from shearling.errors import UserError
from shearling.loss.cross_entropy import CHUNK_TOKENS, token_losses
from shearling.loss.held_out import Measured, Sums, held_out_losses, held_out_sums, measure, measured, window_sums

VOCAB, SEQ_LEN = 40, 16


@pytest.fixture
def store(tmp_path) -> Store:
    """`many` with 23 documents of 5 to 60 tokens held out, `short` with one of 9."""
    draw = np.random.default_rng(0)
    lengths = {"many": draw.integers(5, 60, 23), "short": [9]}
    domains = {
        domain: {split: [[draw.integers(0, VOCAB, length) for length in mine]] for split in ("train", "eval")}
        for domain, mine in lengths.items()
    }
    write_store(tmp_path, domains, vocab_size=VOCAB, bytes_of=lambda ids: 3 * len(ids))
    return Store.open(tmp_path)


@pytest.fixture(scope="module")
def model():
    return small("llama", vocab=VOCAB).model


def windows(store: Store, domain: str = "many", sequences: int = 8) -> list[HeldOut]:
    return list(held_out(store, domain, seq_len=SEQ_LEN, sequences=sequences))


def numbers(figures: Measured) -> dict[str, float]:
    return {name: value for name, value in vars(figures).items() if value is not None}


def test_each_token_is_in_its_document(store):
    offsets = store.offsets("many", "eval").tolist()
    stream = [number for number, end in enumerate(offsets[1:]) for _ in range(offsets[number], end)]
    found = torch.cat([batch.documents for batch in windows(store)])
    assert found.dtype == torch.int64
    assert found.tolist() == [stream[i : i + SEQ_LEN + 1] for i in range(0, len(stream) - SEQ_LEN, SEQ_LEN)]
    (only,) = windows(store, "short")
    assert only.documents is not None
    assert only.documents.tolist() == [[0] * 9]


def test_losses_of_single_tokens_are_the_logits_own(model):
    ids = torch.randint(0, VOCAB, (80, SEQ_LEN + 1), generator=torch.Generator().manual_seed(0))
    assert ids[:, 1:].numel() > CHUNK_TOKENS
    with torch.no_grad():
        logits = model(ids[:, :-1]).logits
    expected = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    found = token_losses(model, ids)
    assert (found.dtype, found.shape, found.requires_grad) == (torch.float32, (80, SEQ_LEN), False)
    torch.testing.assert_close(found.flatten(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sequences", [1, 3, 8])
def test_any_batch_size_gives_the_same_figures(store, model, sequences):
    def figures(sequences: int):
        batches = {domain: windows(store, domain, sequences) for domain in store.domains}
        return measure(model, batches, bytes_per_token=bytes_per_token(store))

    found, expected = figures(sequences), figures(100)
    assert found.keys() == {"many", "short"}
    for domain, one in expected.items():
        assert numbers(found[domain]) == pytest.approx(numbers(one), rel=1e-6)
    assert held_out_losses(model, {"many": windows(store, sequences=sequences)})["many"] == found["many"].nats_per_token


def test_ranks_sums_add_up(store, model):
    batches = windows(store, sequences=3)
    whole = measured(held_out_sums(model, batches), domain="many")
    # One rank sees the first documents alone, and a third nothing at all.
    for shares in ((batches[::2], batches[1::2]), (batches[:2], batches[2:], [])):
        total = sum((held_out_sums(model, share) for share in shares), Sums.none())
        assert numbers(measured(total, domain="many")) == pytest.approx(numbers(whole), rel=1e-12)


@pytest.mark.parametrize("ranks", [2, 3])
def test_each_rank_measures_its_share(store, model, ranks):
    """Shares are disjoint and together all windows; one of nothing is no special case."""

    def share_of(rank: int, ranks: int):
        options = {"seq_len": SEQ_LEN, "limit": 9, "sequences": 4, "rank": rank, "ranks": ranks}
        return {domain: held_out(store, domain, **options) for domain in store.domains}

    whole, shares = share_of(0, 1), [share_of(rank, ranks) for rank in range(ranks)]
    sums = [{domain: held_out_sums(model, windows) for domain, windows in share.items()} for share in shares]
    assert [share["many"].windows for share in sums] == [len(range(rank, 9, ranks)) for rank in range(ranks)]
    assert [share["short"].windows for share in sums] == [1] + [0] * (ranks - 1)
    others = iter(sum((share[domain] for share in sums[1:]), Sums.none()) for domain in store.domains)
    found = measure(model, share_of(0, ranks), together=lambda mine: mine + next(others))
    for domain, figures in measure(model, whole).items():
        assert numbers(found[domain]) == pytest.approx(numbers(figures), rel=1e-6)


RANK = """
import sys
from datetime import timedelta
import torch, torch.distributed as dist
from shearling.loss.held_out import Sums, measured
rank, path = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + path, rank=rank, world_size=2, timeout=timedelta(seconds=60))
mine = [Sums(torch.tensor([1.0, 2.0]).double(), torch.tensor([1, 1]), 1),
        Sums(torch.tensor([0.5, 0.0, 4.5]).double(), torch.tensor([1, 0, 2]), 2)][rank].over(3)
dist.all_reduce(mine.nats)
dist.all_reduce(mine.tokens)
print(measured(Sums(mine.nats, mine.tokens, 3), domain="d").nats_per_token)
dist.destroy_process_group()
"""


def test_two_processes_add_their_sums(tmp_path):
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / "meet")],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(shearling.__file__).parents[1],
        )
        for rank in range(2)
    ]
    assert [float(process.communicate(timeout=120)[0]) for process in ranks] == [8 / 5, 8 / 5]


def test_what_does_not_count_is_left_out(store, model, monkeypatch):
    length = int(store.offsets("many", "eval")[-1])
    mask = np.random.default_rng(1).integers(0, 2, length).astype(np.uint8)
    monkeypatch.setattr(Store, "loss_mask", lambda self, domain, split, start, stop: mask[start:stop])
    batches = windows(store)
    found = measure(model, {"many": batches})["many"]
    losses = torch.cat([token_losses(model, batch.ids) for batch in batches]).flatten()
    used = torch.from_numpy(mask)[1 : len(losses) + 1] == 1
    assert found.tokens == int(used.sum())
    assert found.nats_per_token == pytest.approx(float(losses[used].double().mean()), rel=1e-9)


def test_nan_where_nothing_counts_stays_out():
    losses = torch.tensor([[1.0, float("nan"), 3.0]])
    found = window_sums(losses, HeldOut(torch.zeros(1, 4, dtype=torch.int64), counted=torch.tensor([[1, 1, 0, 1]])))
    assert measured(found, domain="d").nats_per_token == 2.0


def test_figures_by_hand():
    sums = Sums(torch.tensor([2.0, 0.0, 7.0], dtype=torch.float64), torch.tensor([2, 0, 3]), windows=2)
    found = measured(sums, domain="d", bytes_per_token=4.0)
    assert (found.nats_per_token, found.nats_per_byte, found.tokens) == (1.8, 0.45, 5)
    assert (found.documents, found.windows) == (2, 2)
    assert found.perplexity == pytest.approx(math.exp(1.8))
    # 2 / 1 * ((2 - 1.8 * 2)^2 + (7 - 1.8 * 3)^2), by two documents with a token
    assert found.standard_error == pytest.approx(math.sqrt(2 * (1.6**2 + 1.6**2)) / 5)


def test_the_error_is_that_of_drawing_documents():
    """Against the spread of the mean over a thousand draws of 60 documents, whose tokens are wrong together."""
    generator = torch.Generator().manual_seed(0)
    means, errors = [], []
    for _ in range(1000):
        tokens = torch.randint(1, 50, (60,), generator=generator)
        level = 2 + torch.randn(60, generator=generator, dtype=torch.float64)
        found = measured(Sums(level * tokens, tokens, 1), domain="d")
        means.append(found.nats_per_token)
        errors.append(found.standard_error)
    assert np.std(means) == pytest.approx(np.mean(errors), rel=0.08)


def test_one_document_has_no_standard_error(store, model):
    found = measure(model, {"short": windows(store, "short")})["short"]
    assert (found.standard_error, found.nats_per_byte) == (None, None)
    assert (found.tokens, found.documents, found.windows) == (8, 1, 1)


def test_a_hopeless_loss_is_still_a_figure():
    found = measured(Sums(torch.tensor([1e4]).double(), torch.tensor([1]), 1), domain="d")
    assert found.perplexity == math.inf
    nan = measured(Sums(torch.tensor([math.nan]).double(), torch.tensor([1]), 1), domain="d")
    assert math.isnan(nan.perplexity)


def test_nothing_to_measure_is_said():
    with pytest.raises(UserError, match="domain 'd': found no token whose loss counts"):
        measured(Sums(torch.zeros(2).double(), torch.zeros(2, dtype=torch.int64), 1), domain="d")
