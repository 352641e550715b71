"""data -> prune -> heal -> eval through the verbs: what each leaves behind, and that it is what was asked."""

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shearling.arch import family_of
from shearling.axes.shape import shape_of
from shearling.data.store import Store
from shearling.recipe import Data, validated
from shearling.record import read
from shearling.report.run_page import write_run_page
from shearling.verbs.data import make_store
from shearling.verbs.evaluate import evaluate
from shearling.verbs.heal import heal
from shearling.verbs.prune import prune
from shearling.weights.folder import fingerprint

METHODS = ("masks", "activation")
CARRIED = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "LICENSE")


@pytest.fixture(scope="module")
def pruned(tmp_path_factory, model_folder, store_folder, ask_prune):
    """One cut for each method."""
    out = tmp_path_factory.mktemp("pruned")
    return {
        method: prune(str(model_folder), data=str(store_folder), out=str(out / method), asked=ask_prune(method=method))
        for method in METHODS
    }


@pytest.fixture(scope="module")
def healed(tmp_path_factory, pruned, store_folder, ask_heal):
    """The cut by masks, healed."""
    out = tmp_path_factory.mktemp("healed") / "healed"
    return heal(str(pruned["masks"].out), data=str(store_folder), out=str(out), asked=ask_heal())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def losses(folder: Path) -> list[tuple]:
    events = read(folder / "record.jsonl")
    return [(e["event"], e["step"], e.get("loss"), e.get("losses")) for e in events if "loss" in e or "losses" in e]


