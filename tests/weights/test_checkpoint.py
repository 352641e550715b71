import json
import os
import pickle
from pathlib import Path

import pytest
import torch

from shearling.errors import UserError, UserErrors
from shearling.weights.checkpoint import Checkpoint, check_dtype, check_finite, fingerprint

A, B, C = torch.arange(6.0).reshape(2, 3), torch.ones(4, dtype=torch.bfloat16), torch.tensor(3)
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def sharded(model, index, **options):
    return model({FIRST: {"a": A, "b": B}, SECOND: {"c": C}}, index=index, **options)


def test_one_file(model):
    checkpoint = Checkpoint.open(model())
    assert sorted(checkpoint.names) == ["a", "b"]
    assert checkpoint.config["model_type"] == "llama"
    assert (checkpoint.info("a").dtype, checkpoint.info("a").shape, checkpoint.info("a").nbytes) == ("F32", (2, 3), 24)
    assert torch.equal(checkpoint.read("a"), A)


def test_shards(model):
    checkpoint = Checkpoint.open(sharded(model, {"a": FIRST, "b": FIRST, "c": SECOND}))
    assert [shard.name for shard in checkpoint.shards] == [FIRST, SECOND]
    for name, tensor in {"a": A, "b": B, "c": C}.items():
        assert checkpoint.read(name).dtype == tensor.dtype
        assert torch.equal(checkpoint.read(name), tensor)


def test_a_read_owns_its_memory(model):
    folder = model()
    checkpoint = Checkpoint.open(folder)
    tensor = checkpoint.read("a")
    (folder / "model.safetensors").write_bytes(b"")  # a mapped file would fault here
    assert torch.equal(tensor, A)
    assert tensor.untyped_storage().nbytes() == 24
    tensor += 1


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak can be reset on Linux only")
def test_one_tensor_costs_one_tensor(model):
    big = torch.zeros(10, 1 << 20)  # beyond 32 MiB malloc keeps no freed memory back
    checkpoint = Checkpoint.open(model({"model.safetensors": {f"t{n}": big + n for n in range(3)}}))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew, at the present size
    before = resident_bytes("VmRSS")
    for name in checkpoint.names:
        assert checkpoint.read(name)[0, 0] == int(name[1:])
    assert 0.5 * big.nbytes < resident_bytes("VmHWM") - before < 1.5 * big.nbytes


def resident_bytes(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def test_alike_is_to_the_last_byte(model, monkeypatch):
    monkeypatch.setattr("shearling.weights.checkpoint.BLOCK_BYTES", 10)
    others = {"last": A.clone(), "shape": A.clone().reshape(3, 2), "dtype": A.clone().view(torch.int32)}
    others["last"][-1, -1] += 1
    checkpoint = Checkpoint.open(
        model(
            {FIRST: {"a": A, **others}, SECOND: {"same": A}},
            index={**dict.fromkeys(["a", *others], FIRST), "same": SECOND},
        )
    )
    assert [name for name in checkpoint.names if checkpoint.alike("a", name)] == ["a", "same"]


def test_a_file_cut_short_while_open(model):
    folder = model()
    checkpoint = Checkpoint.open(folder)
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 4)
    with pytest.raises(UserError, match="cut short while in use"):
        checkpoint.read(checkpoint.names[-1])


def test_an_absent_tensor(model):
    with pytest.raises(UserError, match=r"no tensor 'aa'.*did you mean 'a'"):
        Checkpoint.open(model()).read("aa")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"a": FIRST, "b": FIRST, "c": "model-00003-of-00003.safetensors"}, "no file model-00003-of-00003"),
        ({"a": FIRST, "b": FIRST, "c": SECOND, "d": SECOND}, "no shard holds where it says: d;"),
        ({"a": FIRST, "c": SECOND}, f"doesn't name there: b in {FIRST};"),
        ({"a": FIRST, "b": FIRST, "c": SECOND} | {f"x{n}": SECOND for n in range(7)}, "x0, x1, x2, x3, x4 and 2 more"),
        ({"a": "../secret.safetensors"}, "the name of a .safetensors file in the same folder"),
        ({"a": "/etc/x.safetensors"}, "the name of a .safetensors file in the same folder"),
        ({"a": "pytorch_model.bin"}, "the name of a .safetensors file in the same folder"),
        ({"a": 3}, "the name of a .safetensors file in the same folder"),
        ({}, "no weight_map"),
        ([], "no weight_map"),
    ],
)
def test_refused_indices(model, index, message):
    with pytest.raises(UserError, match=message):
        Checkpoint.open(sharded(model, index))


def test_all_faults_of_an_index_at_once(model):
    with pytest.raises(UserErrors) as caught:
        Checkpoint.open(sharded(model, {"a": FIRST, "b": SECOND, "c": SECOND}))
    assert "where it says: b;" in str(caught.value)
    assert f"doesn't name there: b in {FIRST};" in str(caught.value)


def test_all_broken_shards_at_once(model):
    folder = sharded(model, {"a": FIRST, "b": FIRST, "c": SECOND})
    for shard in (FIRST, SECOND):
        os.truncate(folder / shard, 5)
    with pytest.raises(UserErrors) as caught:
        Checkpoint.open(folder)
    assert FIRST in str(caught.value)
    assert SECOND in str(caught.value)


def test_no_weights(model):
    with pytest.raises(UserError, match="no weights"):
        Checkpoint.open(model({}))


def test_shards_without_an_index(model):
    with pytest.raises(UserError, match="without an index"):
        Checkpoint.open(sharded(model, None))


def test_an_adapter_without_its_model(model):
    folder = model({"adapter_model.safetensors": {"a": A}})
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="merge the adapter"):
        Checkpoint.open(folder)


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "adapter_model.bin"])
def test_pickles_are_refused_unopened(model, tmp_path, name):
    folder = model({})
    (folder / name).write_bytes(pickle.dumps(Canary(tmp_path / "fired")))
    with pytest.raises(UserError, match=r"pickle-only.*save_pretrained.*environment you trust") as caught:
        Checkpoint.open(folder)
    assert name in str(caught.value)
    assert not (tmp_path / "fired").exists()


def test_a_pickle_beside_safetensors_is_ignored(model, tmp_path):
    folder = model()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(tmp_path / "fired")))
    assert Checkpoint.open(folder).names
    assert not (tmp_path / "fired").exists()


def test_the_configs_refusals_come_first(model):
    with pytest.raises(UserError, match="auto_map"):
        Checkpoint.open(model({}, config={"auto_map": {}}))


def test_finite():
    check_finite("w", torch.ones(3))
    check_finite("ids", torch.tensor([1, 2]))
    check_finite("none", torch.empty(0))
    broken = torch.tensor([1.0, float("nan"), float("inf"), -float("inf"), 0.0], dtype=torch.bfloat16)
    with pytest.raises(UserError, match="tensor 'w': found 1 NaN and 2 Inf among 5 values"):
        check_finite("w", broken)


@pytest.mark.parametrize("declared", ["float32", "torch.float32", None])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtypes_that_agree(model, declared, key):
    checkpoint = Checkpoint.open(model({"model.safetensors": {"a": A, "b": B, "ids": torch.arange(99)}}))
    check_dtype({key: declared}, checkpoint)
    check_dtype({}, checkpoint)


def test_dtypes_that_disagree(model):
    checkpoint = Checkpoint.open(model({"model.safetensors": {"a": A, "b": B}}))
    with pytest.raises(UserError, match=r"bfloat16 in config\.json and float32 in the weights.*pass --dtype"):
        check_dtype({"dtype": "bfloat16"}, checkpoint)
    with pytest.raises(UserError, match="pass --dtype"):
        check_dtype({"dtype": {"text": "float32"}}, checkpoint)


def test_a_tie_between_dtypes_accepts_both(model):
    checkpoint = Checkpoint.open(model({"model.safetensors": {"a": torch.ones(2), "b": B}}))
    for declared in ("float32", "bfloat16"):
        check_dtype({"dtype": declared}, checkpoint)
    with pytest.raises(UserError, match="float32 and bfloat16"):
        check_dtype({"dtype": "float16"}, checkpoint)


def test_the_fingerprint_covers_config_and_every_byte(model):
    index = {"a": FIRST, "b": FIRST, "c": SECOND}
    folder = sharded(model, index)
    first = fingerprint(folder)
    assert len(first) == 64
    assert fingerprint(sharded(model, index, name="again")) == first
    seen = {first}
    for path, place in ((folder / "config.json", 3), (folder / FIRST, -1), (folder / SECOND, -1)):
        content = bytearray(path.read_bytes())
        content[place] ^= 1
        path.write_bytes(content)
        seen.add(fingerprint(folder))
    assert len(seen) == 4


def test_the_fingerprint_ignores_other_files(model):
    folder = model()
    first = fingerprint(folder)
    (folder / "README.md").write_text("hello")
    (folder / "tokenizer_config.json").write_text(json.dumps({}))
    assert fingerprint(folder) == first
