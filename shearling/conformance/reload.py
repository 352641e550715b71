"""Cuts loaded again by a fresh process, as a user would: nothing missing, nothing left over, the cache changes nothing.

`python -m shearling.conformance.reload FOLDER...` prints a line of JSON a folder: what was found there.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from shearling.axes.shape import Shape
from shearling.conformance.exact import config_of, masked_logits
from shearling.conformance.finding import Finding
from shearling.conformance.model import Small, relative
from shearling.conformance.targets import random_cut
from shearling.cut.extract import Cut
from shearling.weights.model import reader, save_model

EXPECTED = "expected.safetensors"  # beside a model's folder: ids and the logits that the masked model gave them
NEW_TOKENS = 16


def save_cut(made: Small, target: Shape, folder: Path) -> None:
    """Writes the cut as a model in `folder`/model, and what the masked model says of some ids beside it."""
    kept, masks = random_cut(made.shape, target)
    cut = Cut(made.family, made.config, target, kept, masks)
    read = reader(made.model)
    (folder / "model").mkdir(parents=True)
    save_model(
        folder / "model",
        family=made.family,
        config=config_of(cut),
        shape=target,
        dtype=torch.float32,
        tensor=lambda row, layer: cut.tensor(row, layer, read),
    )
    ids = made.ids()
    save_file({"ids": ids, "logits": masked_logits(made, masks, ids).contiguous()}, folder / EXPECTED)


def reloaded(folders: Sequence[Path], *, names: Sequence[str]) -> Iterator[Finding]:
    """One fresh process over the folders of `save_cut`; `names` are their configs'."""
    command = [sys.executable, "-m", "shearling.conformance.reload", *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    for name, said in zip(names, lines, strict=False):
        yield from _findings(name, said)
    for name in names[len(lines) :]:
        yield Finding("reloaded", name, why=done.stderr.strip()[-500:] or "nothing said")


def _findings(name: str, said: Mapping[str, Any]) -> Iterator[Finding]:
    yield Finding("keys", name, why=said["stray"])
    yield Finding("masked = cut = reloaded", name, error=said["error"])
    yield Finding("with cache = without", name, error=said["cache_error"], why=said["cache"])


@torch.no_grad()
def load(folder: Path) -> dict[str, Any]:
    """What a folder's model, loaded by transformers alone, gives for the ids beside it."""
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder / "model",
        output_loading_info=True,
        local_files_only=True,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    model, report = loaded
    expected = load_file(folder / EXPECTED)
    stray = [f"{kind}: {sorted(map(str, names))[:5]}" for kind, names in report.items() if names and "keys" in kind]
    logits = model.eval()(expected["ids"], use_cache=False).logits
    plain, cached = (_generate(model, expected["ids"], use_cache=use_cache) for use_cache in (False, True))
    return {
        "stray": ", ".join(stray),
        "error": relative(logits, expected["logits"]),
        "cache": "" if torch.equal(plain.sequences, cached.sequences) else "other tokens",
        "cache_error": relative(torch.stack(cached.logits), torch.stack(plain.logits)),
    }


def _generate(model: Any, ids: torch.Tensor, *, use_cache: bool) -> Any:
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        use_cache=use_cache,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        sys.stdout.write(json.dumps(load(Path(argument))) + "\n")
        sys.stdout.flush()
