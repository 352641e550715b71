"""GGUF files become plain safetensors folders, once each, in the user's cache."""

import hashlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

from shearling.errors import UserError


def convert(path: Path) -> Path:
    """The file's model in float32 with its tokenizer, as transformers reads it; the same folder for the same bytes.

    Raises UserError without the extra `shearling[gguf]`, and for a file that transformers can't read.
    """
    with open(path, "rb") as file:
        magic = file.read(4)
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if magic != b"GGUF":
        raise UserError(
            f"model {path}", found=f"a file that starts with {magic!r}", expected="b'GGUF'", change="download it again"
        )
    folder = _cache() / digest
    if folder.is_dir():  # it got this name only when it was whole
        return folder
    _check_packages(path)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".", dir=folder.parent))
    except OSError as error:
        raise UserError(
            f"cache {folder.parent}",
            found=f"it can't be written ({error.strerror})",
            expected="a folder for converted models",
            change="set XDG_CACHE_HOME to one",
        ) from error
    try:
        _save(path, work / "model")
        os.sync()  # the name promises a whole model, even after a power cut
        _settle(work / "model", folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def _check_packages(path: Path) -> None:
    missing = [package for package in ("gguf", "accelerate") if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(
            f"model {path}",
            found=f"no package {' and '.join(missing)}",
            expected="the packages that read GGUF",
            change="pip install 'shearling[gguf]'",
        )


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "shearling" / "gguf"


def _settle(made: Path, folder: Path) -> None:
    try:
        os.rename(made, folder)
    except OSError:
        if not folder.is_dir():  # another process that converted the same file has won, and its result is as good
            raise


def _save(path: Path, out: Path) -> None:
    import torch
    import transformers

    # Linked into a folder of its own: transformers reads configs that lie beside the file too.
    alone = out.parent / "source"
    alone.mkdir()
    (alone / "model.gguf").symlink_to(path.resolve())
    options = {"gguf_file": "model.gguf", "trust_remote_code": False}
    # Newer releases keep the blocks packed, for which they fetch compiled kernels from the Hub. We want neither.
    unpack = getattr(transformers, "GgufConfig", None)
    unpacked = {"quantization_config": unpack(dequantize=True)} if unpack else {}
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(alone, dtype=torch.float32, **unpacked, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(alone, **options)
    except Exception as error:  # transformers and gguf raise all kinds for files they don't know
        message = str(error).partition("\n")[0]
        raise UserError(
            f"model {path}",
            found=f"a GGUF that transformers can't read ({type(error).__name__}: {message:.200})",
            expected="a GGUF of a family that transformers converts",
            change="use the model's safetensors",
        ) from error
    _plain(model).save_pretrained(out)
    tokenizer.save_pretrained(out)


def _plain(model):
    # Unpacked or not, those releases still call it quantised and refuse to save it, so its weights move to a new one.
    import torch
    import transformers

    settings = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    config = type(model.config).from_dict(settings)
    with torch.device("meta"):
        plain = transformers.AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain
