"""Families, each a table in a module of its own. Whatever Family a module here defines is known."""

from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from shearling.arch.sound import errors_with
from shearling.arch.whole import text_config
from shearling.axes.spec import Family
from shearling.errors import UserError, raise_all


@cache
def families() -> tuple[Family, ...]:
    """Every family that has a table and is a whole model, in the order of their modules' names."""
    return tuple(family for _, some in described() for family in some if family.inside is None)


@cache
def towered() -> Mapping[str, Family]:
    """By model type, the families whose text model lies inside a bigger checkpoint."""
    inside = (family for _, some in described() for family in some if family.inside is not None)
    return {model_type: family for family in inside for model_type in family.model_types}


@cache
def described() -> tuple[tuple[str, tuple[Family, ...]], ...]:
    """What each module of tables says of itself, and the families that it has."""
    modules = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]
    seen: set[int] = set()
    found = []
    for module in modules:
        own = [value for value in vars(module).values() if isinstance(value, Family) and id(value) not in seen]
        seen.update(map(id, own))
        if own:
            found.append((" ".join((module.__doc__ or "").split()), tuple(own)))
    return tuple(found)


def whole_of(model_type: str) -> Family | None:
    """The family of a type whose text model lies inside a whole; None for any other, and where nothing is known of it."""
    family = _adopted.get(model_type) or towered().get(model_type)
    return None if family is None or family.inside is None else family


_adopted: dict[str, Family] = {}  # by model type: families out of files that this process works with


def adopt(family: Family) -> None:
    """From here on `family_of` gives this family for its types: for what knows a model by its type alone, as losses do."""
    _adopted.update(dict.fromkeys(family.model_types, family))


def family_of(config: Mapping[str, Any], given: Family | None = None) -> Family:
    """The family of a Hugging Face config: the one `given`, out of a file, else the one that has a table here.

    Raises UserError for a config that has no table, for one that the given family isn't for, and for what in the given
    family has no meaning with it.
    """
    if given is not None:
        check_for(given, config)
        raise_all(errors_with(given, text_config(given, config)))
        adopt(given)
        return given
    alone = {model_type: family for family in families() for model_type in family.model_types}
    known = {**alone, **towered(), **_adopted}
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in known:
        return known[model_type]
    raise _unknown(config, sorted(known))


def _unknown(config: Mapping[str, Any], known: Sequence[str]) -> UserError:
    """Why a config has no table: which part of it, where it has parts."""
    model_type = config.get("model_type")
    parts = [key for key, value in config.items() if key.endswith("_config") and isinstance(value, Mapping)]
    others = [key for key in parts if key != "text_config"]
    expected = f"one of {', '.join(known)}"
    if others:
        text = config.get("text_config") or {}
        inner = text.get("model_type") if isinstance(text, Mapping) else None
        change = "no table says where its text model lies beside the rest"
        change += f": save that one alone, as {inner}, and shear it" if inner in known else ", nor what it is made of"
        found = f"{model_type!r}, a model with {' and '.join(others)} beside its text"
        return UserError("model_type", found=found, expected=expected, change=change)
    change = "have a table proposed: `shearling inspect MODEL --draft --out FILE`, then --arch FILE"
    return UserError("model_type", found=repr(model_type), expected=expected, change=change)


def check_for(family: Family, config: Mapping[str, Any]) -> None:
    """Raises UserError unless the family is one for this config: of its model type, and with all that it requires."""
    model_type = config.get("model_type")
    if model_type not in family.model_types:
        expected, change = f"one of {', '.join(family.model_types)}", "give the file of this model's own family"
        raise UserError(f"model_type of a {family.name}", found=repr(model_type), expected=expected, change=change)
    raise_all(
        [
            UserError(
                f"config.json: {key}",
                found=repr(config.get(key)),
                expected=f"{wanted!r}, with which the family {family.name} was proved",
                change="draft a family for this config: `shearling inspect MODEL --draft --out FILE`",
            )
            for key, wanted in family.requires.items()
            if config.get(key) != wanted
        ]
    )
