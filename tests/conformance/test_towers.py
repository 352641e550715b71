"""What every table says of a text model inside a whole, tried on every type that has one; nothing is per family."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from shearling.arch import towered
from shearling.axes.spec import Family
from shearling.conformance.finding import Finding, require
from shearling.conformance.small import TELLING
from shearling.conformance.targets import alone, together
from shearling.conformance.towers import (
    Whole,
    default_whole,
    defaults_of_parts,
    files_are_parts,
    identity_of_whole,
    image_matters,
    random_whole,
    table_is_whole,
    whole_is_cut,
    wholes,
)

TIED = TELLING[1]
HIDDEN = ("hidden",)
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
    configs = {"defaults": default_whole(family), **wholes(family)}
    require(table_is_whole(family, config, name) for name, config in configs.items())
    require(defaults_of_parts(family))


@pytest.mark.parametrize(("model_type", "name"), CASES)
def test_its_files_are_rows_and_what_is_carried(model_type: str, name: str, made) -> None:
    require([files_are_parts(made(model_type, name))])


@pytest.mark.parametrize(("model_type", "name"), CASES)
def test_masked_is_cut_is_reloaded_with_text_and_with_an_image(
    model_type: str, name: str, made, tmp_path: Path
) -> None:
    """Along hidden, and along all axes at once; each of the others is the text model's own affair."""
    whole = made(model_type, name)
    units = alone(whole.text)
    axes = dict.fromkeys(axis for unit in units for axis in unit)
    targets = {HIDDEN: units[HIDDEN], **together(whole.text, axes=axes)}
    require([image_matters(whole), *whole_is_cut(whole, targets, tmp_path)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("model_type", "name"), CASES)
def test_a_cut_of_nothing_is_the_source(model_type: str, name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    family = towered()[model_type]
    whole = random_whole(family, wholes(family)[name], tmp_path / "source", name=name, dtype=dtype)
    require([identity_of_whole(whole, tmp_path / "cut")])


def changed(model_type: str, **inside: object) -> Family:
    """A type's table with something else in what it says of the whole."""
    family = towered()[model_type]
    assert family.inside is not None
    return replace(family, inside=replace(family.inside, **inside))


def findings(family: Family, folder: Path) -> list[Finding]:
    """What is found of the tied whole, cut along hidden."""
    config = wholes(family)[TIED]
    table = table_is_whole(family, config, "wrong")
    if not table.held:
        return [table]
    whole = random_whole(family, config, folder / "source", name="wrong")
    files = files_are_parts(whole)
    if not files.held:
        return [files]
    return [*whole_is_cut(whole, {HIDDEN: alone(whole.text)[HIDDEN]}, folder)]


GEMMA3 = "model.multi_modal_projector.mm_input_projection_weight vision hidden"
DISK = "disk=multi_modal_projector.mm_input_projection_weight"
WRONG = {
    "features scaled as embeddings are": (
        changed("gemma3", connectors=f"embed {GEMMA3} scaled=hidden {DISK}"),
        "masked = cut = reloaded, an image",
    ),
    "features that hidden's mask isn't on": (
        changed("gemma3", connectors=f"inner {GEMMA3} {DISK}"),
        "masked = cut = reloaded, an image",
    ),
    "a connector without its bias": (
        changed("qwen3_5", connectors="join model.visual.merger.linear_fc2.weight hidden merged"),
        "keys",
    ),
    "another tower": (changed("gemma3", carried=("vision_tower.",)), "names on disk"),
    "a tower that isn't there": (changed("qwen3_5", carried=("model.visual.", "model.audio.")), "names on disk"),
    "other names on disk": (changed("gemma3", disk={"model.": "model.language_model."}), "names on disk"),
    "other names on the module": (changed("qwen3_5", module={"model.": "model.text_model."}), "table = whole"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_table_is_found_out(wrong: str, tmp_path: Path) -> None:
    family, check = WRONG[wrong]
    broken = {finding.check for finding in findings(family, tmp_path) if not finding.held}
    assert check in broken
    assert "masked = cut = reloaded, text" not in broken
