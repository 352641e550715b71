"""A teacher on disk: written once, read by any run over the same store, never taken for another's."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import small
from stores import write_store

from shearling.data.batch import Batch
from shearling.data.loader import batch
from shearling.data.sampler import SamplerState, draw
from shearling.data.store import Store
from shearling.errors import UserError
from shearling.loss.distillation import Dense, Sparse, blended_loss
from shearling.teacher import cache as caches
from shearling.teacher.cache import Cache
from shearling.teacher.cached import CachedTeacher
from shearling.teacher.live import LiveTeacher
from shearling.train.distilled import Distilled

SEQ_LEN, VOCAB = 8, 40


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Domains `wiki` of 6 windows and `code` of 3."""
    rng = np.random.default_rng(0)
    domains = {
        domain: {split: [[rng.integers(0, VOCAB, windows * SEQ_LEN + 1)]] for split in ("train", "eval")}
        for domain, windows in (("wiki", 6), ("code", 3))
    }
    folder = write_store(tmp_path / "store", domains, vocab_size=VOCAB)
    return Store.open(folder)


def manifest(of: Store, **changes) -> caches.Manifest:
    windows = {domain: of.window_count(domain, "train", SEQ_LEN) for domain in of.domains}
    settings = {"kind": "sampled", "k": 4, "seed": 0, "seq_len": SEQ_LEN, "separate": False, "vocab_size": VOCAB}
    settings |= {"store": of.digest, "teacher": "f" * 64, "weights": "float32", "windows": windows}
    return caches.Manifest(**{**settings, **changes})


class Counting:
    """A live teacher that remembers how many windows it was asked for."""

    def __init__(self) -> None:
        self.model = small("llama", seed=3).model.requires_grad_(False)
        self.asked = 0

    def load(self) -> LiveTeacher:
        teacher, counting = LiveTeacher(self.model), self

        class Watched(LiveTeacher):
            def __call__(self, batch: Batch):
                counting.asked += len(batch)
                return teacher(batch)

        return Watched(self.model)


def never() -> LiveTeacher:
    raise AssertionError("the teacher was asked again")


def windows_of(store: Store, count: int, *, seed: int = 0) -> Batch:
    """The first batch that a run with this seed draws."""
    positions, _ = draw(SamplerState.start(store.domains), {"wiki": 2, "code": 1}, count)
    return batch(store, positions, seq_len=SEQ_LEN, seed=seed)


def said(teacher: CachedTeacher, found: Batch) -> Sparse:
    taught = teacher(found).taught
    assert isinstance(taught, Sparse)
    return taught


def test_batches_name_their_windows(store: Store) -> None:
    found = windows_of(store, 9)
    assert found.windows is not None
    for ids, domain, window in zip(found.ids, found.domains, found.windows, strict=True):
        expected = store.window(store.domains[domain], "train", window, SEQ_LEN)
        assert torch.equal(ids, torch.from_numpy(expected))
    assert [part.windows for part in found.split(4)] == [found.windows[:4], found.windows[4:8], found.windows[8:]]
    some = found.rows([3, 1])
    assert (some.windows, some.domains) == ((found.windows[3], found.windows[1]), (found.domains[3], found.domains[1]))
    assert torch.equal(some.ids, found.ids[[3, 1]])


@pytest.mark.parametrize("kind", ["top_k", "sampled"])
def test_each_window_is_asked_for_once_whatever_the_order(store: Store, tmp_path: Path, kind: str) -> None:
    counting, described = Counting(), manifest(store, kind=kind)
    first = CachedTeacher(Cache.open(tmp_path / "c", described), counting.load, domains=store.domains)
    some = said(first, windows_of(store, 4))
    assert counting.asked == 4
    assert sum(first.cache.written().values()) == 4
    again = said(first, windows_of(store, 4))
    assert counting.asked == 4
    assert torch.equal(again.ids, some.ids)
    said(first, windows_of(store, 9, seed=7))  # another run, which reads everything in an order of its own
    assert counting.asked == 9

    resumed = CachedTeacher(Cache.open(tmp_path / "c", described), never, domains=store.domains)
    apart = [said(resumed, part) for part in windows_of(store, 9).split(2)]
    whole = said(resumed, windows_of(store, 9))
    assert torch.equal(torch.cat([part.ids for part in apart]), whole.ids)
    assert torch.equal(whole.ids[: len(some.ids)], some.ids)
    assert torch.equal(whole.probabilities[: len(some.ids)], some.probabilities)


def test_what_is_read_is_what_the_teacher_says(store: Store, tmp_path: Path) -> None:
    """With all ids kept the sparse loss is the dense one, but for half precision."""
    counting, found = Counting(), windows_of(store, 9)
    cache = Cache.open(tmp_path / "c", manifest(store, kind="top_k", k=VOCAB - 1))
    taught = said(CachedTeacher(cache, counting.load, domains=store.domains), found)
    dense = counting.load()(found).taught
    assert isinstance(dense, Dense)
    hidden, weight = torch.randn(2, 72, 16, generator=torch.Generator().manual_seed(0))[0], torch.ones(VOCAB, 16)
    weight = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
    hidden.requires_grad_()
    totals, grads = [], []
    for source in (taught, dense):
        total, _, _ = blended_loss(hidden, weight, found.targets.flatten(), source, share=1.0)
        totals.append(float(total.detach()))
        grads.append(torch.autograd.grad(total, [hidden, weight]))
    assert totals[0] == pytest.approx(totals[1], rel=1e-3)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


