"""The JSON files of a model folder, and what Shearling refuses in them. No torch: `inspect` answers at once."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shearling.errors import UserError
from shearling.weights.quantised import how_to_get_plain, spelled

# Big by nature and made of strings and ids alone: worth parsing only while that costs nothing.
VOCABULARY_FILES = ("tokenizer.json", "vocab.json")
VOCABULARY_BYTES = 5_000_000
# CVE-2026-4372: a config that sets the internal field makes transformers fetch and run a kernel from the Hub.
INTERNAL_KEYS = ("_attn_implementation_internal", "_experts_implementation_internal")
IMPLEMENTATION_KEYS = (
    "_attn_implementation",
    "attn_implementation",
    "_experts_implementation",
    "experts_implementation",
)
QUANTISATION_KEYS = ("quantization_config", "compression_config")
INDEX_FILE = "model.safetensors.index.json"


def read_config(model: Path) -> dict[str, Any]:
    """The raw config of a model folder (which may hold nothing else), or of a config file named itself.

    Raises UserError for a missing or broken config, for code that comes with the checkpoint, for quantised weights, for
    encoder-decoders, for adapters without their model, and for links that lead out of the folder.
    """
    model = Path(model)
    if not model.is_dir():
        return _checked_config(model)
    if not (model / "config.json").is_file():
        raise _no_config(model)
    check_links(model)
    config = _checked_config(model / "config.json")
    check_code(model)
    return config


def check_code(folder: Path) -> None:
    """Raises UserError if a JSON file of the folder asks for code that comes with the checkpoint."""
    for path in sorted(folder.glob("*.json")):
        if not _is_bulk(path):
            _refuse_code(path, read_json(path))


def read_json(path: Path, *, unique_keys: bool = False) -> Any:
    """A JSON file's value. Raises UserError with line and column where it's broken or, if asked, a key comes twice."""
    try:
        text = path.read_bytes().decode("utf-8")
        return json.loads(text, object_pairs_hook=_unique if unique_keys else None)
    except json.JSONDecodeError as error:
        found = f"{error.msg} at line {error.lineno}, column {error.colno}"
    except UnicodeDecodeError as error:
        found = f"a byte that isn't UTF-8 at offset {error.start}"
    except RecursionError:
        found = "values nested too deeply"
    except ValueError as error:  # a key that comes twice, or a number of thousands of digits
        found = str(error)
    except OSError as error:
        found = f"{error.strerror}"
    raise UserError(f"file {path}", found=found, expected="valid JSON", change="download the file again or mend it")


def check_links(folder: Path) -> None:
    """Raises UserError if a link in the folder leads out of it, other than into the Hugging Face cache that made it."""
    root = folder.resolve()
    for path in sorted([*folder.iterdir(), *(folder / "additional_chat_templates").glob("*")]):
        target = path.resolve()
        if target.is_relative_to(root) or (target.parent.name == "blobs" and _is_cache(target.parent.parent)):
            continue
        raise UserError(
            f"link {path}",
            found=f"it leads out of the folder, to {target}",
            expected="files inside the folder, or a Hugging Face cache (snapshots and blobs)",
            change="replace the link by the file itself",
        )


def _is_cache(folder: Path) -> bool:
    return (folder / "snapshots").is_dir()


def _is_bulk(path: Path) -> bool:
    if path.name.endswith(".safetensors.index.json"):
        return True
    return path.name in VOCABULARY_FILES and path.is_file() and path.stat().st_size > VOCABULARY_BYTES


def _checked_config(path: Path) -> dict[str, Any]:
    config = read_json(path, unique_keys=True)
    if not isinstance(config, dict):
        raise UserError(
            f"file {path}",
            found=type(config).__name__,
            expected="an object of settings",
            change="give a model's config",
        )
    _refuse_code(path, config)
    for where, key, value in _fields(config):
        if key in QUANTISATION_KEYS and value is not None:
            raise UserError(
                f"file {path}, field {where}",
                found=f"weights quantised by {spelled(value)}",
                expected="plain weights (float32, bfloat16 or float16)",
                change=how_to_get_plain(value),
            )
    if config.get("is_encoder_decoder") is True:
        raise UserError(
            f"file {path}, field is_encoder_decoder",
            found="true: an encoder-decoder",
            expected="a decoder-only language model",
            change="choose another model",
        )
    return config


def _refuse_code(path: Path, content: Any) -> None:
    for where, key, value in _fields(content):
        kernel = key in IMPLEMENTATION_KEYS and "/" in str(value)
        if key == "auto_map" or key in INTERNAL_KEYS or kernel:
            raise UserError(
                f"file {path}, field {where}",
                found="it needs code from the checkpoint, which Shearling never runs",
                expected="a model that transformers knows by itself",
                change="choose another model; where transformers has its class by now, a newer upload lacks this field",
            )


def _fields(content: Any) -> Iterator[tuple[str, str, Any]]:
    # By a stack of our own: a file may nest deeper than Python recurses.
    stack = [("", content)]
    while stack:
        where, value = stack.pop()
        if isinstance(value, dict):
            for key, inner in value.items():
                yield f"{where}{key}", key, inner
                stack.append((f"{where}{key}.", inner))
        elif isinstance(value, list):
            stack.extend((f"{where}{index}.", inner) for index, inner in enumerate(value))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in content if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} twice in one object")
    return content


def _no_config(folder: Path) -> UserError:
    if (folder / "adapter_config.json").is_file():
        return adapter_only(folder)
    return UserError(
        f"model {folder}",
        found="no config.json",
        expected="a folder with a model's config.json",
        change="give a folder that save_pretrained wrote, a .gguf file or a Hub id such as org/name",
    )


def adapter_only(folder: Path) -> UserError:
    """The refusal of an adapter (LoRA and the like) that came without the model it adapts."""
    return UserError(
        f"model {folder}",
        found="an adapter (adapter_config.json) without its model's weights",
        expected="a whole model",
        change="merge the adapter into its model first: PEFT's merge_and_unload, then save_pretrained",
    )
