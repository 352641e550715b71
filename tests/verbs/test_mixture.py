"""The mixture in real runs: steered, explained in the record, the same with any number of workers, in phases."""

import json
import re
import shutil
from functools import partial
from math import exp
from pathlib import Path

import pytest

from shearling import record
from shearling.data.store import Store
from shearling.errors import UserError
from shearling.recipe import Data, Heal, load_recipe, validated
from shearling.report.run_page import write_run_page
from shearling.run import run
from shearling.verbs.data import make_store
from shearling.verbs.heal import heal
from shearling.verbs.prune import prune

RECIPE = Path(__file__).parents[2] / "recipes" / "sheared-llama-1.3b.yaml"
PAPER = {
    "cc": 0.67,
    "github": 0.045,
    "book": 0.045,
    "stackexchange": 0.02,
    "wiki": 0.045,
    "arxiv": 0.025,
    "c4-rp": 0.15,
}


def changes(folder: Path) -> list[dict]:
    return [event for event in record.read(folder / "record.jsonl") if event["event"] == "mixture"]


def losses(folder: Path) -> list[str]:
    return [float(event["loss"]).hex() for event in record.read(folder / "record.jsonl") if event["event"] == "step"]


@pytest.fixture(scope="module")
def seven_domains(tmp_path_factory, texts) -> Path:
    """Stand-in text under the names of RedPajama's domains."""
    folder, every = tmp_path_factory.mktemp("redpajama"), list(texts.values())
    for number, domain in enumerate(PAPER):
        (folder / domain).mkdir()
        lines = (json.dumps({"text": text}) for text in every[number % len(every)][number:])
        (folder / domain / "part.jsonl").write_text("\n".join(lines))
    return folder


def test_the_sheared_llama_recipe_runs_on_stand_in_data(tmp_path, seven_domains, model_folder):
    """Its data side as published but for the lengths: what the record says is recomputed by the paper's formula."""
    shape = "hidden_size=24,num_hidden_layers=2,num_attention_heads=2,num_key_value_heads=2,intermediate_size=32"
    small = ["tokens=null", "seq_len=32", "batch_tokens=640", "eval_windows=2", "device=cpu", "eval_every=0"]
    asked = load_recipe(
        RECIPE,
        [
            f"model={model_folder}",
            f"out={tmp_path / 'run'}",
            f"data={{inputs: [{seven_domains}], held_out: 0.2}}",
            f"prune.to='{shape}'",
            "prune.calibration_windows=4",
            *(f"{stage}.{setting}" for stage in ("prune", "heal") for setting in small),
            *("prune.steps=101", "heal.steps=3", "heal.mixture.every=2"),
        ],
    )
    assert asked.prune.mixture.every == 50
    assert load_recipe(RECIPE).heal is not None
    run(asked)
    start, one, two = changes(tmp_path / "run" / "prune")
    assert start["weights"] == PAPER
    assert start["steering"] == "paper, by held_out losses, every 50 steps"
    assert (one["step"], two["step"]) == (50, 100)
    weights = PAPER
    for change in (one, two):
        raw = {d: w * exp(max(change["losses"][d] - change["references"][d], 0)) for d, w in weights.items()}
        weights = {d: r / sum(raw.values()) for d, r in raw.items()}
        assert change["weights"] == pytest.approx(weights)
        assert change["notes"]
    assert [change["step"] for change in changes(tmp_path / "run" / "heal")] == [0, 2]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Mixture of the data: prune" in page
    assert "Mixture of the data: heal" in page


@pytest.fixture(scope="module")
def cut(tmp_path_factory, model_folder, store_folder, ask_prune):
    out = tmp_path_factory.mktemp("mixtures") / "cut"
    return prune(str(model_folder), data=str(store_folder), out=str(out), asked=ask_prune(method="activation"))


