import random
import struct
import warnings

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from shearling.errors import UserError
from shearling.weights.checkpoint import Checkpoint
from shearling.weights.header import read_header


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_tensors_come_in_the_order_of_the_file(tmp_path, raw):
    path = tmp_path / "m.safetensors"
    header = {"b": entry(offsets=(8, 16)), "empty": entry(shape=(0, 3), offsets=(8, 8)), "a": entry()}
    path.write_bytes(raw(header, bytes(16)))
    tensors = read_header(path)
    assert list(tensors) == ["a", "empty", "b"]
    assert tensors["b"].start == path.stat().st_size - 8
    assert tensors["empty"].shape == (0, 3)


@pytest.mark.parametrize(
    ("header", "payload", "message"),
    [
        ({"a": entry()}, 7, r"found \d+ bytes; expected \d+ bytes by its header"),
        ({"a": entry()}, 9, r"found \d+ bytes; expected \d+ bytes by its header"),
        ({"a": entry(), "b": entry(offsets=(4, 12))}, 12, "'b' at byte .* overlaps"),
        ({"a": entry(), "b": entry()}, 8, "overlaps"),
        ({"a": entry(), "b": entry(offsets=(12, 20))}, 20, "'b' at byte .* leaves a gap"),
        ({"a": entry(offsets=(4, 12))}, 12, "leaves a gap"),
        ({"a": entry(offsets=(8, 0))}, 8, "a start and an end"),
        ({"a": entry(offsets=(-8, 0))}, 8, "a start and an end"),
        ({"a": entry(offsets=(0, 8, 16))}, 8, "a start and an end"),
        ({"a": entry(offsets=(0, 8.0))}, 8, "a start and an end"),
        ({"a": entry(shape=(3,))}, 8, r"8 bytes; expected 12 bytes for F32 of shape \[3\]"),
        ({"a": entry(shape=(-2,))}, 8, "a list of sizes"),
        ({"a": entry(shape=(True, 2))}, 8, "a list of sizes"),
        ({"a": entry(shape=(2**62, 2**62, 0), offsets=(0, 0))}, 0, "a list of sizes"),
        ({"a": entry(shape=(1,) * 65, offsets=(0, 4))}, 4, "a list of sizes"),
        ({"a": entry(dtype="F8_E4M3", offsets=(0, 2))}, 2, "tensor 'a': found dtype 'F8_E4M3'.*plain weights"),
        ({"a": entry(dtype=None)}, 8, "found dtype None"),
        ({"a": entry(dtype=["F32"])}, 8, "found dtype"),
        ({"a": entry() | {"more": 1}}, 8, "dtype, shape and data_offsets"),
        ({"a": 3}, 8, "dtype, shape and data_offsets"),
        ({"__metadata__": {"format": 1}}, 0, "a map of strings"),
        ({"__metadata__": []}, 0, "a map of strings"),
        ("[]", 0, "an object of tensors"),
        ('{"a":', 0, "a broken header"),
        ('{"a": {}, "a": {}}', 0, "a key comes twice"),
        ('{"\\ud800": {}}', 0, "a broken header"),
        ("[" * 100_000, 0, "nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}", 0, "a broken header"),
    ],
)
def test_refused_headers(tmp_path, raw, header, payload, message):
    path = tmp_path / "model-00001-of-00002.safetensors"
    path.write_bytes(raw(header, bytes(payload)))
    with pytest.raises(UserError, match=message) as caught:
        read_header(path)
    assert path.name in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "found 0 bytes; expected at least 8 bytes"),
        (b"1234567", "found 7 bytes"),
        (struct.pack("<Q", 100_000_001) + b"{}", "a header of 100000001 bytes"),
        (b"\xff" * 16, "a header of at most"),
        (struct.pack("<Q", 50) + b"{}", "found 10 bytes; expected at least 58 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "git-lfs pointer.*git lfs pull"),
        (struct.pack("<Q", 2) + b"\xff\xfe", "a broken header"),
    ],
)
def test_refused_files(tmp_path, content, message):
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_header(path)


def test_every_truncation_is_found(tmp_path):
    content = save({"a": torch.arange(6.0), "b": torch.ones(2, 2, dtype=torch.bfloat16)})
    path = tmp_path / "m.safetensors"
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with pytest.raises(UserError, match=r"m\.safetensors"):
            read_header(path)


def test_mutated_headers_are_refused_or_read_as_safetensors_does(model):
    folder = model()
    path = folder / "model.safetensors"
    content = path.read_bytes()
    header_end = 8 + int.from_bytes(content[:8], "little")
    generator = random.Random(0)
    read = 0
    for _ in range(1200):
        mutated = _mutate(generator, content, header_end)
        path.write_bytes(mutated)
        try:
            checkpoint = Checkpoint.open(folder)
            ours = {name: checkpoint.read(name) for name in checkpoint.names}
        except UserError:
            continue
        read += 1
        theirs = _load(mutated)
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert tensor.dtype == theirs[name].dtype
            assert tensor.shape == theirs[name].shape
            assert _bits(tensor) == _bits(theirs[name])
    assert read > 20  # else the test has lost its second half


def _mutate(generator, content, header_end):
    changed = bytearray(content)
    for _ in range(generator.choice((1, 1, 2, 4))):
        place = generator.randrange(header_end)
        kind = generator.randrange(4)
        if kind == 0:
            changed[place] = generator.randrange(256)
        elif kind == 1:
            changed[place] ^= 1 << generator.randrange(8)
        elif kind == 2:  # the likeliest to stay valid JSON
            changed[place] = ord(generator.choice('0123456789abFIU{}[]",:'))
        else:
            length = generator.randrange(1, 9)
            source = generator.randrange(header_end)
            changed[place : place + length] = content[source : source + length]
    return bytes(changed)


def _load(content):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return load(content)
        except SafetensorError as error:
            pytest.fail(f"safetensors refuses what we read: {error}\n{content!r}")


def _bits(tensor):
    return tensor.reshape(-1).view(torch.uint8).tolist()