def test_an_objective_takes_it(store: Store, tmp_path: Path) -> None:
    teacher = CachedTeacher(Cache.open(tmp_path / "c", manifest(store)), Counting().load, domains=store.domains)
    objective = Distilled(teacher, domains=2, share=lambda step, steps: 0.5, steps=1)
    losses = [objective(small("llama").model, part) for _ in range(2) for part in windows_of(store, 4).split(2)]
    assert torch.equal((losses[0] + losses[1]).sums["kl"], (losses[2] + losses[3]).sums["kl"])
    assert float((losses[0] + losses[1]).sums["kl"].min()) > 0


def flip_a_byte(folder: Path) -> None:
    with open(folder / "wiki" / "records", "r+b") as file:
        raw = file.read(1)
        file.seek(0)
        file.write(bytes([raw[0] ^ 1]))


def forget_the_sum(folder: Path) -> None:
    with open(folder / "wiki" / "sums", "r+b") as file:
        file.write(bytes(4))


@pytest.mark.parametrize("harm", [flip_a_byte, forget_the_sum])
def test_a_torn_window_is_asked_for_again(store: Store, tmp_path: Path, harm: Callable[[Path], None]) -> None:
    counting, described = Counting(), manifest(store)
    whole = said(
        CachedTeacher(Cache.open(tmp_path / "c", described), counting.load, domains=store.domains),
        windows_of(store, 9),
    )
    harm(tmp_path / "c")
    mended = CachedTeacher(Cache.open(tmp_path / "c", described), counting.load, domains=store.domains)
    assert torch.equal(said(mended, windows_of(store, 9)).ids, whole.ids)
    assert counting.asked == 10
    said(CachedTeacher(Cache.open(tmp_path / "c", described), never, domains=store.domains), windows_of(store, 9))


def test_ranks_share_a_cache(store: Store, tmp_path: Path) -> None:
    """Two that opened an empty folder at once each see what the other wrote."""
    one, two = (
        CachedTeacher(Cache.open(tmp_path / "c", manifest(store)), Counting().load, domains=store.domains)
        for _ in range(2)
    )
    found = windows_of(store, 8)
    left, right = found.split(4)
    said(one, left), said(two, right)
    for teacher in (one, two):
        assert sum(teacher.cache.written().values()) == 8
    assert torch.equal(said(one, found).ids, said(two, found).ids)


def test_a_rank_may_be_later_than_another(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It found no manifest; when it lists the folder the other's folders of domains are there."""
    start = caches._start

    def late(folder: Path, of: caches.Manifest) -> None:
        monkeypatch.undo()
        Cache.open(folder, of)
        start(folder, of)

    monkeypatch.setattr(caches, "_start", late)
    assert Cache.open(tmp_path / "c", manifest(store)).read("wiki", 0) is None


@pytest.mark.parametrize(
    "change", [{"k": 5}, {"seed": 1}, {"teacher": "g"}, {"store": "h"}, {"separate": True}, {"kind": "top_k"}]
)
def test_anything_else_is_refused(store: Store, tmp_path: Path, change: dict) -> None:
    Cache.open(tmp_path / "c", manifest(store))
    (name,) = change
    with pytest.raises(UserError, match=rf"manifest\.json, {name}: found .*; expected .*{change[name]}"):
        Cache.open(tmp_path / "c", manifest(store, **change))


def test_broken_folders_are_refused(store: Store, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"found notes\.txt; expected a teacher's cache"):
        Cache.open(tmp_path / "other", manifest(store))
    cache = Cache.open(tmp_path / "c", manifest(store))
    os.truncate(cache.folder / "code" / "records", 5)
    with pytest.raises(UserError, match="found 5 bytes"):
        Cache.open(tmp_path / "c", manifest(store))
    (cache.folder / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="a broken manifest"):
        Cache.open(tmp_path / "c", manifest(store))


def test_a_place_where_none_can_be_made_is_refused(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    folder, described = tmp_path / "file" / "c", manifest(store)
    with pytest.raises(UserError, match=rf"cache {folder}: found {tmp_path}/file, which is no folder"):
        Cache.check(folder, described)
    with pytest.raises(UserError, match=rf"cache {folder}: found it can't be written \(Not a directory\)"):
        Cache.open(folder, described)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # whoever runs the tests may write anywhere
    with pytest.raises(UserError, match=rf"found {tmp_path}, which can't be written"):
        Cache.check(tmp_path / "c", described)
    assert not (tmp_path / "c").exists()


def test_its_size_is_known_before_it_is_written(store: Store, tmp_path: Path) -> None:
    cache = Cache.open(tmp_path / "c", manifest(store))
    files = [path for path in cache.folder.rglob("*") if path.is_file() and path.name != "manifest.json"]
    assert cache.nbytes() == sum(path.stat().st_size for path in files)
    assert cache.read("wiki", 0) is None