def test_healing_follows_the_sources_losses_out_of_shearling_json(tmp_path, cut, store_folder, ask_heal):
    """A reference that the cut is above leads to another mixture; what changed is said."""
    heal(str(cut.out), data=str(store_folder), out=str(tmp_path / "healed"), asked=ask_heal(mixture={"every": 2}))
    start, change = changes(tmp_path / "healed")
    assert start["references"] == cut.source_losses
    assert "the mixture follows the source's losses, as shearling.json has them" in start["notes"]
    assert change["excess"] == pytest.approx(
        {d: max(loss - cut.source_losses[d], 0) for d, loss in change["losses"].items()}
    )


def test_other_windows_are_measured_on_the_source_itself(tmp_path, cut, store_folder, ask_heal):
    asked = ask_heal(mixture={"every": 2}, eval_windows=3)
    heal(str(cut.out), data=str(store_folder), out=str(tmp_path / "healed"), asked=asked)
    start = changes(tmp_path / "healed")[0]
    assert any(note.endswith("measured now") for note in start["notes"])
    assert start["references"] != cut.source_losses
    assert start["references"] == pytest.approx(cut.source_losses, rel=0.1)


def test_without_its_source_a_mixture_stays_and_says_so(tmp_path, cut, store_folder, ask_heal):
    orphan = Path(shutil.copytree(cut.out, tmp_path / "orphan"))
    origin = json.loads((orphan / "shearling.json").read_text())
    origin["source"]["name"] = str(tmp_path / "gone")
    (orphan / "shearling.json").write_text(json.dumps(origin))
    asked = {"eval_windows": 3}
    heal(str(orphan), data=str(store_folder), out=str(tmp_path / "healed"), asked=ask_heal(**asked))
    (start,) = changes(tmp_path / "healed")
    assert start["steering"] == "constant"
    assert any("so the mixture stays as it is (--reference gives" in note for note in start["notes"])
    with pytest.raises(UserError, match=r"mixture: found no references: its source.*is gone.*give --reference"):
        dynamic = ask_heal(**asked, mixture={"schedule": "dynamic"})
        heal(str(orphan), data=str(store_folder), out=str(tmp_path / "other"), asked=dynamic)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("signal", ["held_out", "training"])
def test_any_number_of_workers_trains_on_the_same_bits(tmp_path, cut, store_folder, ask_heal, signal):
    runs = []
    for workers in (0, 1, 4):
        mixture = {"every": 2, "signal": signal, "reference": {"code": 1.0, "prose": 2.0, "sums": 3.0}, "eta": 3.0}
        asked = ask_heal(steps=7, workers=workers, mixture=mixture)
        out = tmp_path / f"workers-{workers}"
        heal(str(cut.out), data=str(store_folder), out=str(out), asked=asked)
        runs.append((losses(out), [change["weights"] for change in changes(out)]))
    assert len(runs[0][0]) == 7
    assert len(runs[0][1]) == 4
    assert runs[0] == runs[1] == runs[2]


def test_phases_go_on_where_the_last_one_stopped(tmp_path, cut, store_folder, ask_heal):
    """The same windows are read on, other lengths start anew; tokens are counted through, each phase has its rate."""
    phases = [
        {"steps": 3, "lr": 1e-3},
        {"steps": 2, "mixture": {"schedule": "constant", "weights": {"code": 0.5, "prose": 0.25, "sums": 0.25}}},
        {"tokens": 384, "seq_len": 48, "batch_tokens": 96, "lr": 1e-4},
    ]
    asked = ask_heal(steps=None, phases=phases, mixture={"schedule": "proportional"})
    healed = heal(str(cut.out), data=str(store_folder), out=str(tmp_path / "healed"), asked=asked)
    assert healed.tokens == 5 * 128 + 384
    events = record.read(tmp_path / "healed" / "record.jsonl")
    told = [(e["steps"], e["seq_len"], e["lr"]) for e in events if e["event"] == "phase"]
    assert told == [(3, 32, 1e-3), (2, 32, pytest.approx(told[1][2])), (4, 48, 1e-4)]
    steps = [event for event in events if event["event"] == "step"]
    assert [event["tokens"] for event in steps] == [128, 256, 384, 512, 640, 736, 832, 928, 1024]
    assert [event["lr_share"] for event in steps[:5]] == [1.0] * 5
    assert steps[-1]["lr_share"] == pytest.approx(1 / 4)
    starts = [event for event in events if event["event"] == "mixture"]
    assert [start["tokens"] for start in starts] == [0, 384, 640]
    assert starts[1]["weights"]["code"] == 0.5


