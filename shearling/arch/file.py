"""A family as a YAML file: the fields of axes/spec.Family and nothing else, for `--arch FILE` and what `--draft` writes."""

import hashlib
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from shearling.arch.sound import errors_in
from shearling.axes.spec import Family
from shearling.errors import UserError, nearest, raise_all
from shearling.strict_yaml import read_mapping

FILE = "family.yaml"  # what a model folder holds where the model's family is no module of this package
PLAIN = (str, int, float, bool, NoneType)


def given(model: Path, arch: str | None) -> Family | None:
    """The family that isn't looked up: in the file `arch`, or else in the model's folder. Raises UserError: see `load`."""
    if arch is not None:
        return load(Path(arch).expanduser())
    return load(model / FILE) if (model / FILE).is_file() else None


def load(path: Path) -> Family:
    """The family in a file. Raises UserError for what can't be read, naming the field."""
    values = read_mapping(path, what="family", change="see docs/add-a-family.md")
    return parse(values, where=f"family {path}")


def parse(values: Mapping[str, Any], *, where: str = "family") -> Family:
    """The family that plain values describe.

    Raises UserError for a field that is unknown, missing or of another kind, and for all that `errors_in` finds.
    """
    family = _made(Family, values, where)
    raise_all(errors_in(family, where))
    return family


def dump(family: Family) -> str:
    """The file of a family: every field that isn't at its default, the table's lines without their margin."""
    table = "\n".join(line.strip() for line in family.table.strip().splitlines()) + "\n"
    return yaml.dump({**_plain(family), "table": table}, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)


def digest(family: Family) -> str:
    """What makes a family this one: a hash of all that its file holds."""
    return hashlib.sha256(dump(family).encode()).hexdigest()


def _made(kind: Any, value: Any, where: str) -> Any:
    """A value of this type out of plain ones. Raises UserError, with the way to the field in front."""
    origin = get_origin(kind)
    if kind is Any:
        return value
    if origin in (Union, UnionType):
        return _one_of(get_args(kind), value, where)
    if is_dataclass(kind):
        return _dataclass(kind, value, where)
    if origin is tuple:
        found = _checked(value, list, "a list", where)
        return tuple(_made(get_args(kind)[0], one, f"{where}, entry {i}") for i, one in enumerate(found))
    if origin is not None and issubclass(origin, Mapping):
        found = _checked(value, dict, "keys and values", where)
        return {key: _made(get_args(kind)[1], one, f"{where}.{key}") for key, one in found.items()}
    if kind is float and type(value) is int:
        return float(value)
    return _checked(value, kind, f"a {kind.__name__}", where)


def _dataclass(kind: Any, value: Any, where: str) -> Any:
    found = _checked(value, dict, "keys and values", where)
    hints, known = get_type_hints(kind), {f.name: f for f in fields(kind) if f.init}
    for key in found:
        if key not in known:
            change = nearest(str(key), list(known))
            raise UserError(where, found=f"an unknown field {key!r}", expected="a known one", change=change)
    for name, one in known.items():
        if name not in found and one.default is MISSING and one.default_factory is MISSING:
            raise UserError(where, found=f"no {name}", expected="it", change=f"add {name}: see docs/add-a-family.md")
    made = {key: _made(hints[key], one, f"{where}, {key}") for key, one in found.items()}
    try:
        return kind(**made)
    except ValueError as error:  # a table's line
        raise UserError(where, found=str(error), expected="a table as in shearling/arch/", change="mend it") from error


def _one_of(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    """The first type that fits; what is wrong with the likeliest where none does."""
    errors = []
    for kind in kinds:
        try:
            return _made(kind, value, where)
        except UserError as error:
            errors.append(error)
    # Of "one, or several by name" the second is meant where the values are mappings themselves.
    nested = isinstance(value, dict) and all(isinstance(one, dict) for one in value.values())
    raise errors[-1 if nested else 0]


def _checked(value: Any, kind: Any, expected: str, where: str) -> Any:
    if type(value) is not kind:
        raise UserError(where, found=repr(value), expected=expected, change="mend the file")
    return value


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        kept = (f for f in fields(value) if f.init and not _is_default(f, getattr(value, f.name)))
        return {f.name: _plain(getattr(value, f.name)) for f in kept}
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(one) for one in value]
    assert isinstance(value, PLAIN), value
    return value


def _is_default(field: Any, value: Any) -> bool:
    if field.default is not MISSING:
        return value == field.default and type(value) is type(field.default)
    return field.default_factory is not MISSING and value == field.default_factory()


class _Dumper(yaml.SafeDumper):
    """Texts of several lines, a table above all, as they are read."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    # What has blanks at a line's end, or begins with some, has no plain block form.
    style = "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)
