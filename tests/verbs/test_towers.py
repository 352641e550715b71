"""A text model inside a whole, through the command line: sheared, healed and evaluated; the rest is carried."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from shearling import cli
from shearling.arch import towered
from shearling.conformance.towers import random_whole, wholes
from shearling.recipe import Data, validated
from shearling.verbs.data import make_store
from shearling.verbs.inspect import inspect
from shearling.verbs.prune import prune
from shearling.verbs.source import Source

TYPES = tuple(towered())
TARGET = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
EXPERTS = {**TARGET, "num_experts": 3}
TO = {"qwen3_5_moe": EXPERTS}
TRAINING = ["--steps", 3, "--seq-len", 16, "--batch-tokens", 64, "--device", "cpu"]
PROCESSORS = {"preprocessor_config.json": b'{"size": 28}\n', "processor_config.json": b"{}"}


@pytest.fixture(scope="module")
def whole_folders(tmp_path_factory, model_folder):
    """A small whole of each type, in the tokenizer's words, with a processor's files and heads that nothing reads."""
    folder = tmp_path_factory.mktemp("wholes")
    vocab = json.loads((model_folder / "config.json").read_text())["vocab_size"]
    for model_type in TYPES:
        family = towered()[model_type]
        config = next(iter(wholes(family).values()))
        config["text_config"] = {**config["text_config"], "vocab_size": vocab}
        random_whole(family, config, folder / model_type)
        for path in model_folder.iterdir():
            if path.name not in ("config.json", "model.safetensors"):
                shutil.copy(path, folder / model_type)
        for name, content in PROCESSORS.items():
            (folder / model_type / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def stores(tmp_path_factory, whole_folders, corpus) -> Path:
    """The corpus in each whole's tokens: a folder's tokenizer depends on its model type."""
    folder = tmp_path_factory.mktemp("stores")
    for model_type in TYPES:
        asked = validated(Data, {"inputs": [str(corpus)], "held_out": 0.2})
        make_store(asked, tokenizer=str(whole_folders / model_type), out=str(folder / model_type))
    return folder


def run(capsys, monkeypatch, *words: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one command."""
    monkeypatch.setattr(sys, "argv", ["shearling", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    told = capsys.readouterr()
    return int(ended.value.code or 0), told.out, told.err


def beside(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a whole that are neither its text model's nor its connector's."""
    return {
        name: load_file(folder / "model.safetensors")[name] for name in Source.open(str(folder)).parts.carried.names
    }


@pytest.mark.parametrize("model_type", TYPES)
def test_from_inspect_to_eval(model_type, whole_folders, stores, tmp_path, capsys, monkeypatch):
    source, cut, healed = whole_folders / model_type, tmp_path / "cut", tmp_path / "healed"

    def shearling(*words: object) -> dict:
        code, out, err = run(capsys, monkeypatch, *words, "--json")
        assert code == 0, err
        assert "UNEXPECTED" not in err
        return json.loads(out)

    found = shearling("inspect", source)
    assert found["family"] == towered()[model_type].name
    assert {"hidden", "layer", "kv_head"} <= set(found["cut_along"])
    counts = found["beside"]["parameters"]
    every = sum(weight.numel() for weight in load_file(source / "model.safetensors").values())
    assert found["parameters"] + counts["connectors"] + counts["carried"] == every

    target = TO.get(model_type, TARGET)
    to = ",".join(f"{key}={size}" for key, size in target.items())
    data = ["--data", stores / model_type]
    pruned = shearling("prune", source, "--to", to, "--method", "activation", *data, "--out", cut, *TRAINING)
    assert any("sheared is the text model" in note for note in pruned["notes"])
    result = shearling("heal", cut, *data, "--out", healed, *TRAINING)
    assert result["parameters"] == pruned["parameters"] < found["parameters"]
    for folder in (source, cut, healed):
        losses = shearling("eval", folder, *data, "--seq-len", 16, "--windows", 2)["losses"]
        assert losses.keys() == {"code", "prose", "sums"}

    for folder in (cut, healed):
        settings = json.loads((folder / "config.json").read_text())
        text, vision = settings["text_config"], settings["vision_config"]
        assert settings["model_type"] == model_type
        assert {key: text[key] for key in target} == target
        assert vision.get("out_hidden_size", 24) == 24
        carried, found = beside(source), beside(folder)
        assert found.keys() == carried.keys() != set()
        assert all(torch.equal(weight, found[name]) for name, weight in carried.items())
        assert {name: (folder / name).read_bytes() for name in PROCESSORS} == PROCESSORS
    before, after = (load_file(folder / "model.safetensors") for folder in (cut, healed))
    assert any(not torch.equal(weight, after[name]) for name, weight in before.items())
    connectors = [row.at_disk(None) for row in towered()[model_type].connectors]
    assert all(torch.equal(before[name], after[name]) for name in connectors)  # no text goes through them


def test_inspect_of_a_config_as_they_are_published(tmp_path):
    """Gemma 3 4B's, whose text part leaves out what its class fills in."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34}
    config = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 1152, "patch_size": 14}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = inspect(str(tmp_path))
    whole = AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(whole)
    assert found["parameters"] == sum(p.numel() for p in model.model.language_model.parameters()) == 3_880_263_168
    assert found["beside"]["parameters"] == {"connectors": 1152 * 2560, "carried": None}
    assert set(found["cut_along"]) == {"hidden", "layer", "kv_head", "group", "head_dim", "intermediate"}


def test_the_results_load_in_a_fresh_process(whole_folders, stores, tmp_path, capsys, monkeypatch):
    """By masks, in bfloat16: as transformers' whole, nothing missing, nothing left over."""
    folders = []
    for model_type in TYPES:
        folders.append(str(tmp_path / model_type))
        words = ["prune", whole_folders / model_type, "--to", "hidden_size=24,num_hidden_layers=2", "--method", "masks"]
        words += ["--data", stores / model_type, "--out", folders[-1], *TRAINING, "--dtype", "bfloat16"]
        code, _, err = run(capsys, monkeypatch, *words, "--json")
        assert code == 0, err
    script = """
import sys, torch
from transformers import AutoConfig, AutoModelForImageTextToText
for folder in sys.argv[1:]:
    # Its other code for experts multiplies by rows of 16 bytes alone.
    options = {"output_loading_info": True, "experts_implementation": "eager"}
    model, report = AutoModelForImageTextToText.from_pretrained(folder, **options)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model(torch.arange(9)[None]).logits.isfinite().all()
"""
    subprocess.run([sys.executable, "-c", script, *folders], check=True)


def damaged(folder: Path, model_type: str, whole_folders: Path) -> Path:
    return Path(shutil.copytree(whole_folders / model_type, folder / "damaged"))


def edit(folder: Path, part: str | None = None, **keys: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (config if part is None else config[part]).update(keys)
    (folder / "config.json").write_text(json.dumps(config))


def without(folder: Path, start: str) -> None:
    weights = load_file(folder / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if not name.startswith(start)}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def a_part_unknown(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors") | {"model.audio_tower.weight": torch.zeros(2)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("model_type", "damage", "told"),
    [
        ("gemma3", lambda f: edit(f, text_config=None), "config.json: text_config: found None; expected the config of"),
        (
            "gemma3",
            lambda f: edit(f, "text_config", model_type="llama"),
            "config.json: text_config.model_type: found 'llama'; expected gemma3_text",
        ),
        (
            "gemma3",
            lambda f: edit(f, "text_config", final_logit_softcapping=30.0),
            "config.json: text_config.final_logit_softcapping: found 30.0; expected nothing: transformers' whole",
        ),
        (
            "qwen3_5",
            lambda f: edit(f, "vision_config", deepstack_visual_indexes=[1, 2]),
            "config.json: vision_config.deepstack_visual_indexes: found [1, 2]; expected nothing",
        ),
        (
            "qwen3_5",
            lambda f: edit(f, "vision_config", out_hidden_size=20),
            "config.json: vision_config.out_hidden_size: found 20; expected 36, the text model's hidden_size",
        ),
        ("qwen3_5", lambda f: without(f, "model.visual."), "found no tensor model.visual.*; expected all parts of a"),
        (
            "gemma3",
            lambda f: without(f, "multi_modal_projector.mm_input"),
            "1 tensors not there: multi_modal_projector",
        ),
        ("gemma3", a_part_unknown, "found 1 tensors unknown: model.audio_tower.weight"),
        (
            "gemma3",
            lambda f: edit(f, "vision_config", hidden_size=16),
            "mm_input_projection_weight': found shape [24, 36]; expected [16, 36], by config.json",
        ),
    ],
)
def test_a_whole_that_is_not_sound_ends_with_2(
    model_type, damage, told, whole_folders, stores, tmp_path, capsys, monkeypatch
):
    folder = damaged(tmp_path, model_type, whole_folders)
    damage(folder)
    for words in (
        ["inspect", folder],
        ["prune", folder, "--to", "hidden_size=24", "--data", stores / model_type, "--out", tmp_path / "out"],
    ):
        code, out, err = run(capsys, monkeypatch, *words)
        assert code == 2
        assert told in err, err
        assert out == ""
    assert not list(tmp_path.glob("out*"))


def test_experts_that_lie_in_stacks_stay_so(whole_folders, stores, tmp_path, ask_prune):
    """transformers writes experts apart, and reads them as stacks too."""
    folder = damaged(tmp_path, "qwen3_5_moe", whole_folders)
    source, inside = Source.open(str(folder)), towered()["qwen3_5_moe"].inside
    assert inside is not None
    weights = load_file(folder / "model.safetensors")
    stacks = {
        inside.on_module(row.at(layer)): source.read(row, layer)
        for row, layer in source.family.named(source.config)
        if row.stacked
    }
    apart = {name: weight for name, weight in weights.items() if ".mlp.experts." not in name}
    assert len(apart) < len(weights)
    save_file(apart | stacks, folder / "model.safetensors", metadata={"format": "pt"})
    asked = ask_prune(to={"num_experts": 3, "num_hidden_layers": 2}, method="activation", seq_len=16, steps=1)
    losses = []
    for number, model in enumerate((whole_folders / "qwen3_5_moe", folder)):
        out = tmp_path / str(number)
        prune(str(model), data=str(stores / "qwen3_5_moe"), out=str(out), asked=asked)
        losses.append(json.loads((out / "shearling.json").read_text())["pruned"]["losses"])
    assert losses[0] == losses[1]
    written = load_file(tmp_path / "1" / "model.safetensors")
    assert {name for name in written if ".mlp.experts." in name} == {
        f"model.language_model.layers.{layer}.mlp.experts.{name}"
        for layer in range(2)
        for name in ("gate_up_proj", "down_proj")
    }
    loaded: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "1", output_loading_info=True)
    assert not any(loaded[1][key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_heads_that_transformers_passes_over_are_left_out_and_said_so(whole_folders, stores, tmp_path, ask_prune):
    folder = damaged(tmp_path, "qwen3_5", whole_folders)
    weights = load_file(folder / "model.safetensors") | {"mtp.fc.weight": torch.zeros(36, 72)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    asked = ask_prune(to={"num_hidden_layers": 3}, method="activation", seq_len=16, steps=1)
    found = prune(str(folder), data=str(stores / "qwen3_5"), out=str(tmp_path / "out"), asked=asked)
    assert any("left out" in note and "mtp.fc.weight" in note for note in found.notes)
    assert weights.keys() - load_file(tmp_path / "out" / "model.safetensors").keys() >= {"mtp.fc.weight"}


def test_a_drafted_table_is_not_for_what_has_one(whole_folders, capsys, monkeypatch):
    code, _, err = run(capsys, monkeypatch, "inspect", whole_folders / "gemma3", "--draft")
    assert code == 2
    assert "gemma3, which Gemma 3 with vision is for" in err