def test_a_phase_goes_on_with_the_mixture_that_came_out_unless_it_has_its_own(tmp_path, cut, store_folder, ask_heal):
    mixture = {"every": 1, "reference": {"code": 1.0, "prose": 9.0, "sums": 9.0}}
    phases = [{"steps": 3}, {"steps": 2}, {"steps": 2, "mixture": {"schedule": "proportional"}}]
    asked = ask_heal(steps=None, phases=phases, mixture=mixture)
    heal(str(cut.out), data=str(store_folder), out=str(tmp_path / "healed"), asked=asked)
    found = changes(tmp_path / "healed")
    first, second, third = [number for number, change in enumerate(found) if change["step"] == 0]
    assert found[second]["weights"] == found[second - 1]["weights"] != found[first]["weights"]
    assert found[third]["weights"] == found[first]["weights"]
    assert found[third]["steering"] == "constant"


def test_a_last_phase_on_data_of_its_own(tmp_path, cut, store_folder, model_folder, ask_heal, texts):
    """Other domains, such as conversations, and a page that shows both."""
    (tmp_path / "chat").mkdir()
    (tmp_path / "chat" / "part.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts["prose"]))
    own = validated(Data, {"inputs": [str(tmp_path / "chat")], "held_out": 0.2})
    make_store(own, tokenizer=str(model_folder), out=str(tmp_path / "store"))
    phases = [{"steps": 4}, {"steps": 2, "data": str(tmp_path / "store")}]
    asked = ask_heal(steps=None, phases=phases, mixture={"every": 2})
    healed = heal(str(cut.out), data=str(store_folder), out=str(tmp_path / "healed"), asked=asked)
    assert set(healed.losses) == {"code", "prose", "sums"}
    assert changes(tmp_path / "healed")[-1]["weights"] == {"chat": 1.0}
    folders = {"prune": cut.out, "heal": healed.out}
    page = write_run_page(tmp_path / "page.html", title="Two phases", folders=folders).read_text()
    assert "Mixture of the data: heal" in page
    assert "chat" in page


def test_what_lies_elsewhere_by_now_makes_no_other_stage(
    tmp_path, cut, store_folder, model_folder, ask_heal, monkeypatch
):
    """A reference, a phase's store and a teacher, each by another path; but not with anything else in them."""
    called, losses = (
        partial(heal, str(cut.out), data=str(store_folder), out=str(tmp_path / "healed")),
        cut.source_losses,
    )

    def asked(reference: Path, store: Path, teacher: Path) -> Heal:
        phases = [{"steps": 2}, {"steps": 1, "data": str(store), "mixture": {"reference": str(reference), "every": 2}}]
        taught = {"share": 0.5, "model": str(teacher)}
        return ask_heal(steps=None, phases=phases, mixture={"reference": str(reference)}, teacher=taught)

    (tmp_path / "reference.json").write_text(json.dumps(losses))
    called(asked=asked(tmp_path / "reference.json", store_folder, model_folder))
    moved = shutil.copytree(model_folder, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    elsewhere = (Path("reference.json"), Path(shutil.copytree(store_folder, "store")), moved)
    assert called(asked=asked(*elsewhere)).done_before
    (tmp_path / "reference.json").write_text(json.dumps({**losses, "code": 1.0}))
    with pytest.raises(UserError, match="a stage with other settings"):
        called(asked=asked(*elsewhere))


def test_the_datas_end_is_told(tmp_path, cut, store_folder, ask_heal, caplog):
    """Weights that move can use a domain up before it was foretold."""
    store = Store.open(store_folder)
    windows = store.window_count("sums", "train", 32)
    mixture = {
        "every": 1,
        "weights": {"code": 0.6, "prose": 0.35, "sums": 0.05},
        "reference": {"code": 9.0, "prose": 9.0, "sums": 0.5},
        "eta": 5.0,
    }
    asked = ask_heal(steps=windows, repeats={"sums": 1}, mixture=mixture, eval_windows=1)
    caplog.set_level("INFO", logger="shearling")
    healed = heal(str(cut.out), data=str(store_folder), out=str(tmp_path / "healed"), asked=asked)
    assert healed.tokens < windows * 128
    assert f"sums ended at step {healed.tokens // 128} of {windows}, and the run with it" in caplog.text
    lasts = r"sums lasts to the end while it is at most 25\.0% .* starts at 5\.0%.* if it is used up, the run ends"
    (told,) = [note for note in changes(tmp_path / "healed")[0]["notes"] if re.match(lasts, note)]
    assert told in caplog.text.partition("ended at step")[0]
    (end,) = [event for event in record.read(tmp_path / "healed" / "record.jsonl") if event["event"] == "used_up"]
    assert (end["step"], end["domain"]) == (healed.tokens // 128, "sums")


def test_a_domain_whose_share_goes_to_the_others_is_told(tmp_path, cut, store_folder, ask_heal):
    windows = Store.open(store_folder).window_count("sums", "train", 32)
    shares = {"code": 0.25, "prose": 0.25, "sums": 0.5}
    steps, last = windows, -(-windows * 2 // 4)  # four windows a step, two of them of sums
    asked = ask_heal(
        steps=steps, repeats={"sums": 1}, at_end="redistribute", mixture={"schedule": "constant", "weights": shares}
    )
    healed = heal(str(cut.out), data=str(store_folder), out=str(tmp_path / "healed"), asked=asked)
    assert healed.tokens == steps * 128
    (end,) = [event for event in record.read(tmp_path / "healed" / "record.jsonl") if event["event"] == "used_up"]
    assert end["domain"] == "sums"
    assert abs(end["step"] - last) <= 1
    assert end["weights"] == {"code": 0.5, "prose": 0.5, "sums": 0.0}
    assert end["note"] == "sums has been read 1 times: its share goes to the others"


def test_a_shard_with_a_wrong_sum_trains_nothing(tmp_path, cut, store_folder, ask_heal):
    store = Path(shutil.copytree(store_folder, tmp_path / "store"))
    (shard, *_) = sorted(store.glob("code/train-*.tokens"))
    raw = bytearray(shard.read_bytes())
    raw[100] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(UserError, match=rf"{shard}: found sha256"):
        heal(str(cut.out), data=str(store), out=str(tmp_path / "healed"), asked=ask_heal())
    assert not (tmp_path / "healed").exists()


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"phases": [{"lr": 1e-3}]}, ["phases.0", "a budget of its own"]),
        ({"repeats": {"code": 0}}, ["repeats.code: found 0; expected greater than 0; change code"]),
        ({"repeats": 0}, ["repeats: found 0; expected greater than 0"]),
        ({"phases": [{"steps": 2, "tokens": 3}]}, ["phases.0", "one of them"]),
        ({"steps": 4, "phases": [{"steps": 2}]}, ["a budget beside phases"]),
        ({"phases": [{"steps": 2, "lrr": 2}]}, ["phases.0.lrr", "did you mean 'lr'"]),
        ({"phases": [{"steps": 2}, {"steps": 2, "mixture": {"signal": "teacher_kl"}}]}, ["teacher_kl, no teacher"]),
        ({"phases": [{"steps": 2}, {"steps": 2, "schedule": "cosine"}]}, ["cosine in phases; expected trapezoid"]),
    ],
)
def test_phases_and_repeats_that_do_not_fit(ask_heal, options, parts):
    with pytest.raises(UserError) as caught:
        ask_heal(**{"steps": None, **options})
    for part in parts:
        assert part in str(caught.value)


