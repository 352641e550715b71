import json
import shutil
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from shearling.errors import UserError
from shearling.weights import writer
from shearling.weights.checkpoint import Checkpoint
from shearling.weights.header import DTYPES
from shearling.weights.writer import Entry, write

SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)


def random_tensor(dtype, shape, seed=0):
    """Random bits, so NaN payloads and denormals are among them."""
    name, size = DTYPES[dtype][1], Entry("x", dtype, shape).nbytes
    bits = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return (bits % 2 if dtype == "BOOL" else bits).view(getattr(torch, name)).reshape(shape)


def same_bits(one, other):
    flat = [tensor.reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*flat)


def write_tensors(folder, tensors, **options):
    write(
        folder,
        [Entry(name, dtype, tuple(t.shape)) for name, (dtype, t) in tensors.items()],
        lambda n: tensors[n][1],
        **options,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (3,), (2, 5), (0, 4), (1, 2, 3)])
def test_every_dtype_is_bit_exact(tmp_path, dtype, shape):
    tensor = random_tensor(dtype, shape)
    write_tensors(tmp_path, {"w": (dtype, tensor)})
    assert same_bits(load_file(tmp_path / "model.safetensors")["w"], tensor)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    specs=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(sorted(DTYPES)), SHAPES),
        max_size=6,
    ),
    shard_bytes=st.sampled_from([1, 16, 64, 5_000_000_000]),
)
def test_what_is_written_is_read(tmp_path_factory, specs, shard_bytes):
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text("{}")
    tensors = {name: (dtype, random_tensor(dtype, shape, n)) for n, (name, (dtype, shape)) in enumerate(specs.items())}
    write_tensors(folder, tensors, shard_bytes=shard_bytes)
    checkpoint = Checkpoint.open(folder)
    theirs = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert set(checkpoint.names) == theirs.keys() == tensors.keys()
    for name, (_, tensor) in tensors.items():
        assert same_bits(checkpoint.read(name), tensor)
        assert same_bits(theirs[name], tensor)
    shutil.rmtree(folder)


def test_shards_follow_the_entries_and_the_limit(tmp_path):
    tensors = {name: ("F32", torch.full((size,), 1.0)) for name, size in (("c", 4), ("a", 4), ("big", 20), ("b", 1))}
    write_tensors(tmp_path, tensors, shard_bytes=32)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    first, second, third = (f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3))
    assert index["weight_map"] == {"c": first, "a": first, "big": second, "b": third}
    assert index["metadata"]["total_size"] == 29 * 4
    assert sorted(path.name for path in tmp_path.iterdir()) == [first, second, third, "model.safetensors.index.json"]


def test_header_is_aligned_and_marked_for_torch(tmp_path):
    write_tensors(
        tmp_path, {"odd": ("I8", torch.ones(3, dtype=torch.int8)), "w": ("F64", torch.ones(2, dtype=torch.float64))}
    )
    assert int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little") % 8 == 0
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert torch.equal(file.get_tensor("w"), torch.ones(2, dtype=torch.float64))


def test_transposed_and_grad_tensors_are_written_by_value(tmp_path):
    tensor = torch.arange(6.0).reshape(2, 3).requires_grad_().T
    write_tensors(tmp_path, {"w": ("F32", tensor)}, metadata={"format": "pt", "more": "yes"})
    assert torch.equal(load_file(tmp_path / "model.safetensors")["w"], tensor)


def test_one_tensor_at_a_time(tmp_path):
    asked = []

    def produce(name):
        asked.append((name, (tmp_path / "model.safetensors").stat().st_size))
        return torch.ones(256)

    write(tmp_path, [Entry(name, "F32", (256,)) for name in "abc"], produce)
    assert [name for name, _ in asked] == ["a", "b", "c"]
    sizes = [size for _, size in asked]
    assert [after - before for before, after in pairwise(sizes)] == [1024, 1024]


@pytest.mark.parametrize("tensor", [torch.ones(3), torch.ones(2, dtype=torch.float64)])
def test_a_wrong_tensor_is_our_fault(tmp_path, tensor):
    with pytest.raises(AssertionError, match="w: "):
        write(tmp_path, [Entry("w", "F32", (2,))], lambda name: tensor)


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "model.safetensors").write_text("precious")
    with pytest.raises(FileExistsError):
        write(tmp_path, [Entry("w", "F32", ())], lambda name: torch.tensor(1.0))
    assert (tmp_path / "model.safetensors").read_text() == "precious"


def test_too_little_space_is_found_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(UserError, match="100 bytes free; expected room for 400 bytes"):
        write(tmp_path / "out", [Entry("w", "F32", (100,))], lambda name: pytest.fail("produced"))


def test_a_disk_that_fills_up_names_the_bytes_needed(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer.os, "fsync", full)
    with pytest.raises(UserError, match=r"No space left on device.*room for 8 bytes"):
        write(tmp_path, [Entry("w", "F32", (2,))], lambda name: torch.ones(2))
