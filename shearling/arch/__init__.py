"""Families, each a table in a module of its own. Whatever Family a module here defines is known."""

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from shearling.axes.spec import Family
from shearling.errors import UserError, nearest


@cache
def families() -> tuple[Family, ...]:
    """Every family that has a table, in the order of their modules' names."""
    modules = (import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__))
    found = (value for module in modules for value in vars(module).values() if isinstance(value, Family))
    return tuple({id(family): family for family in found}.values())


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a Hugging Face config. Raises UserError for one that has no table."""
    known = {model_type: family for family in families() for model_type in family.model_types}
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in known:
        return known[model_type]
    raise UserError(
        "model_type",
        found=repr(model_type),
        expected=f"one of {', '.join(sorted(known))}",
        change="use a model of one of these families; " + nearest(str(model_type), sorted(known)),
    )
