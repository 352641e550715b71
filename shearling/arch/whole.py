"""A text model's config out of the whole's that it is a part of, and a changed one put back."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from shearling.axes.inside import Inside
from shearling.axes.shape import Shape
from shearling.axes.spec import Family
from shearling.errors import UserError, raise_all

TIES = "tie_word_embeddings"
DTYPES = ("dtype", "torch_dtype")
SHARED = (TIES, *DTYPES)  # where the whole and its text model both say them, transformers goes by the whole


def text_config(family: Family, whole: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config that a family's tables are about: the text model's, or all of it where there is no other part.

    What the tables ask of the whole's other parts stands in it under dotted keys. Raises UserError for parts that
    aren't what the family knows.
    """
    inside = family.inside
    if inside is None:
        return whole
    raise_all(_refusals(inside, whole))
    shared = {key: whole[key] for key in SHARED if key in whole}
    said = {
        TIES,
        *(DTYPES if shared.keys() & set(DTYPES) else ()),
    }  # by the whole: what the text says of it is passed over
    own = {key: value for key, value in whole[inside.key].items() if key not in said}
    beside = {key: _at(whole, key) for key in family.defaults if "." in key and _at(whole, key) is not None}
    return {**own, **shared, **beside, "model_type": inside.text_type}


def whole_config(family: Family, whole: Mapping[str, Any], text: Mapping[str, Any], shape: Shape) -> dict[str, Any]:
    """The whole's config with another text model in it: `text` is a changed `text_config`, `shape` its sizes."""
    inside = family.inside
    if inside is None:
        return dict(text)
    result, before = deepcopy(dict(whole)), text_config(family, whole)
    own = result[inside.key]
    for key, value in text.items():
        if key in before and before[key] == value:
            continue
        if key not in SHARED:
            own[key] = value
            continue
        result[key] = value
        own |= {each: value for each in DTYPES if each in own}
    for key, size in inside.follows.items():
        if family.setting(before, key) != shape[size]:
            part, _, name = key.partition(".")
            result[part][name] = shape[size]
    return result


def check_parts(family: Family, config: Mapping[str, Any], shape: Shape) -> None:
    """Raises UserError where another part of the whole has a size that isn't the text model's."""
    follows = {} if family.inside is None else family.inside.follows
    raise_all(
        [
            UserError(
                f"config.json: {key}",
                found=family.setting(config, key),
                expected=f"{shape[size]}, the text model's {size}",
                change="mend config.json",
            )
            for key, size in follows.items()
            if family.setting(config, key) != shape[size]
        ]
    )


def _refusals(inside: Inside, whole: Mapping[str, Any]) -> list[UserError]:
    text = whole.get(inside.key)
    if not isinstance(text, Mapping):
        expected, change = f"the config of a {inside.text_type}", "use a model folder that transformers wrote"
        return [UserError(f"config.json: {inside.key}", found=repr(text), expected=expected, change=change)]
    found = []
    own = text.get("model_type", inside.text_type)
    if own != inside.text_type:
        change = f"a {whole.get('model_type')} has no other text model: mend config.json"
        found.append(
            UserError(
                f"config.json: {inside.key}.model_type", found=repr(own), expected=inside.text_type, change=change
            )
        )
    for key, why in inside.refused.items():
        value = _at(whole, key)
        if value:
            change = "shear its text model alone, saved by itself"
            found.append(UserError(f"config.json: {key}", found=repr(value), expected=f"nothing: {why}", change=change))
    return found


def _at(config: Mapping[str, Any], key: str) -> Any:
    """A value by its dotted key, None where there is none."""
    part, _, name = key.partition(".")
    inner = config.get(part)
    return inner.get(name) if isinstance(inner, Mapping) else None
