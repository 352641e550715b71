import json
import struct

import pytest
import torch
from safetensors.torch import save_file

CONFIG = {"model_type": "llama", "hidden_size": 4, "dtype": "float32"}


@pytest.fixture
def model(tmp_path):
    """Makes a model folder: `model(shards={file: {name: tensor}}, config=..., index=...)`."""

    def make(shards=None, *, config=CONFIG, index=None, name="source"):
        folder = tmp_path / name
        folder.mkdir()
        if config is not None:
            (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
        if shards is None:
            shards = {"model.safetensors": {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4)}}
        for shard, tensors in shards.items():
            save_file(tensors, folder / shard, metadata={"format": "pt"})
        if index is not None:
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        return folder

    return make


@pytest.fixture
def raw():
    """The bytes of a safetensors file with the header given as text or value."""

    def make(header, payload=b""):
        header = header.encode() if isinstance(header, str) else json.dumps(header).encode()
        return struct.pack("<Q", len(header)) + header + payload

    return make
