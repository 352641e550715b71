"""Three really different domains out of the Python installation itself: code, prose about it, and tables of names."""

import ast
import json
import sysconfig
import unicodedata
from collections.abc import Iterator
from pathlib import Path

DOMAIN_CHARACTERS = 1_500_000
NAMES_PER_DOCUMENT = 32


def write_corpus(out: Path) -> Path:
    """`out`/DOMAIN/text.jsonl for each domain, the same on every machine with the same Python."""
    for domain, documents in (("code", _code()), ("docs", _docs()), ("names", _names())):
        folder = out / domain
        folder.mkdir(parents=True)
        written = 0
        with open(folder / "text.jsonl", "w", encoding="utf-8") as file:
            for text in documents:
                file.write(json.dumps({"text": text}) + "\n")
                written += len(text)
                if written >= DOMAIN_CHARACTERS:
                    break
    return out


def _modules() -> Iterator[ast.Module]:
    """The standard library's modules, top level first. Tests and what doesn't parse are left out."""
    library = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(library.glob("*.py")) + sorted(library.glob("*/*.py"))
    for path in paths:
        if {"site-packages", "test", "tests", "idlelib", "pydoc_data", "encodings"} & set(path.parts):
            continue
        try:
            yield ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue


def _documented(module: ast.Module) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    yield from (node for node in ast.walk(module) if isinstance(node, kinds))


def _code() -> Iterator[str]:
    """Modules without comments and docstrings."""
    for module in _modules():
        for node in _documented(module):
            if ast.get_docstring(node) is not None and len(node.body) > 1:
                node.body = node.body[1:]
        yield ast.unparse(module)


def _docs() -> Iterator[str]:
    """The language reference that pydoc carries, then docstrings."""
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics))
    for module in _modules():
        found = (ast.get_docstring(node) for node in _documented(module))
        text = "\n\n".join(docstring for docstring in found if docstring and len(docstring) > 80)
        if text:
            yield text


def _names() -> Iterator[str]:
    """Characters and their Unicode names, in tables of consecutive ones."""
    lines = (f"{code:05X} {name}" for code in range(0x20000) if (name := unicodedata.name(chr(code), "")))
    table: list[str] = []
    for line in lines:
        table.append(line)
        if len(table) == NAMES_PER_DOCUMENT:
            yield "\n".join(table)
            table = []
