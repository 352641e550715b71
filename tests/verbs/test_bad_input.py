"""What the verbs refuse: found, expected, what to change, and nothing written."""

import errno
import gzip
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_experts import small_experts
from transformers import AutoTokenizer, BertConfig, GPT2Config, GPT2LMHeadModel, LlavaConfig, T5Config

from shearling.errors import UserError
from shearling.recipe import Data, Eval, Prune, validated
from shearling.verbs.data import add_documents, make_store
from shearling.verbs.evaluate import evaluate
from shearling.verbs.heal import heal
from shearling.verbs.inspect import inspect
from shearling.verbs.prune import open_target, prune
from shearling.verbs.source import Source, write_origin

VERBS = ("prune by masks", "prune by activation", "heal", "eval")
WEIGHT = "model.layers.1.mlp.up_proj.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def call(tmp_path, store_folder, ask_prune, ask_heal) -> Mapping[str, Callable]:
    """Each verb as a function of the model; options are of the recipe's section, `data` and `out` apart."""

    def paths(options: dict) -> dict[str, str]:
        return {"data": str(options.pop("data", store_folder)), "out": str(options.pop("out", tmp_path / "out"))}

    def prune_by(method: str, model: object, **options: object):
        return prune(str(model), **paths(options), asked=ask_prune(method=method, **options))

    def eval_(model: object, data: object = store_folder, **options: object):
        return evaluate(str(model), data=str(data), **validated(Eval, {"seq_len": 32, **options}).model_dump())

    return {
        "prune by masks": lambda model, **options: prune_by("masks", model, **options),
        "prune by activation": lambda model, **options: prune_by("activation", model, **options),
        "heal": lambda model, **options: heal(str(model), **paths(options), asked=ask_heal(**options)),
        "eval": eval_,
    }


@pytest.fixture
def refused(tmp_path):
    """Calls a function that has to raise a UserError with all of the `parts`, and to leave everything as it was."""

    def check(function: Callable[[], object], *parts: str) -> None:
        before = state(tmp_path)
        with pytest.raises(UserError) as raised:
            function()
        told = str(raised.value)
        for part in ("found ", "expected ", *parts):
            assert part in told, told
        assert state(tmp_path) == before

    return check


