"""A recipe from one end to the other, and what is said of one that can't be read."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import yaml

from shearling import record
from shearling.errors import UserError
from shearling.recipe import Data, Recipe, load_recipe
from shearling.run import run
from shearling.stage import locked
from shearling.verbs.source import Source

RECIPE = """
model: {model}
out: {out}
data:
  inputs: [{corpus}]
  held_out: 0.2
prune:
  to: hidden_size=24,num_hidden_layers=2,num_attention_heads=2,intermediate_size=32
  method: masks
  steps: 3
  seq_len: 32
  batch_tokens: 128
  eval_windows: 4
  calibration_windows: 4
  lr: 1e-3
  masks: {{slide: 0.5}}
  device: cpu
heal:
  tokens: 0.5K
  seq_len: 32
  batch_tokens: 128
  eval_windows: 4
  device: cpu
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def recipe_file(folder, model_folder, corpus) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(model=model_folder, out=folder / "run", corpus=corpus))
    return path


@pytest.fixture(scope="module")
def ran(recipe_file):
    return run(load_recipe(recipe_file, ["heal.tokens=1K", "prune.masks.lr=0.02"]))


@pytest.fixture
def write(tmp_path):
    """Writes a recipe with some lines of its own."""

    def make(more: str = "", *, prune: str = "{to: hidden_size=24}", data: str = "store") -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(f"model: m\nout: o\ndata: {data}\nprune: {prune}\n{more}")
        return path

    return make


def state(out: Path) -> dict[str, tuple[str, int]]:
    """Every file of the stages: its sha256 and when it was written."""
    stages = ("data", "prune", "heal", "model")
    paths = [path for stage in stages for path in (out / stage).rglob("*") if path.is_file()]
    return {str(p): (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns) for p in paths}


def refusal(path: Path, *settings: str) -> str:
    with pytest.raises(UserError) as refused:
        load_recipe(path, settings)
    return str(refused.value)


