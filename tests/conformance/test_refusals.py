"""Shapes that a family can't be cut to are refused, with its own reason or with the nearest that it can."""

import re

import pytest

from shearling.arch import families
from shearling.axes.axis import FOLLOWS
from shearling.axes.shape import Shape, shape_of
from shearling.axes.target import resolve_target, uncut
from shearling.conformance.small import telling
from shearling.errors import UserError

TYPES = {model_type: family for family in families() for model_type in family.model_types}
COUPLED = [model_type for model_type, family in TYPES.items() if family.coupled]


def wanted_at(shape: Shape, **sizes: int) -> dict[str, int]:
    """The target that asks for these entries per axis."""
    smaller = {**shape.axes, **sizes}
    return {key: dim.size(smaller) for key, dim in shape.dims.items() if dim.size(smaller) != shape[key]}


@pytest.mark.parametrize("model_type", TYPES)
def test_an_axis_that_can_not_be_cut_along_is_refused_with_the_reason(model_type: str) -> None:
    family = TYPES[model_type]
    for config in telling(family, model_type).values():
        shape = shape_of(family, config)
        reasons = uncut(family, config)
        for axis in reasons.keys() & shape.axes.keys() - FOLLOWS.keys():
            if shape.axes[axis] > 1:
                wanted = wanted_at(shape, **{axis: shape.axes[axis] - 1})
                with pytest.raises(UserError, match=re.escape(reasons[axis])):
                    resolve_target(family, shape, wanted, config)


@pytest.mark.parametrize("model_type", COUPLED)
def test_a_shape_that_the_coupling_forbids_is_refused_with_the_nearest(model_type: str) -> None:
    family = TYPES[model_type]
    config = next(iter(telling(family, model_type).values()))
    shape = shape_of(family, config)
    wanted = {"hidden_size": shape["hidden_size"] - 1, "num_attention_heads": shape["num_attention_heads"]}
    with pytest.raises(UserError, match=r"to which the model's code ties it; choose .*=\d+") as caught:
        resolve_target(family, shape, wanted, config)
    nearest = re.findall(r"hidden_size=(\d+)", caught.value.change)
    assert nearest == [str(shape["hidden_size"])]
