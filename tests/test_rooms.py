"""The directions of docs/architecture.md: imports point down, siblings don't meet, the light rooms stay light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "shearling"
ANYONE = {"shearling", "errors", "strict_yaml"}

# A room may import what stands in a lower row, and of its own row itself alone.
ROWS = (
    ("cli",),
    ("run", "demo", "draft"),
    ("verbs",),
    ("conformance",),
    ("recipe",),
    ("masks", "cut", "train", "teacher", "eval", "report"),
    ("data", "mixture", "loss", "weights", "record", "stage"),
    ("arch", "ranks"),
    ("axes",),
)
LEVEL = {room: level for level, row in enumerate(ROWS) for room in row}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


FILES = sorted(path for path in PACKAGE.rglob("*.py") if room_of(path) not in ("__init__", "errors", "strict_yaml"))


def test_every_room_has_its_place() -> None:
    assert {room_of(path) for path in FILES} == set(LEVEL)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    here = room_of(path)
    for name in imports(path):
        if not name.startswith("shearling"):
            continue
        there = name.split(".")[1] if "." in name else "shearling"
        if there in ANYONE or there == here:
            continue
        assert LEVEL[there] > LEVEL[here], f"{here} imports {there}"


PURE = ("axes", "arch", "mixture")


@pytest.mark.parametrize("path", [p for p in FILES if room_of(p) in PURE], ids=lambda path: path.name)
def test_the_pure_rooms_stand_on_the_standard_library(path: Path) -> None:
    for name in imports(path):
        # A family may be a file, and that is YAML.
        yaml = {"yaml"} if path.name == "file.py" and room_of(path) == "arch" else set()
        assert name.partition(".")[0] in {*sys.stdlib_module_names, "shearling", *yaml}, name


BANNED_CALLS = {"eval", "exec", "system", "popen", "urlopen"}
BANNED_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "requests", "urllib", "socketserver"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_runs_code_or_unpickles(path: Path) -> None:
    assert not {name.partition(".")[0] for name in imports(path)} & BANNED_MODULES
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            # model.eval() and the verb's own function are calls without text in them.
            assert called not in BANNED_CALLS or not node.args, f"line {node.lineno}: {called}"
            is_torch = isinstance(node.func, ast.Attribute) and getattr(node.func.value, "id", "") == "torch"
            assert not (is_torch and called == "load"), f"line {node.lineno}: torch.load"
            for keyword in node.keywords:
                if keyword.arg == "trust_remote_code":
                    assert isinstance(keyword.value, ast.Constant)
                    assert keyword.value.value is False


@pytest.mark.parametrize("module", ["shearling", "shearling.arch", "shearling.verbs.inspect", "shearling.cli"])
def test_light_imports(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
