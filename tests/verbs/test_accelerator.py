"""The verbs on an accelerator, a stand-in that is as strict as MPS (tests/standin.cpp), against the same on a CPU."""

import re
import signal
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torchgen
import yaml
from killed import losses, weights
from small_models import MODEL_TYPES, OTHERS
from standin import on_standin
from standin_work import There, killed, limited, masked_steps, refusals, squeezed, there

from shearling.conformance.model import relative
from shearling.record import read
from shearling.verbs.evaluate import evaluate
from shearling.verbs.heal import heal
from shearling.verbs.prune import prune

pytestmark = pytest.mark.slow  # a library is compiled first

TABLE = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
DYNAMIC = {"schedule": "dynamic", "rule": "paper", "every": 3}
PRUNING = {
    "soft top-k": {"method": "masks", "steps": 8, "save_every": 3},
    "hard concrete": {"method": "masks", "steps": 8, "masks": {"relaxation": "hard_concrete"}, "mixture": DYNAMIC},
    "masks only": {"method": "masks", "steps": 8, "masks_only": True},
    "scores": {"method": "activation"},
}
TEACHER = {"share": 0.5, "hidden": 0.1, "dtype": "float32"}  # in bfloat16 by default, off a CPU
HEALING = {
    "plain": {"steps": 8, "micro_sequences": 1},
    "taught": {"steps": 8, "mixture": DYNAMIC, "teacher": TEACHER, "separate_documents": True},
    "recomputed": {"steps": 4, "activation_checkpointing": "selective"},
    "adapters": {"steps": 8, "lora_rank": 4, "activation_checkpointing": "full", "micro_sequences": "auto"},
    "bfloat16": {"steps": 4, "autocast": "bfloat16"},
}
# Weights in bfloat16 are as alike as that rounding leaves them.
CLOSE = {"masks only": 0.02, "adapters": 0.02, "bfloat16": 0.02}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the stand-in's library is."""
    return tmp_path_factory.mktemp("standin")


@cache
def kernels() -> dict[str, Any]:
    """torch's own table of kernels, by operator."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    entries = yaml.load(TABLE.read_text(encoding="utf-8"), Loader=loader)
    return {entry["func"].partition("(")[0]: entry for entry in entries}


def without_mps(names: list[str]) -> list[str]:
    """Of these operators, those that torch has no kernel for on MPS."""

    def known(name: str) -> bool:
        entry = kernels()[name]
        if "structured_delegate" in entry:
            return known(entry["structured_delegate"])
        keys = {key.strip() for keys in entry.get("dispatch", {}) for key in keys.split(",")}
        return not keys or "MPS" in keys or any(key.startswith("Composite") for key in keys)

    return [name for name in names if not known(name.removeprefix("aten::"))]


def check_alike(found: Any, expected: Any, *, rel: float) -> None:
    assert found.losses == pytest.approx(dict(expected.losses), rel=rel)


def check_same_there(
    name: str, verb: Any, ask: Any, *, out: Path, folder: Path, count: int = 1, offload: bool = False, **options: Any
) -> There:
    """A verb on a CPU, into out/cpu, and on so many stand-ins, into out/there; what it was on the first of these."""
    options = {**PRUNING, **HEALING}[name] | options
    expected = verb(out=str(out / "cpu"), asked=ask(**options))
    on_it = partial(verb, out=str(out / "there"), asked=ask(**options, offload=offload, device="standin"))
    seen = on_standin(folder, there, on_it, count=count)
    for one in seen:
        check_alike(one.found, expected, rel=CLOSE.get(name, 1e-5))
    return seen[0]


def test_the_stand_in_is_strict(folder):
    (seen,) = on_standin(folder, there, refusals)
    float64, mixed, room, total = seen.found
    assert "no float64" in float64
    assert "same device" in mixed
    assert "bytes" in room
    assert total == "12.0"
    assert "aten::mm.out" in seen.operators
    assert without_mps([*seen.operators, "aten::_cudnn_rnn"]) == ["aten::_cudnn_rnn"]


@pytest.mark.parametrize("name", PRUNING)
def test_pruning(name, tmp_path, folder, model_folder, store_folder, ask_prune):
    verb = partial(prune, str(model_folder), data=str(store_folder))
    seen = check_same_there(name, verb, ask_prune, out=tmp_path, folder=folder)
    kept = [[e["kept"] for e in read(tmp_path / place / "record.jsonl") if "kept" in e] for place in ("cpu", "there")]
    assert kept[0] == kept[1] != []
    assert without_mps(seen.operators) == []


@pytest.mark.parametrize("name", HEALING)
def test_healing(name, tmp_path, folder, cut, store_folder, ask_heal):
    verb = partial(heal, str(cut), data=str(store_folder))
    seen = check_same_there(name, verb, ask_heal, out=tmp_path, folder=folder)
    assert without_mps(seen.operators) == []


def test_measuring(tmp_path, folder, cut, store_folder):
    verb = partial(evaluate, str(cut), data=str(store_folder))
    expected = verb(device="cpu")
    (seen,) = on_standin(folder, there, partial(verb, device="standin"))
    check_alike(seen.found, expected, rel=1e-5)
    assert without_mps(seen.operators) == []


def test_what_is_kept_of_a_teacher(tmp_path, folder, cut, store_folder, ask_heal):
    asked = ask_heal(steps=4, teacher={"share": 0.5, "cache": str(tmp_path / "cache")}, device="standin")
    verb = partial(heal, str(cut), data=str(store_folder), asked=asked)
    (once,), (again,) = (on_standin(folder, there, partial(verb, out=str(tmp_path / name))) for name in ("a", "b"))
    assert dict(once.found.losses) == dict(again.found.losses)
    assert without_mps(once.operators) == []


def test_going_on_to_the_bit(tmp_path, folder, cut, store_folder, ask_heal):
    asked = ask_heal(steps=8, save_every=2, mixture=DYNAMIC, device="standin")
    verb = partial(heal, str(cut), data=str(store_folder), asked=asked)
    calm, out = tmp_path / "calm", tmp_path / "killed"
    on_standin(folder, partial(verb, out=str(calm)))
    on_standin(folder, killed, partial(verb, out=str(out)), 5, tmp_path / "killed.partial", code=-signal.SIGKILL)
    on_standin(folder, partial(verb, out=str(out)))
    assert [event["step"] for event in read(out / "record.jsonl") if event["event"] == "resumed"] != []
    assert weights(out) == weights(calm)
    assert losses(out) == losses(calm)


@pytest.mark.parametrize(
    ("name", "count", "offload"),
    [("taught", 1, True), ("taught", 2, False)]
    + [(name, 2, True) for name in ("soft top-k", "hard concrete", "masks only", "taught", "adapters", "bfloat16")],
)
def test_sharded(name, count, offload, tmp_path, folder, cut, store_folder, ask_prune, ask_heal):
    """Over ranks, each with a device, and with most of it in the computer's memory."""
    verb, ask = (prune, ask_prune) if name in PRUNING else (heal, ask_heal)
    verb = partial(verb, str(cut), data=str(store_folder))
    check_same_there(name, verb, ask, out=tmp_path, folder=folder, count=count, offload=offload, micro_sequences=1)


