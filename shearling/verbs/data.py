"""`data`: documents to a token store."""

from collections.abc import Callable
from pathlib import Path

from shearling.data.store import Store
from shearling.data.tokenise import fingerprint, load_tokenizer, prepare
from shearling.errors import UserError
from shearling.recipe import Data
from shearling.stage import Stage
from shearling.weights.config import check_code
from shearling.weights.folder import resolve


def make_store(
    asked: Data, *, tokenizer: str, out: str, progress: Callable[[str, int, int], None] | None = None
) -> tuple[Store, bool]:
    """The store at `out`, and whether it was there already. Documents that can't be read leave nothing behind."""
    folder = resolve(tokenizer)
    check_code(folder)
    inputs = [Path(path).expanduser() for path in asked.inputs]
    identity = {
        "verb": "data",
        "inputs": [str(path.resolve()) for path in inputs],
        "tokenizer": fingerprint(load_tokenizer(folder)),
        "held_out": asked.held_out,
        "seed": asked.seed,
    }
    stage = Stage(Path(out), identity, discard=UserError)
    if stage.done:
        return Store.open(stage.out), True
    with stage as partial:
        prepare(inputs, tokenizer=folder, out=partial, held_out=asked.held_out, seed=asked.seed, progress=progress)
    return Store.open(stage.out), False
