"""`inspect` on real configs: family and axes of each."""

from pathlib import Path

import pytest

from shearling.arch import families
from shearling.axes.axis import MASKABLE
from shearling.verbs.inspect import inspect

CONFIGS = sorted((Path(__file__).parents[3] / "shared" / "data" / "configs").glob("*/config.json"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.parent.name)
def test_inspect_names_family_and_axes_of_every_config_at_hand(path: Path) -> None:
    found = inspect(str(path))
    assert found["family"] in {family.name for family in families()}
    assert found["axes"].keys() >= {"hidden", "layer", "vocab"}
    cut_along = set(found["cut_along"])
    assert {"hidden", "layer"} <= cut_along
    assert cut_along <= set(MASKABLE)
    assert not cut_along & found["left_whole"].keys()
    # A size of 1 can neither be cut nor is anything to be said of it.
    assert {axis for axis, size in found["axes"].items() if size > 1} <= cut_along | found["left_whole"].keys()
    assert all(found["left_whole"].values())
    assert found["parameters"] == sum(found["parameters_by_group"].values()) > 10**8