def state(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def edit(path: Path, **keys: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def spoil(folder: Path, value: float, *, entries: int = 1) -> None:
    weights = load_file(folder / "model.safetensors")
    weights[WEIGHT].view(-1)[:entries] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def shard(folder: Path) -> dict[str, str]:
    """The weights in two files and the index of them, which is returned too."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    halves = {"model-00001-of-00002.safetensors": names[:10], "model-00002-of-00002.safetensors": names[10:]}
    for file, half in halves.items():
        save_file({name: weights[name] for name in half}, folder / file, metadata={"format": "pt"})
    shard_of = {name: file for file, half in halves.items() for name in half}
    (folder / INDEX).write_text(json.dumps({"weight_map": shard_of}))
    return shard_of


def an_encoder_decoder(folder: Path) -> None:
    (folder / "config.json").write_text(T5Config().to_json_string())


def an_unknown_family(folder: Path) -> None:
    (folder / "config.json").write_text(BertConfig().to_json_string())


def a_vision_language_model(folder: Path) -> None:
    (folder / "config.json").write_text(LlavaConfig().to_json_string())


def quantised(folder: Path) -> None:
    edit(folder / "config.json", quantization_config={"quant_method": "awq", "bits": 4})


def an_adapter(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")


def code_in_config(folder: Path) -> None:
    edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})


def code_in_tokenizer_config(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]})


def code_in_generation_config(folder: Path) -> None:
    edit(folder / "generation_config.json", nested=[{"auto_map": {}}])


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def nan(folder: Path) -> None:
    spoil(folder, float("nan"), entries=2)


def infinity(folder: Path) -> None:
    spoil(folder, float("-inf"))


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def a_truncated_shard(folder: Path) -> None:
    shard(folder)
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def a_missing_shard(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def absent_tensors(folder: Path) -> None:
    shard_of = shard(folder)
    edit(folder / INDEX, weight_map={**shard_of, "model.ghost.weight": "model-00001-of-00002.safetensors"})


def another_dtype(folder: Path) -> None:
    edit(folder / "config.json", dtype="bfloat16")


def a_missing_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights[WEIGHT]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def another_size(folder: Path) -> None:
    edit(folder / "config.json", intermediate_size=40)


def more_layers(folder: Path) -> None:
    edit(folder / "config.json", num_hidden_layers=4)


def other_biases(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights |= {name.replace(".weight", ".bias"): w[:, 0].clone() for name, w in weights.items() if "_proj" in name}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def a_head_of_its_own(folder: Path) -> None:
    edit(folder / "config.json", tie_word_embeddings=True)


def a_rope_of_one_word(folder: Path) -> None:
    edit(folder / "config.json", rope_scaling="linear")


def an_epsilon_in_quotes(folder: Path) -> None:
    edit(folder / "config.json", rms_norm_eps="1e-6")


def a_list_in_shearling_json(folder: Path) -> None:
    (folder / "shearling.json").write_text("[]")


def too_many_ids(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<{number}>" for number in range(9)])
    tokenizer.save_pretrained(folder)


def an_id_beyond_the_rows(folder: Path) -> None:
    """Though there are fewer ids than rows."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab[max(vocab, key=vocab.get)] = 999
    path.write_text(json.dumps(tokenizer))


def another_tokenizer(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (an_encoder_decoder, ["is_encoder_decoder", "decoder-only", "choose another model"]),
        (an_unknown_family, ["model_type: found 'bert'; expected one of gemma", "inspect MODEL --draft"]),
        (
            a_vision_language_model,
            ["found 'llava', a model with vision_config beside its text", "as llama, and shear it"],
        ),
        (quantised, ["field quantization_config: found weights quantised by AWQ", "its name without -GPTQ, -AWQ"]),
        (an_adapter, ["found an adapter (adapter_config.json)", "merge the adapter into its model first"]),
        (code_in_config, ["config.json, field auto_map", "never runs", "choose another model"]),
        (code_in_tokenizer_config, ["tokenizer_config.json, field auto_map", "never runs"]),
        (code_in_generation_config, ["generation_config.json, field nested.0.auto_map", "never runs"]),
        (only_pickles, ["pickle-only weights (pytorch_model.bin)", "model.safetensors", "convert them"]),
        (no_weights, ["found no weights", "download the weights"]),
        (nan, [f"tensor '{WEIGHT}': found 2 NaN and 0 Inf among 1536 values", "get the source model again"]),
        (infinity, [f"tensor '{WEIGHT}': found 0 NaN and 1 Inf among 1536 values", "get the source model again"]),
        (truncated, ["model.safetensors", "bytes", "again"]),
        (a_truncated_shard, ["model-00002-of-00002.safetensors", "bytes", "again"]),
        (a_missing_shard, ["found no file model-00002-of-00002.safetensors", "download the missing shards"]),
        (absent_tensors, [INDEX, "no shard holds", "model.ghost.weight", "from one revision"]),
        (another_dtype, ["field dtype: found bfloat16 in config.json and float32 in the weights", "pass --dtype"]),
        (a_missing_tensor, [f"1 tensors not there: {WEIGHT}", "that belong together"]),
        (another_size, ["found shape [48, 32]; expected [40, 32], by config.json", "that belong together"]),
        (more_layers, ["found 9 tensors not there: model.layers.3.", "the 39 tensors of a Llama of this config"]),
        (other_biases, ["found 21 tensors unknown: model.layers.0.", "get config and weights that belong together"]),
        (
            a_head_of_its_own,
            ["'lm_head.weight': found other values than 'model.embed_tokens", "set tie_word_embeddings to false"],
        ),
        (too_many_ids, ["tokenizer of", "found ids up to", "expected ids below", "the rows of the embedding"]),
        (
            an_id_beyond_the_rows,
            ["tokenizer of", "found ids up to 999; expected ids below", "the rows of the embedding"],
        ),
        (a_rope_of_one_word, ["config.json", "'linear'", "mend config.json"]),
        (an_epsilon_in_quotes, ["config.json of ", "Field 'rms_norm_eps' expected float, got str", "mend config.json"]),
        (a_list_in_shearling_json, ["shearling.json: found list; expected keys and values"]),
        (another_tokenizer, ["token store", "tokens made with the tokenizer 'tiny'", "prepare the data again"]),
    ],
)
def test_a_model_that_is_not_sound(call, refused, copied, verb, damage, parts):
    folder = copied()
    damage(folder)
    refused(lambda: call[verb](folder), *parts)


@pytest.mark.parametrize("verb", VERBS)
def test_a_head_that_is_the_table_may_lie_in_the_files(call, copied, verb):
    folder = copied(tie_word_embeddings=True)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert call[verb](folder).losses


@pytest.mark.parametrize("verb", VERBS)
def test_a_dtype_that_was_asked_for_settles_the_quarrel(call, copied, verb):
    result = call[verb](copied(dtype="bfloat16"), dtype="float32")
    if verb != "eval":
        assert {w.dtype for w in load_file(result.out / "model.safetensors").values()} == {torch.float32}
        assert json.loads((result.out / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (an_encoder_decoder, ["is_encoder_decoder"]),
        (an_unknown_family, ["model_type: found 'bert'"]),
        (a_vision_language_model, ["found 'llava', a model with vision_config beside its text"]),
        (quantised, ["weights quantised by AWQ"]),
        (code_in_config, ["config.json, field auto_map"]),
        (code_in_generation_config, ["generation_config.json, field nested.0.auto_map"]),
    ],
)
def test_inspect_refuses_what_can_not_be_sheared(refused, copied, damage, parts):
    folder = copied()
    damage(folder)
    refused(lambda: inspect(str(folder)), *parts)


@pytest.mark.parametrize("method", ["masks", "activation"])
@pytest.mark.parametrize(
    ("to", "parts"),
    [
        ("hiden_size=24", ["found 'hiden_size'; expected a size of a Llama", "did you mean 'hidden_size'?"]),
        ("hidden_size=40", ["target hidden_size: found 40; expected 1 to 32, the source's", "in that range"]),
        ("num_hidden_layers=4", ["target num_hidden_layers: found 4; expected 1 to 3"]),
        ("intermediate_size=0", ["target intermediate_size: found 0; expected 1 to 48"]),
        ("intermediate_size=-8", ["target intermediate_size: found -8; expected 1 to 48"]),
        ("hidden_size=30", ["found 30 with num_attention_heads=4", "a multiple", "choose hidden_size=28 or 32"]),
        ("num_attention_heads=3", ["found 3 on num_key_value_heads=2", "num_attention_heads=2 or 4"]),
        ("num_key_value_heads=1", ["found 4 on num_key_value_heads=1", "1 to 2 heads for each kv head"]),
        ("vocab_size=100", ["target vocab_size: found 100", "the vocabulary is not supported yet: leave it out"]),
        ("head_dim=3", ["target head_dim: found 3; expected an even number", "choose head_dim=2 or 4"]),
    ],
)
def test_a_target_that_can_not_be_cut_to(call, refused, model_folder, method, to, parts):
    refused(lambda: call[f"prune by {method}"](model_folder, to=to), *parts)


def test_all_that_is_wrong_with_a_target_is_told_at_once(call, refused, model_folder):
    wrong = "hidden_size=99,intermediate_size=0"
    refused(lambda: call["prune by masks"](model_folder, to=wrong), "found 99", "found 0")


@pytest.mark.parametrize(
    ("to", "told"),
    [
        ("hidden_size=24,hidden_size=24", "target: found hidden_size twice; expected each size once; leave one out"),
        ("hidden_size=big", "target hidden_size: found 'big'; expected a whole number; write hidden_size=N"),
        ("", "target: found nothing; expected sizes; name what to cut, as hidden_size=N,..."),
    ],
)
def test_a_target_that_can_not_be_read(to, told):
    with pytest.raises(UserError) as raised:
        validated(Prune, {"to": to})
    assert str(raised.value) == told


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_rows_of_experts_are_held_against_the_results_dtype(refused, tmp_path, ask_prune, stored, dtype):
    """12 entries are 48 bytes in float32 and 24 in bfloat16, of which 16 is no divisor."""
    small_experts("mixtral", dtype=stored).model.save_pretrained(tmp_path / "experts")
    asked = ask_prune(to={"moe_intermediate_size": 12}, dtype=dtype)
    opened = partial(open_target, str(tmp_path / "experts"), asked)
    if dtype == "bfloat16" or (dtype is None and stored == torch.bfloat16):
        refused(opened, "found 12; expected a multiple of 8 (16 bytes of bfloat16)", "moe_intermediate_size=8 or 16")
    else:
        assert opened()[1]["moe_intermediate_size"] == 12


@pytest.fixture
def gpt2(tmp_path, model_folder) -> Path:
    """A model of 24 learned positions, with the tokenizer of the other."""
    folder = Path(shutil.copytree(model_folder, tmp_path / "gpt2"))
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    config = GPT2Config(vocab_size=rows, n_positions=24, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("verb", VERBS)
def test_windows_beyond_learned_positions(call, refused, gpt2, verb):
    options = {"to": {"intermediate_size": 32}} if "prune" in verb else {}
    parts = ["seq_len: found 25; expected at most 24, the positions", "choose a shorter --seq-len"]
    refused(lambda: call[verb](gpt2, seq_len=25, **options), *parts)
    assert call[verb](gpt2, seq_len=None, **options).losses


def test_a_teachers_learned_positions(call, refused, gpt2, model_folder):
    teacher = {"share": 0.5, "model": str(gpt2)}
    refused(lambda: call["heal"](model_folder, seq_len=25, teacher=teacher), "seq_len: found 25", "gpt2 has learned")


def test_the_context_by_the_familys_own_name_for_it(gpt2):
    assert inspect(str(gpt2))["context_tokens"] == 24


@pytest.mark.parametrize("verb", VERBS)
def test_too_little_data_for_one_step(call, refused, model_folder, verb):
    parts = ["domain 'code'", "found too little data for one step", "expected at least 50001", "shorter --seq-len"]
    refused(lambda: call[verb](model_folder, seq_len=50_000), *parts)


@pytest.mark.parametrize("verb", VERBS[:3])
@pytest.mark.parametrize(
    ("mixture", "parts"),
    [
        (
            {"weights": {"code": 0.5, "prose": 0.25, "sums": 0.25, "codee": 0.1}},
            ["mixture: found 'codee'; expected a domain of the data; did you mean 'code'?"],
        ),
        ({"weights": {"code": 0.5, "prose": 0.5}}, ["no weight for 'sums'; expected one for each domain"]),
        ({"weights": {"code": 1.0, "prose": 1.0, "sums": -1.0}}, ["weight of 'sums': found -1", "expected a positive"]),
        (
            {"weights": {"code": 0.4, "prose": 0.4, "sums": 0.4}},
            ["a sum of 1.2; expected 1", "perhaps code=0.333333, prose=0.333333, sums=0.333333"],
        ),
        ({"reference": {"code": 1.0, "prose": 1.0}}, ["sums"]),
        ({"reference": {"code": 1.0, "prose": 1.0, "sums": float("nan")}}, ["sums", "finite"]),
        (
            {"schedule": "proportional", "weights": {"code": 0.5, "prose": 0.25, "sums": 0.25}},
            ["mixture.weights: found them with proportional; expected one of them; leave the weights out"],
        ),
        ({"every": 0}, ["every"]),
        ({"floor": 1.5}, ["floor"]),
        ({"rule": "papper"}, ["rule"]),
    ],
)
def test_a_mixture_that_does_not_fit_the_domains(call, refused, model_folder, verb, mixture, parts):
    refused(lambda: call[verb](model_folder, mixture=mixture), *parts)


@pytest.mark.parametrize(
    ("masks", "expected"),
    [
        ({"slide": -1}, "slide from 0 to 1"),
        ({"temperature": 0}, "temperature from"),
        ({"lr": -0.1}, "lr from"),
        ({"level": float("nan")}, "level from"),
    ],
)
def test_masks_out_of_range(call, refused, model_folder, masks, expected):
    refused(lambda: call["prune by masks"](model_folder, masks=masks), "masks", expected)


@pytest.mark.parametrize("verb", VERBS[:3])
def test_a_domain_that_its_share_uses_up(call, refused, model_folder, verb):
    """The step is named, and so is what can be said to happen then."""
    weights = {"code": 0.98, "prose": 0.01, "sums": 0.01}
    asked = {"repeats": {"code": 1}, "mixture": {"weights": weights}, "steps": 5000, "eval_every": 0}
    refused(
        lambda: call[verb](model_folder, **asked),
        "domain 'code': found",
        "98.0% of the data end at step ",
        "--at-end stop, redistribute or repeat",
    )


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("device", ["warp", "cuda:99", "meta", "cpu:"])
def test_a_device_that_is_not_here(call, refused, model_folder, verb, device):
    refused(lambda: call[verb](model_folder, device=device), f"device: found '{device}'", "choose another --device")


@pytest.mark.parametrize("verb", VERBS)
def test_a_store_that_is_none(call, refused, model_folder, verb):
    refused(lambda: call[verb](model_folder, data=model_folder), "manifest.json: found no such file", "a token store")


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("model", ["./absent", "absent", "a/b/c"])
def test_a_model_that_is_not_there(call, refused, verb, model):
    refused(lambda: call[verb](model), f"model {model}", "found n")


@pytest.mark.parametrize("verb", VERBS[:3])
@pytest.mark.parametrize("name", ["out", "out.partial"])
def test_an_output_folder_with_something_else_in_it(call, refused, tmp_path, model_folder, verb, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.tex").write_text("mine")
    parts = [f"output {tmp_path / name}: found something that isn't a stage", "choose another --out"]
    refused(lambda: call[verb](model_folder), *parts)


@pytest.mark.parametrize("verb", VERBS[:3])
def test_the_root_folder_as_output(call, refused, model_folder, verb):
    refused(lambda: call[verb](model_folder, out="/"), "output /: found the root folder", "choose another --out")


def test_the_model_itself_as_output(call, refused, copied):
    folder = copied()
    refused(lambda: call["heal"](folder, out=folder), "isn't a stage of Shearling's", "choose another --out")


def test_an_output_folder_of_other_settings(call, refused, model_folder):
    call["prune by activation"](model_folder)
    parts = ["a stage with other settings (seed: 0 there, 1 now)", "choose another --out"]
    refused(lambda: call["prune by activation"](model_folder, seed=1), *parts)


@pytest.mark.parametrize("verb", ["prune by masks", "heal"])
def test_training_that_diverges_ends_without_a_result(call, tmp_path, model_folder, verb):
    with pytest.raises(UserError, match=r"held-out loss of 'code': found nan; expected a finite loss; lower --lr"):
        call[verb](model_folder, lr=1e30)
    assert not (tmp_path / "out").exists()


def full(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("way", "fills", "told"),
    [
        (shutil, "copyfile", "room for tokenizer, templates and licences"),
        (Path, "write_text", r"room for config\.json"),
        (os, "fsync", r"room for \d+ bytes of weights"),
    ],
)
def test_a_disk_that_fills_at_any_file_of_a_model(tmp_path, model_folder, monkeypatch, way, fills, told):
    source = Source.open(str(model_folder))
    monkeypatch.setattr(way, fills, full)
    with pytest.raises(UserError, match=f"found No space left on device.*; expected {told}; free space"):
        source.save(tmp_path, shape=source.shape, layers=(0, 1, 2), dtype=None, tensor=source.read)


def test_a_disk_that_fills_at_shearling_json_or_a_family(tmp_path, model_folder, monkeypatch):
    source = replace(Source.open(str(model_folder)), own_family=True)
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match=r"No space left on device; expected room for shearling\.json"):
        write_origin(tmp_path, {})
    with pytest.raises(UserError, match="No space left on device; expected room for tokenizer"):
        source.save(tmp_path, shape=source.shape, layers=(0, 1, 2), dtype=None, tensor=source.read)


def test_the_weights_room_is_what_the_files_beside_them_leave(tmp_path, model_folder, monkeypatch):
    source = Source.open(str(model_folder))
    free = lambda folder: SimpleNamespace(free=0 if (folder / "tokenizer.json").is_file() else 10**9)  # noqa: E731
    monkeypatch.setattr(shutil, "disk_usage", free)
    with pytest.raises(UserError, match="found 0 bytes free"):
        source.save(tmp_path, shape=source.shape, layers=(0, 1, 2), dtype=None, tensor=source.read)


@pytest.mark.parametrize(
    ("write", "parts"),
    [
        (lambda p: (p / "a.jsonl").write_text('{"text": "a"}\n{"text": \n'), ["a.jsonl", "line 2", "byte"]),
        (lambda p: (p / "a.jsonl").write_text('{"text": 3}\n'), ["a.jsonl", "line 1", "text"]),
        (lambda p: (p / "a.jsonl").write_text('{"body": "a"}\n'), ["a.jsonl", "line 1", "text"]),
        (lambda p: (p / "a.txt").write_bytes(b"caf\xe9 au lait"), ["a.txt", "UTF-8"]),
        (lambda p: (p / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a b c"}\n' * 99)[:-9]), ["a.jsonl.gz"]),
        (lambda p: (p / "empty").mkdir(), ["empty"]),
        (lambda p: (p / "a.txt").write_text(""), ["no documents with text"]),
    ],
)
def test_documents_that_can_not_be_read(refused, tmp_path, model_folder, write, parts):
    (tmp_path / "documents").mkdir()
    write(tmp_path / "documents")
    asked = validated(Data, {"inputs": [str(tmp_path / "documents")]})
    refused(lambda: make_store(asked, tokenizer=str(model_folder), out=str(tmp_path / "out")), *parts)


@pytest.mark.parametrize("option", ["text_column", "messages_column"])
@pytest.mark.parametrize("skip", [False, True])
def test_another_column_is_told_by_its_option(refused, tmp_path, model_folder, option, skip):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.jsonl").write_text('{"body": "a"}\n')
    asked = validated(Data, {"inputs": [str(tmp_path / "d")], option: "said", "skip_broken": skip})
    parts = ["1 broken", "without skip_broken the first broken one is told"]
    if not skip:
        parts = ["no 'said' among the keys (body)", f"with --{option.replace('_', '-')}"]
    refused(lambda: make_store(asked, tokenizer=str(model_folder), out=str(tmp_path / "out")), *parts)


@pytest.mark.parametrize("verb", [make_store, add_documents])
def test_the_root_folder_as_a_store(corpus, model_folder, verb):
    with pytest.raises(UserError, match=r"found (the root folder|no such file)"):
        verb(validated(Data, {"inputs": [str(corpus)]}), tokenizer=str(model_folder), out="/")


def test_a_mistake_in_the_documents_does_not_block_the_next_try(tmp_path, corpus, model_folder):
    out = str(tmp_path / "out")
    with pytest.raises(UserError, match="no such file or folder"):
        make_store(validated(Data, {"inputs": ["absent"]}), tokenizer=str(model_folder), out=out)
    store, _ = make_store(validated(Data, {"inputs": [str(corpus)]}), tokenizer=str(model_folder), out=out)
    assert store.domains == ("code", "prose", "sums")


def test_a_tokenizer_that_brings_code(refused, tmp_path, copied, corpus):
    folder = copied()
    code_in_tokenizer_config(folder)
    asked = validated(Data, {"inputs": [str(corpus)]})
    parts = ["tokenizer_config.json, field auto_map", "never runs"]
    refused(lambda: make_store(asked, tokenizer=str(folder), out=str(tmp_path / "out")), *parts)