def test_a_run_leaves_its_stages_its_model_and_its_page(ran, folder):
    out = folder / "run"
    found = {path.name for path in out.iterdir()}
    assert found == {"recipe.yaml", "record.jsonl", "data", "prune", "heal", "model", "report.html"}
    assert ran.model == out / "model"
    assert list(ran.model.rglob("config.json")) == [ran.model / "config.json"]
    assert (ran.model / "model.safetensors").read_bytes() == (out / "heal" / "model.safetensors").read_bytes()
    config = json.loads((ran.model / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"], config["intermediate_size"]) == (24, 2, 32)
    assert set(ran.losses) == {"source", "cut", "healed"}
    assert all(set(losses) == {"code", "prose", "sums"} for losses in ran.losses.values())
    assert "<html" in ran.report.read_text()[:200]


def test_its_record_tells_the_stages_in_order(ran, folder):
    events = record.read(folder / "run" / "record.jsonl")
    first = [event.get("name", event["event"]) for event in events][:4]
    assert first == ["run", "data", "prune", "heal"]
    assert events[0]["recipe"]["heal"]["tokens"] == 1000


def test_overrides_reach_the_stages(ran, folder):
    healed = record.read(folder / "run" / "heal" / "record.jsonl")[0]
    assert healed["steps"] == round(1000 / 128)
    pruned = json.loads((folder / "run" / "prune" / "stage.json").read_text())["identity"]
    assert pruned["masks"]["lr"] == 0.02
    assert pruned["masks"]["slide"] == 0.5


def test_the_resolved_recipe_is_explicit_and_the_same_recipe(ran, folder):
    text = (folder / "run" / "recipe.yaml").read_text()
    resolved = yaml.safe_load(text)
    assert set(resolved) == set(Recipe.model_fields)
    assert set(resolved["data"]) == set(Data.model_fields)
    assert resolved["prune"]["to"]["hidden_size"] == 24
    assert resolved["prune"]["masks"]["relaxation"] == "soft_topk"
    assert resolved["heal"]["tokens"] == 1000
    assert resolved["heal"]["schedule"] == "trapezoid"
    again = load_recipe(folder / "run" / "recipe.yaml")
    assert yaml.safe_dump(again.model_dump(mode="json"), sort_keys=False) == text.partition("\n")[2]


def test_a_second_run_passes_over_what_is_finished(ran, folder, recipe_file):
    before = state(folder / "run")
    again = run(load_recipe(recipe_file, ["heal.tokens=1K", "prune.masks.lr=0.02"]))
    assert state(folder / "run") == before
    assert again == ran


def test_a_finished_stage_with_other_settings_is_not_overwritten(ran, folder, recipe_file):
    before, left = state(folder / "run"), (folder / "run" / "recipe.yaml").read_text()
    with pytest.raises(UserError, match=r"run/prune: found a stage with other settings \(lr: 0.001 there, 0.5 now"):
        run(load_recipe(recipe_file, ["heal.tokens=1K", "prune.masks.lr=0.02", "prune.lr=0.5"]))
    assert state(folder / "run") == before
    assert (folder / "run" / "recipe.yaml").read_text() == left


def test_a_second_run_at_once_is_refused_and_leaves_everything(ran, folder, recipe_file):
    before = {name: (folder / "run" / name).read_text() for name in ("recipe.yaml", "record.jsonl")}
    with locked(folder / "run.lock"), pytest.raises(UserError, match=r"run.lock: found process .*, which holds it"):
        run(load_recipe(recipe_file, ["heal.tokens=2K", "prune.masks.lr=0.02"]))
    assert before == {name: (folder / "run" / name).read_text() for name in before}


def test_a_recipe_is_left_once_no_stage_that_was_begun_can_refuse_it(tmp_path, recipe_file, store_folder):
    out, seen = tmp_path / "run", []
    settings = [f"data={store_folder}", f"out={out}", "prune.method=activation"]

    def left() -> int:
        return yaml.safe_load((out / "recipe.yaml").read_text())["heal"]["tokens"]

    def stopping(title, steps):
        seen.append((title, left()))
        raise KeyboardInterrupt

    for tokens in (500, 500):  # begun, and gone on with
        with pytest.raises(KeyboardInterrupt):
            run(load_recipe(recipe_file, [*settings, f"heal.tokens={tokens}"]), watch=stopping)
    with pytest.raises(
        UserError, match=r"heal.partial: found a stage with other settings \(tokens: 500 there, 600 now"
    ):
        run(load_recipe(recipe_file, [*settings, "heal.tokens=600"]))
    assert left() == 500
    shutil.rmtree(out / "heal.partial")
    with pytest.raises(KeyboardInterrupt):
        run(load_recipe(recipe_file, [*settings, "heal.tokens=600"]), watch=stopping)
    assert seen == [("healing", 500), ("healing", 500), ("healing", 600)]


def test_a_recipe_of_the_users_own_stays(tmp_path, recipe_file, store_folder):
    """As it is where it says the same, else the run is refused."""
    own, settings = tmp_path / "recipe.yaml", ["heal=null", f"data={store_folder}", "prune.method=activation"]
    text = yaml.safe_dump(load_recipe(recipe_file, [*settings, f"out={tmp_path}"]).model_dump(exclude_defaults=True))
    own.write_text(f"# mine\n{text}")
    with pytest.raises(UserError, match=rf"recipe {own}: found a recipe that no run has left there"):
        run(load_recipe(own, ["prune.seed=1"]))
    assert list(tmp_path.iterdir()) == [own]
    run(load_recipe(own))
    assert own.read_text() == f"# mine\n{text}"


def test_a_run_can_end_with_the_cut_on_a_store_that_is_there(tmp_path, recipe_file, store_folder):
    settings = ["heal=null", f"data={store_folder}", f"out={tmp_path / 'run'}", "prune.method=activation"]
    result = run(load_recipe(recipe_file, settings))
    assert set(result.losses) == {"source", "cut"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "recipe.yaml",
        "record.jsonl",
        "prune",
        "model",
        "report.html",
    }
    with pytest.raises(UserError, match="model: found the model of prune; expected that of heal; move it away"):
        run(load_recipe(recipe_file, settings[1:]))
    assert not (tmp_path / "run" / "heal.partial").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("prune.to={hidden_size: 64}", "hidden_size"),
        ("prune.to={hidden_size: 30}", "choose hidden_size=28 or 32"),
        ("prune.to={hiden_size: 24}", "found 'hiden_size'; expected a size of a Llama: .*; did you mean 'hidden_size'"),
        ("prune.to=hiden_size=24", "found 'hiden_size'; expected a size of a Llama: .*; did you mean 'hidden_size'"),
        ("heal.lora_rank=25", "lora_rank: found 25; expected at most 24"),
        ("model=absent/at/all", "neither a local folder nor a Hub id"),
        ("heal.device=warp", "device: found 'warp'"),
        ("heal.mixture={reference: absent.json}", r"reference absent\.json: found No such file"),
        ("heal.teacher={share: 0.5, model: ./absent}", r"model \./absent: found nothing at this path"),
        ("heal={phases: [{steps: 2}, {steps: 2, data: absent}]}", r"absent/manifest\.json: found no such file"),
    ],
)
def test_what_can_be_told_beforehand_is_told_before_anything_is_written(tmp_path, recipe_file, setting, message):
    with pytest.raises(UserError, match=message):
        run(load_recipe(recipe_file, [f"out={tmp_path / 'run'}", setting]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("heal.mixture={weights: {cod: 1}}", "'cod'"),
        ("heal.mixture={reference: {code: 1}, schedule: dynamic}", "domain 'prose': found no loss"),
        ("heal.repeats={cod: 1}", "repeats: found 'cod'"),
        ("heal.seq_len=100000", "100000|100001"),
        ("heal.batch_tokens=null", None),
    ],
)
def test_a_mistake_in_healing_shows_before_pruning(tmp_path, recipe_file, store_folder, monkeypatch, setting, message):
    """What is wrong only with the data at hand; where nothing is, pruning comes."""
    monkeypatch.setattr("shearling.run.prune", lambda *args, **options: pytest.fail("pruning"))
    settings = [f"data={store_folder}", f"out={tmp_path / 'run'}", "heal.steps=2", "heal.tokens=null", setting]
    with pytest.raises(UserError if message else pytest.fail.Exception, match=message or "pruning"):
        run(load_recipe(recipe_file, settings))


