"""A teacher through the verbs' own parts: chosen, checked, live or cached, in the loop with a cut of it."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from shearling.data.store import Store
from shearling.errors import UserError
from shearling.ranks.ranks import Ranks
from shearling.record import read
from shearling.teacher.cached import CachedTeacher
from shearling.teacher.options import Options
from shearling.train.loop import train
from shearling.train.optim import adamw
from shearling.verbs.prune import prune
from shearling.verbs.session import Session
from shearling.verbs.source import Source
from shearling.verbs.teaching import Teaching
from shearling.weights.model import load_model


@pytest.fixture(scope="module")
def cut(tmp_path_factory, model_folder, store_folder, ask_prune) -> Source:
    out = tmp_path_factory.mktemp("cut") / "cut"
    prune(str(model_folder), data=str(store_folder), out=str(out), asked=ask_prune(method="activation"))
    return Source.open(str(out))


@pytest.fixture
def session(cut, store_folder, ask_heal) -> Session:
    asked = ask_heal(steps=6, lr=1e-2, workers=0)
    return Session.plan(asked, cut, Store.open(store_folder), default_tokens=0, most_between_updates=1)


def healed(teaching: Teaching, student: Source, session: Session) -> list[dict]:
    """The steps' figures of a short run."""
    model, objective, steps = load_model(student.folder), teaching.objective(session), []
    with session.feed.reading() as reading:
        train(
            model,
            settings=session.settings,
            state=session.state(),
            draw=reading.draw,
            objective=objective,
            optimizers=[adamw(model.parameters(), lr=session.lr)],
            terms=[objective],
            log=lambda event, **fields: steps.append(fields) if event == "step" else None,
        )
    return steps


def test_ranks_share_a_teacher_out_on_the_students_kind_of_device(cut, model_folder, monkeypatch) -> None:
    monkeypatch.setattr(Source, "identify", lambda self, ranks: None)  # there is no other rank
    own = Source.open(str(model_folder))
    wanted = partial(Teaching.wanted, student=cut, own=own, why="", ranks=Ranks(0, 2))
    with pytest.raises(UserError) as told:
        wanted(Options(share=0.5, device="cpu"), device="cuda:1")
    assert str(told.value) == (
        "teacher.device: found cpu, with 2 ranks on cuda; expected cuda: they share its weights out as they do the "
        "student's; leave it out, or start one process"
    )
    assert wanted(Options(share=0.5, device="cpu"), device="cpu") is not None
    assert wanted(Options(share=0.5, device="cpu", weights="int8"), device="cuda:1") is not None


def test_a_live_teacher_with_hidden_states(cut, model_folder, session) -> None:
    options = Options(share=0.9, share_end=0.4, hidden=0.1)
    teaching = Teaching.plan(options, teacher=Source.open(str(model_folder)), student=cut)
    steps = healed(teaching, cut, session)
    assert [step["kl_share"] for step in steps] == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    for step in steps:
        blend = (1 - step["kl_share"]) * step["loss"] + step["kl_share"] * step["kl"] + 0.1 * step["hidden"]
        assert step["objective"] == pytest.approx(blend, rel=1e-4)


def test_hidden_states_while_masks_are_learned(model_folder, store_folder, ask_prune, tmp_path) -> None:
    asked = ask_prune(method="masks", teacher={"share": 0.5, "hidden": 0.1}, lr=1e-2)
    prune(str(model_folder), data=str(store_folder), out=str(tmp_path / "cut"), asked=asked)
    steps = [event for event in read(tmp_path / "cut" / "record.jsonl") if event["event"] == "step"]
    assert steps[0]["hidden"] > 0
    for step in steps:
        blend = 0.5 * step["loss"] + 0.5 * step["kl"] + 0.1 * step["hidden"]
        assert step["objective"] == pytest.approx(blend, rel=1e-4)


@pytest.mark.parametrize("kind", ["sampled", "top_k"])
def test_a_cached_teacher_is_loaded_once_for_all_runs(kind, cut, model_folder, session, tmp_path, monkeypatch) -> None:
    teacher, options = Source.open(str(model_folder)), Options(share=0.5, cache=str(tmp_path / "c"), kind=kind)
    first = healed(Teaching.plan(options, teacher=teacher, student=cut), cut, session)

    def refuse(*args, **kwargs):
        raise AssertionError("the teacher was loaded again")

    monkeypatch.setattr("shearling.verbs.teaching.load_teacher", refuse)
    again = healed(Teaching.plan(options, teacher=teacher, student=cut), cut, session)
    assert [step["objective"].hex() for step in again] == [step["objective"].hex() for step in first]
    other_seed = replace(session, feed=replace(session.feed, seed=5))
    windows = Teaching.plan(options, teacher=teacher, student=cut).objective(other_seed).teacher
    assert isinstance(windows, CachedTeacher)
    assert sum(windows.cache.written().values()) > 0
    (place,) = (tmp_path / "c").iterdir()
    Teaching.plan(options, teacher=teacher, student=cut).check(session)
    with pytest.raises(UserError, match=rf"{place.name}.*, k: found 32; expected 7"):  # before anything is computed
        Teaching.plan(replace(options, k=7), teacher=teacher, student=cut).check(session)
    other = replace(options, k=7)
    with pytest.raises(UserError, match=rf"{place.name}.*, k: found 32; expected 7"):
        healed(Teaching.plan(other, teacher=teacher, student=cut), cut, session)


def test_a_cache_may_lie_in_the_home_folder(cut, model_folder, session, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    options = Options(share=0.5, cache="~/c")
    Teaching.plan(options, teacher=Source.open(str(model_folder)), student=cut).objective(session)
    assert list((tmp_path / "c").glob("*/manifest.json"))


def test_what_cannot_teach_is_refused(cut, model_folder, copied, tmp_path) -> None:
    teacher = Source.open(str(model_folder))
    with pytest.raises(UserError, match="expected a teacher that runs along"):
        Teaching.plan(Options(hidden=0.1, cache=str(tmp_path)), teacher=teacher, student=cut)
    with pytest.raises(UserError, match="expected a model cut from the teacher"):
        Teaching.plan(Options(hidden=0.1), teacher=cut, student=teacher)
    tokenizer = Path(copied()) / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"</s>"', '"<end>"'))
    with pytest.raises(UserError, match="found the tokenizer"):
        Teaching.plan(Options(share=0.5), teacher=Source.open(str(tokenizer.parent)), student=cut)


@pytest.mark.parametrize("wrong", [{"share": 1.5}, {"share": -0.1}, {"share_end": 2}, {"hidden": -1}, {"k": 0}])
def test_options_out_of_bounds(wrong) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} from"):
        Options(**wrong)


def test_options_off_by_default() -> None:
    assert not Options().wanted
    assert Options(share_end=0.5).wanted
    assert Options(share=0.3).end == 0.3
    assert Options().weights == "as_is"


def test_a_teacher_on_a_device_that_is_not_here(cut, model_folder) -> None:
    with pytest.raises(UserError, match=r"device: found 'abacus'; expected .*cpu"):
        Teaching.plan(Options(share=0.5, device="abacus"), teacher=Source.open(str(model_folder)), student=cut)
