import json
import subprocess
import sys

import pytest

from shearling.errors import UserError
from shearling.weights.config import read_config

GOOD = {"model_type": "llama", "hidden_size": 4}


def test_a_folder_with_nothing_but_a_config(model):
    assert read_config(model({}, config=GOOD)) == GOOD


def test_a_config_file_by_any_name(tmp_path):
    (tmp_path / "llama.json").write_text(json.dumps(GOOD))
    assert read_config(tmp_path / "llama.json") == GOOD


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"a": 1,\n "b": }', r"config\.json: found .* at line 2, column 7"),
        ('{"a": 1, "a": 2}', "the key 'a' twice"),
        ('{"rope": {"x": 1, "x": 1}}', "the key 'x' twice"),
        ("[1]", "found list"),
        ("", "line 1, column 1"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}", "digits"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "field auto_map: found it needs code from the checkpoint"),
        ({"text_config": [{"auto_map": {}}]}, r"field text_config\.0\.auto_map"),
        ({"_attn_implementation_internal": "evil/kernel"}, "which Shearling never runs"),
        ({"text_config": {"_experts_implementation_internal": "x"}}, "which Shearling never runs"),
        ({"attn_implementation": "evil/kernel"}, "which Shearling never runs"),
        ({"_attn_implementation": {"text": "evil/kernel"}}, "which Shearling never runs"),
        ({"text_config": {"quantization_config": {}}}, "by a method that it doesn't name; expected plain weights"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
    ],
)
def test_refused_configs(model, config, message):
    with pytest.raises(UserError, match=message):
        read_config(model({}, config=config))


@pytest.mark.parametrize(
    ("settings", "found", "change"),
    [
        ({"quant_method": "gptq", "bits": 4}, "GPTQ", "get the upload that it was quantised from: its name without"),
        ({"quant_method": "awq"}, "AWQ", "get the upload that it was quantised from"),
        ({"quant_method": "bitsandbytes"}, "bitsandbytes", r"from_pretrained\(MODEL\)\.dequantize\(\)"),
        ({"load_in_4bit": True}, "bitsandbytes", r"from_pretrained\(MODEL\)\.dequantize\(\), then save_pretrained"),
        ({"quant_method": "fp8", "fmt": "e4m3"}, "FP8", r"FineGrainedFP8Config\(dequantize=True\)"),
        ({"quant_method": "mxfp4"}, "MXFP4", r"quantization_config=Mxfp4Config\(dequantize=True\)\), then save_pret"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors", r"CompressedTensorsConfig\(dequantize=True\)"),
        ({"quant_method": "new"}, "new", "get the upload that it was quantised from"),
        ("x", "a method that it doesn't name", "get the upload"),
    ],
)
def test_quantised_weights_are_told_how_to_become_plain(model, settings, found, change):
    message = f"field quantization_config: found weights quantised by {found}; expected plain weights .*; .*{change}"
    with pytest.raises(UserError, match=message):
        read_config(model({}, config={"quantization_config": settings}))


def test_bytes_that_arent_text(model):
    folder = model({}, config=GOOD)
    (folder / "config.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(UserError, match="UTF-8 at offset 7"):
        read_config(folder)


@pytest.mark.parametrize(
    "config", [{"quantization_config": None}, {"is_encoder_decoder": False}, {"_attn_implementation": "sdpa"}]
)
def test_harmless_settings_pass(model, config):
    assert read_config(model({}, config=config)) == config


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "processor_config.json", "x.json"])
def test_code_in_any_json_is_refused(model, name):
    folder = model({}, config=GOOD)
    (folder / name).write_text(json.dumps({"deep": [{"auto_map": {"AutoTokenizer": ["evil.T", None]}}]}))
    with pytest.raises(UserError, match=rf"{name}, field deep\.0\.auto_map"):
        read_config(folder)


def test_broken_json_beside_the_config_is_named(model):
    folder = model({}, config=GOOD)
    (folder / "generation_config.json").write_text('{"a" 1}')
    with pytest.raises(UserError, match=r"generation_config\.json: .*line 1, column 6"):
        read_config(folder)


def test_only_big_vocabularies_go_unparsed(model):
    folder = model({}, config=GOOD)
    padding = " " * 5_000_001
    (folder / "tokenizer.json").write_text("{broken" + padding)
    (folder / "model.safetensors.index.json").write_text("{broken")
    assert read_config(folder) == GOOD
    (folder / "tokenizer_config.json").write_text('{"auto_map": 1}' + padding)
    with pytest.raises(UserError, match="auto_map"):
        read_config(folder)


def test_missing_configs(model):
    folder = model({}, config=None)
    with pytest.raises(UserError, match=r"no config\.json"):
        read_config(folder)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="merge the adapter"):
        read_config(folder)
    with pytest.raises(UserError, match="No such file"):
        read_config(folder / "config.json")


@pytest.mark.parametrize("name", ["model.safetensors", "LICENSE", "additional_chat_templates/rag.jinja"])
def test_links_out_of_the_folder_are_refused(model, tmp_path, name):
    (tmp_path / "secret").write_text("secret")
    folder = model({}, config=GOOD)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="leads out of the folder"):
        read_config(folder)


def test_links_inside_and_into_the_hub_cache_pass(tmp_path):
    blobs, snapshot = tmp_path / "models--org--name" / "blobs", tmp_path / "models--org--name" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "1234").write_text(json.dumps(GOOD))
    (snapshot / "config.json").symlink_to("../../blobs/1234")
    (snapshot / "copy.json").symlink_to("config.json")
    assert read_config(snapshot) == GOOD


def test_reading_a_config_loads_no_torch(model):
    folder = model({}, config=GOOD)
    code = (
        "import sys; from shearling.weights.config import read_config; import shearling.weights.folder\n"
        f"read_config({str(folder)!r})\n"
        "assert not {'torch', 'transformers', 'huggingface_hub', 'safetensors', 'numpy'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