def test_what_a_cut_will_be_like_is_what_it_is(ran, folder, model_folder):
    cut = Source.open(str(folder / "run" / "prune"))
    foreseen = Source.open(str(model_folder)).shaped(cut.shape)
    assert foreseen.config == cut.config
    assert (foreseen.parameters, foreseen.shape) == (cut.parameters, cut.shape)


def test_a_run_takes_no_folder_with_something_else_in_it(tmp_path, recipe_file):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="found something that isn't a run; expected nothing"):
        run(load_recipe(recipe_file, [f"out={tmp_path / 'run'}"]))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("more", "settings", "message"),
    [
        ("heall: {}", [], "heall: found an unknown key; expected a known one; did you mean 'heal'?"),
        ("heal: {token: 1M}", [], "heal.token: found an unknown key; expected a known one; did you mean 'tokens'?"),
        ("", ["prune.stps=3"], "prune.stps: found an unknown key; expected a known one; did you mean 'steps'?"),
        ("", ["prune.masks.relaxtion=x"], "prune.masks.relaxtion: found an unknown key"),
        ("", ["prune.masks.relaxtion=x"], "did you mean 'relaxation'?"),
        ("", ["data={input: [a]}"], "data.input: found an unknown key; expected a known one; did you mean 'inputs'?"),
        ("", ["data={input: [a]}"], "data.inputs: found nothing; expected a value; add inputs"),
        ("", ["data={inputs: a}"], "data.inputs: found 'a'; expected a valid list; change inputs"),
        ("", ["data=3"], "data: found 3; expected a token store's folder, or a section with inputs"),
        ("heal: {tokens: lots}", [], "heal.tokens: found 'lots'; expected a count of tokens, as 200K, 1.5M or 50B"),
        ("heal: {tokens: 0}", [], "heal.tokens: found 0; expected greater than 0; change tokens"),
        ("heal: {lr: fast}", [], "heal.lr: found 'fast'; expected a valid number"),
        ("heal: {lr: .inf}", [], "heal.lr: found inf; expected a finite number"),
        ("heal: {dtype: int8}", [], "heal.dtype: found 'int8'; expected 'float32', 'bfloat16' or 'float16'"),
        ("heal: {kernels: ligre}", [], "heal.kernels: found 'ligre'; expected 'torch' or 'liger'; did you mean"),
        (
            "heal: {sinks: [wandb, tensorbord]}",
            [],
            "heal.sinks (--sink): found 'tensorbord'; expected 'tensorboard' or 'wandb'; did you mean 'tensorboard'?",
        ),
        ("heal: {sinks: [a, b]}", [], "heal.sinks (--sink): found 'b'; expected 'tensorboard' or 'wandb'; change"),
        ("", ["data={inputs: [3]}"], "data.inputs.0: found 3; expected a valid string; change inputs"),
        ("heal: {tokens: 1M, steps: 3}", [], "tokens and steps: found both, 1000000 tokens and 3 steps"),
        ("heal: 3", [], "heal: found 3; expected a valid dictionary"),
        ("3: 4", [], "3: found 3; expected Keys should be strings"),
        ("", ["prune.to=null"], "target: found None; expected sizes of the model"),
        ("", ["heal"], "--set: found 'heal'; expected key=value; write as heal.tokens=2M"),
        ("", ["model.x=1"], "--set: found model.x, where model is 'm'; expected a section"),
        ("", ["heal.tokens=[1"], "--set heal.tokens: found '[1'; expected a YAML value"),
    ],
)
def test_mistakes_name_their_path(write, more, settings, message):
    assert message in refusal(write(more), *settings)