def test_offload_takes_weights_off_the_device(tmp_path, folder, cut, store_folder, ask_heal):
    most = []
    for offload in (False, True):
        asked = ask_heal(steps=2, micro_sequences=1, offload=offload, device="standin")
        verb = partial(heal, str(cut), data=str(store_folder), out=str(tmp_path / str(offload)), asked=asked)
        (seen,) = on_standin(folder, there, verb)
        most.append(seen.nbytes)
    assert most[0] - most[1] > 2 * 4 * seen.found.parameters


def test_what_cant_fit_is_refused(tmp_path, folder, cut, store_folder, ask_heal):
    asked = ask_heal(steps=4, batch_tokens=1024, micro_sequences=32, device="standin")
    verb = partial(heal, str(cut), data=str(store_folder), out=str(tmp_path / "out"), asked=asked)
    (told,) = on_standin(folder, limited, verb, 1 << 20)
    assert re.search(r"^memory for training on standin: found .*\(1048576 bytes\) free", told)
    assert "would fit: --micro-batch 2 (" in told


def test_a_step_that_runs_out_is_taken_in_halves(tmp_path, folder, cut, store_folder, ask_heal):
    options = {"steps": 6, "batch_tokens": 1024, "micro_sequences": "auto"}
    verb = partial(heal, str(cut), data=str(store_folder))
    expected = verb(out=str(tmp_path / "cpu"), asked=ask_heal(**options))
    out = tmp_path / "there"
    (found,) = on_standin(folder, squeezed, partial(verb, out=str(out), asked=ask_heal(**options, device="standin")), 3)
    check_alike(found, expected, rel=1e-5)
    assert [e["micro_sequences"] for e in read(out / "record.jsonl") if e["event"] == "micro_batch"] == [16]


def test_masks_of_every_family(folder):
    """Of each type a masked step's loss and gradients, and one-shot scores."""
    types = [*MODEL_TYPES, *OTHERS]
    (seen,) = on_standin(folder, there, masked_steps, types, "standin")
    for name, found, expected in zip(types, seen.found, masked_steps(types, "cpu"), strict=True):
        assert relative(found.loss, expected.loss) < 1e-6, name
        largest = max(float(gradient.abs().max()) for gradient in expected.gradients.values())
        for path, gradient in expected.gradients.items():
            assert float((found.gradients[path] - gradient).abs().max()) < 3e-5 * largest, f"{name}: {path}"
        for axis, scores in expected.scores.items():
            assert relative(found.scores[axis], scores) < 1e-5, f"{name}: {axis}"
    assert without_mps(seen.operators) == []
