"""What every table says of a text model inside a whole, tried on every type that has one; nothing is per family."""

from functools import cache
from pathlib import Path

import pytest
import torch

from shearling.arch import towered
from shearling.conformance.finding import require
from shearling.conformance.targets import alone, together
from shearling.conformance.towers import (
    Whole,
    defaults_of_parts,
    files_are_parts,
    identity_of_whole,
    image_matters,
    random_whole,
    table_is_whole,
    whole_is_cut,
    wholes,
)

CASES = [(model_type, name) for model_type, family in towered().items() for name in wholes(family)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One of a type's wholes, shared by the tests: they leave it as it was."""

    @cache
    def make(model_type: str, name: str) -> Whole:
        family = towered()[model_type]
        folder = tmp_path_factory.mktemp("whole")
        return random_whole(family, wholes(family)[name], folder, name=f"{model_type}, {name}")

    return make


@pytest.mark.parametrize("model_type", towered())
def test_the_table_is_the_whole(model_type: str) -> None:
    family = towered()[model_type]
    require(table_is_whole(family, config, name) for name, config in wholes(family).items())
    require(defaults_of_parts(family))


@pytest.mark.parametrize(("model_type", "name"), CASES)
def test_its_files_are_rows_and_what_is_carried(model_type: str, name: str, made) -> None:
    require([files_are_parts(made(model_type, name))])


@pytest.mark.parametrize(("model_type", "name"), CASES)
def test_masked_is_cut_is_reloaded_with_text_and_with_an_image(
    model_type: str, name: str, made, tmp_path: Path
) -> None:
    """Along each axis of the text model, and all at once."""
    whole = made(model_type, name)
    units = alone(whole.text)
    axes = dict.fromkeys(axis for unit in units for axis in unit)
    require([image_matters(whole), *whole_is_cut(whole, {**units, **together(whole.text, axes=axes)}, tmp_path)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("model_type", "name"), CASES)
def test_a_cut_of_nothing_is_the_source(model_type: str, name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    family = towered()[model_type]
    whole = random_whole(family, wholes(family)[name], tmp_path / "source", name=name, dtype=dtype)
    require([identity_of_whole(whole, tmp_path / "cut")])