def test_all_mistakes_are_told_at_once(write):
    told = refusal(write("heal: {token: 1M, lr: -1}\nextra: 1"), "prune.masks.start=cold")
    assert len(told.splitlines()) == 4
    for path in ("heal.token:", "heal.lr:", "extra:", "prune.masks.start:"):
        assert path in told


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("model: m\nprune: {to: hidden_size=24}\nmodel: n\n", ["'model' comes twice", "line 1"]),
        ("model: m\nheal:\n  lr: 1\n  lr: 2\n", ["'lr' comes twice", "line 3"]),
        ("model: [m\n", ["line 2", "expected YAML"]),
        ("- model\n", ["found list; expected keys and values"]),
        ("", ["found NoneType; expected keys and values"]),
        ("model: \xff\n", ["expected YAML"]),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path, text, messages):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text.encode("latin-1"))
    told = refusal(path)
    for message in (f"recipe {path}", *messages):
        assert message in told


def test_a_recipe_that_is_not_there(tmp_path):
    assert "found No such file or directory; expected a YAML file" in refusal(tmp_path / "absent.yaml")


def test_a_section_that_was_left_out_can_be_set(write):
    assert load_recipe(write(), ["heal.tokens=2M"]).heal.tokens == 2_000_000
    assert load_recipe(write("heal:"), ["heal.tokens=2M"]).heal.tokens == 2_000_000
    assert load_recipe(write("heal: {tokens: 1M}"), ["heal=null"]).heal is None