def test_one_domain_leaves_nothing_to_mix(tmp_path, corpus, model_folder, ask_heal, cut):
    asked = validated(Data, {"inputs": [str(corpus / "code")], "held_out": 0.2})
    make_store(asked, tokenizer=str(model_folder), out=str(tmp_path / "store"))
    heal(str(cut.out), data=str(tmp_path / "store"), out=str(tmp_path / "healed"), asked=ask_heal())
    (start,) = changes(tmp_path / "healed")
    assert start["notes"] == ["one domain, nothing to mix: the mixture stays as it is"]
    assert start["weights"] == {"code": 1.0}


def test_healing_by_a_teacher_is_told_and_counted(tmp_path, cut, store_folder, ask_heal, model_folder):
    """The source teaches; the mixture can follow the KL; the teacher's forwards count as FLOPs."""
    plain = heal(str(cut.out), data=str(store_folder), out=str(tmp_path / "plain"), asked=ask_heal())
    asked = ask_heal(teacher={"share": 0.5}, mixture={"signal": "teacher_kl", "every": 2})
    taught = heal(str(cut.out), data=str(store_folder), out=str(tmp_path / "taught"), asked=asked)
    steps = [event for event in record.read(tmp_path / "taught" / "record.jsonl") if event["event"] == "step"]
    assert all(event["kl"] > 0 for event in steps)
    assert steps[0]["objective"] == pytest.approx(0.5 * steps[0]["loss"] + 0.5 * steps[0]["kl"], rel=1e-5)
    start, change = changes(tmp_path / "taught")
    assert set(start["references"].values()) == {0.0}
    assert change["losses"] == change["excess"]
    assert plain.flops < taught.flops < 3 * plain.flops
    named = ask_heal(teacher={"share": 0.5, "model": str(model_folder)}, mixture={"signal": "teacher_kl", "every": 2})
    heal(str(cut.out), data=str(store_folder), out=str(tmp_path / "named"), asked=named)
    assert losses(tmp_path / "named") == losses(tmp_path / "taught")
    less = ask_heal(teacher={"share": 0.25}, mixture={"signal": "teacher_kl", "every": 2})
    with pytest.raises(UserError, match=r"teacher.share: 0.5 there, 0.25 now"):
        heal(str(cut.out), data=str(store_folder), out=str(tmp_path / "taught"), asked=less)