def in_dtype(folder: Path, dtype: torch.dtype) -> Path:
    """The same model with its weights in another dtype, which its config names too."""
    cast = {name: weight.to(dtype) for name, weight in weights(folder).items()}
    save_file(cast, folder / "model.safetensors", metadata={"format": "pt"})
    settings = {**config(folder), "dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def test_masks_alone_leave_the_weights_as_they_are(tmp_path, model_folder, store_folder, ask_prune):
    """What no mask is folded into are rows of the source's, to the bit; and no checkpoint holds weights."""
    out = tmp_path / "cut"
    asked = ask_prune(masks_only=True, steps=6, save_every=2, keep_every=6)
    cut = prune(str(model_folder), data=str(store_folder), out=str(out), asked=asked)
    kept = json.loads((out / "shearling.json").read_text())["kept"]
    layer, hidden = kept["layer"][0]["kept"][0], kept["hidden"][0]["kept"]
    (neurons,) = (torch.tensor(choice["kept"]) for choice in kept["intermediate"] if choice["within"] == [layer])
    before, after = (load_file(folder / "model.safetensors") for folder in (model_folder, out))
    gate = "model.layers.{}.mlp.gate_proj.weight".format
    assert torch.equal(after[gate(0)], before[gate(layer)][neurons][:, hidden])
    saved = load_file(out / "checkpoints" / "step-6" / "rank-0" / "model.safetensors")
    assert {name.partition(".")[0] for name in saved} == {"gates", "scores", "optimizer", "state"}
    assert max(cut.losses.values()) < 7
    memory = read(out / "record.jsonl")[0]["memory"]
    assert memory["gradients_bytes"] == memory["optimizer_bytes"] == 0
    assert memory["weights_bytes"] == 2 * cut.source_parameters


@pytest.mark.parametrize("method", METHODS)
def test_heads_are_cut_too(tmp_path, model_folder, store_folder, ask_prune, method):
    out = tmp_path / "cut"
    cut = prune(
        str(model_folder), data=str(store_folder), out=str(out), asked=ask_prune(method=method, to={"head_dim": 4})
    )
    origin, settings, source = json.loads((out / "shearling.json").read_text()), config(out), config(model_folder)
    kept, measured = origin["kept"], {key: origin["measured"][key] for key in ("seq_len", "windows")}
    assert settings["head_dim"] == 4
    assert len(kept["head_dim"]) == source["num_hidden_layers"] * source["num_key_value_heads"]
    assert [len(choice["kept"]) for choice in kept["rotary"]] == [4]
    assert evaluate(str(out), data=str(store_folder), **measured).losses == pytest.approx(cut.losses, rel=1e-5)
    page = write_run_page(tmp_path / "page.html", title="heads", folders={"prune": out}).read_text()
    assert (method == "masks") is ("entries of q and k in each head" in page)


@pytest.mark.parametrize("method", METHODS)
def test_the_cut_has_exactly_the_shape_asked_for(pruned, target, method):
    out = pruned[method].out
    settings = config(out)
    assert {key: settings[key] for key in target} == target
    family = family_of(settings)
    shape = shape_of(family, settings)
    assert shape["head_dim"] == 8  # the source's, and not hidden_size / num_attention_heads any more
    expected = {
        row.at_disk(layer): tuple(dim.size(shape.axes) for dim in row.dims) for row, layer in family.named(settings)
    }
    found = weights(out)
    assert {name: tuple(weight.shape) for name, weight in found.items()} == expected
    assert sum(weight.numel() for weight in found.values()) == pruned[method].parameters


@pytest.mark.parametrize("method", METHODS)
def test_what_belongs_to_the_model_is_carried_byte_for_byte(pruned, healed, model_folder, method):
    for folder in (pruned[method].out, healed.out):
        for name in CARRIED:
            assert (folder / name).read_bytes() == (model_folder / name).read_bytes(), name


def test_a_result_is_one_model_folder(pruned, healed):
    for folder in (*(result.out for result in pruned.values()), healed.out):
        for name in ("config.json", "model.safetensors"):
            assert list(folder.rglob(name)) == [folder / name]
        siblings = {path.name for path in folder.parent.iterdir()}
        assert siblings == {path.out.name for path in (*pruned.values(), healed) if path.out.parent == folder.parent}


def test_the_results_load_in_a_fresh_process(pruned, healed, store_folder):
    script = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[1:]:
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    ids = AutoTokenizer.from_pretrained(folder)("the sheep was shorn", return_tensors="pt").input_ids
    assert model(ids).logits.isfinite().all()
    assert model.generation_config.max_new_tokens == 7
"""
    folders = [str(result.out) for result in (*pruned.values(), healed)]
    subprocess.run([sys.executable, "-c", script, *folders], check=True, cwd=store_folder)


@pytest.mark.parametrize("method", METHODS)
def test_shearling_json_says_where_a_model_comes_from(pruned, model_folder, target, method):
    result = pruned[method]
    origin = json.loads((result.out / "shearling.json").read_text())
    assert origin["format"] == "shearling-model"
    assert origin["source"]["name"] == str(model_folder)
    assert origin["source"]["fingerprint"] == fingerprint(model_folder)
    assert origin["source"]["shape"]["num_hidden_layers"] == 3
    assert {key: origin["shape"][key] for key in target} == target
    assert origin["method"] == method
    kept = {
        axis: {tuple(place["within"]): place["kept"] for place in places} for axis, places in origin["kept"].items()
    }
    assert set(kept) == {"hidden", "layer", "group", "intermediate"}  # both kv heads stay
    assert len(kept["hidden"][()]) == 24
    layers = kept["layer"][()]
    assert len(layers) == 2
    assert {place[0] for place in kept["intermediate"]} == set(layers)
    assert all(entries == sorted(set(entries)) for places in kept.values() for entries in places.values())
    assert origin["pruned"]["losses"] == dict(result.losses)


def test_the_kept_entries_are_those_of_the_source(pruned, model_folder):
    """Activation folds nothing into the embedding: its columns are the source's."""
    out = pruned["activation"].out
    channels = json.loads((out / "shearling.json").read_text())["kept"]["hidden"][0]["kept"]
    name = "model.embed_tokens.weight"
    assert torch.equal(weights(out)[name], weights(model_folder)[name][:, channels])


def test_a_finished_stage_gives_its_figures_again(pruned, healed, model_folder, store_folder, ask_prune, ask_heal):
    for method, first in pruned.items():
        before = digest(first.out / "model.safetensors"), (first.out / "config.json").stat().st_mtime_ns
        again = prune(str(model_folder), data=str(store_folder), out=str(first.out), asked=ask_prune(method=method))
        assert again == replace(first, done_before=True)
        assert (digest(first.out / "model.safetensors"), (first.out / "config.json").stat().st_mtime_ns) == before
    again = heal(str(pruned["masks"].out), data=str(store_folder), out=str(healed.out), asked=ask_heal())
    assert again == replace(healed, done_before=True)


def test_data_is_not_made_twice(store_folder, corpus, model_folder):
    asked = validated(Data, {"inputs": [str(corpus)], "held_out": 0.2})
    store, before = make_store(asked, tokenizer=str(model_folder), out=str(store_folder))
    assert before
    assert store.domains == ("code", "prose", "sums")
    assert store.digest == Store.open(store_folder).digest


def test_healing_starts_from_the_loss_that_the_cut_ended_with(pruned, healed):
    assert healed.losses_before == pytest.approx(dict(pruned["masks"].losses), rel=1e-6)
    first = next(event for event in read(healed.out / "record.jsonl") if event["event"] == "held_out")
    assert (first["step"], first["losses"]) == (0, healed.losses_before)


def test_masked_and_cut_model_have_one_loss(pruned):
    """What the masks had learned is what was written."""
    held_out = {e["of"]: e["losses"] for e in read(pruned["masks"].out / "record.jsonl") if "of" in e}
    assert held_out["cut"] == pytest.approx(held_out["masked"], rel=1e-5)


def test_a_healed_model_says_both_stages(pruned, healed, store_folder):
    cut, origin = (json.loads((r.out / "shearling.json").read_text()) for r in (pruned["masks"], healed))
    assert {key: origin[key] for key in cut} == cut
    assert origin["healed"]["losses"] == dict(healed.losses)
    assert healed.tokens == 4 * 128
    found = evaluate(str(healed.out), data=str(store_folder), seq_len=32, windows=8, device="cpu")
    assert found.losses == pytest.approx(dict(healed.losses), rel=1e-6)
    errors = {domain: figures.standard_error for domain, figures in found.figures.items()}
    assert errors == pytest.approx(dict(healed.standard_errors), rel=1e-5)
    assert found.parameters == pruned["masks"].parameters


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_bytes(pruned, tmp_path, model_folder, store_folder, ask_prune, method):
    first = pruned[method].out
    asked = ask_prune(method=method)
    again = prune(str(model_folder), data=str(store_folder), out=str(tmp_path / "again"), asked=asked).out
    assert digest(again / "model.safetensors") == digest(first / "model.safetensors")
    assert losses(again) == losses(first)


def test_another_seed_gives_others(pruned, tmp_path, model_folder, store_folder, ask_prune):
    asked = ask_prune(method="masks", seed=1)
    other = prune(str(model_folder), data=str(store_folder), out=str(tmp_path / "other"), asked=asked).out
    assert losses(other) != losses(pruned["masks"].out)


def test_healing_twice_gives_the_same_bytes(pruned, healed, tmp_path, store_folder, ask_heal):
    again = heal(str(pruned["masks"].out), data=str(store_folder), out=str(tmp_path / "again"), asked=ask_heal()).out
    assert digest(again / "model.safetensors") == digest(healed.out / "model.safetensors")
    assert losses(again) == losses(healed.out)


@pytest.mark.parametrize(
    ("method", "masks"), [("activation", {}), ("masks", {}), ("masks", {"relaxation": "hard_concrete"})]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_to_its_own_shape_every_tensor_comes_back(copied, tmp_path, store_folder, ask_prune, method, masks, dtype):
    source = in_dtype(copied(), dtype)
    asked = ask_prune(to="hidden_size=32", method=method, masks=masks)
    out = prune(str(source), data=str(store_folder), out=str(tmp_path / "out"), asked=asked).out
    before, after = weights(source), weights(out)
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert weight.dtype == after[name].dtype == dtype
        assert torch.equal(weight, after[name]), name
    assert config(out) == config(source)


@pytest.mark.parametrize("method", METHODS)
def test_a_bf16_source_stays_in_bf16(copied, tmp_path, store_folder, ask_prune, ask_heal, method):
    source = in_dtype(copied(), torch.bfloat16)
    cut = prune(str(source), data=str(store_folder), out=str(tmp_path / "cut"), asked=ask_prune(method=method)).out
    healed = heal(str(cut), data=str(store_folder), out=str(tmp_path / "healed"), asked=ask_heal()).out
    for folder in (cut, healed):
        assert {weight.dtype for weight in weights(folder).values()} == {torch.bfloat16}
        assert config(folder)["dtype"] == "bfloat16"


def test_the_dtype_that_was_asked_for(tmp_path, model_folder, store_folder, ask_prune, ask_heal):
    asked = ask_prune(method="activation", dtype="bfloat16")
    cut = prune(str(model_folder), data=str(store_folder), out=str(tmp_path / "cut"), asked=asked).out
    healed = heal(str(cut), data=str(store_folder), out=str(tmp_path / "healed"), asked=ask_heal(dtype="float16")).out
    for folder, dtype in ((cut, "bfloat16"), (healed, "float16")):
        assert {weight.dtype for weight in weights(folder).values()} == {getattr(torch, dtype)}
        assert config(folder)["dtype"] == dtype


def test_a_small_budget_is_cut_by_scores_and_says_so(tmp_path, model_folder, store_folder, ask_prune):
    """Left alone, the method goes by the budget; four steps are too few for masks."""
    result = prune(str(model_folder), data=str(store_folder), out=str(tmp_path / "cut"), asked=ask_prune())
    assert json.loads((result.out / "shearling.json").read_text())["method"] == "activation"
    assert any(note.startswith("method activation: the budget is 4 steps") for note in result.notes)