def test_masks_learn_from_a_teacher(tmp_path, model_folder, store_folder, ask_prune):
    asked = ask_prune(method="masks", teacher={"share": 0.9, "share_end": 0.1})
    pruned = prune(str(model_folder), data=str(store_folder), out=str(tmp_path / "cut"), asked=asked)
    steps = [event for event in record.read(pruned.out / "record.jsonl") if event["event"] == "step"]
    for step, share in zip(steps, (0.9, 0.9 - 0.8 / 3, 0.9 - 1.6 / 3, 0.1), strict=True):
        assert step["objective"] == pytest.approx((1 - share) * step["loss"] + share * step["kl"], rel=1e-4)
    assert "expected_hidden" in steps[0]


def test_a_teacher_that_is_gone_is_asked_for(tmp_path, model_folder, store_folder, ask_heal):
    with pytest.raises(UserError, match=r"teacher: found no shearling.json.*--teacher MODEL"):
        asked = ask_heal(teacher={"share": 0.5})
        heal(str(model_folder), data=str(store_folder), out=str(tmp_path / "healed"), asked=asked)
    with pytest.raises(UserError, match=r"mixture.signal: found teacher_kl, no teacher"):
        ask_heal(mixture={"signal": "teacher_kl"})
    with pytest.raises(UserError, match=r"teacher.hidden: found it with compile"):
        ask_heal(teacher={"hidden": 0.5}, compile=True)
    with pytest.raises(UserError, match=r"teacher: .*a share above 0 \(or hidden\) beside model"):
        ask_heal(teacher={"model": "big"})
    with pytest.raises(UserError, match=r"mixture: found a reference beside teacher_kl"):
        ask_heal(teacher={"share": 0.5}, mixture={"signal": "teacher_kl", "reference": {"code": 1.0}})
