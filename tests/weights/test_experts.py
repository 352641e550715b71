"""Stacks of experts in autocast's dtype: what is multiplied in it, and that it comes to the same."""

import copy

import pytest
import torch
from small_experts import SIZES, small_experts
from small_models import Small, tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from shearling.axes.axis import mask_shape
from shearling.loss.cross_entropy import next_token_loss
from shearling.masks.attach import Attached
from shearling.weights.experts import autocast_experts

AXES = ("expert", "moe_intermediate")
IDS = tokens(40)


class Products(TorchDispatchMode):
    """The dtypes that grouped products are taken in, and of which they have an operand."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.dtype] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._grouped_mm.default:
            self.seen += [arg.dtype for arg in args[:2]]
        return func(*args, **(kwargs or {}))


def step(made: Small, *, compiled: bool = False) -> tuple[Tensor, dict[str, Tensor], set[torch.dtype]]:
    """Loss and gradients in bfloat16, and what the experts' products were taken in."""
    made.model.config._experts_implementation = "grouped_mm"  # as users have it
    if compiled:
        torch._dynamo.reset()
        for layer in made.model.base_model.layers:
            layer.compile(backend="aot_eager")
    with Products() as products:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = next_token_loss(made.model, IDS)
        loss.backward()
    gradients = {name: p.grad for name, p in made.model.named_parameters() if p.grad is not None}
    return loss, gradients, set(products.seen)


def masked(made: Small) -> Attached:
    attached = Attached(made.model, made.family, config=made.config, axes=AXES)
    generator = torch.Generator().manual_seed(5)
    shapes = {axis: mask_shape(axis, made.shape.axes) for axis in AXES}
    masks = {axis: 0.5 + 0.5 * torch.rand(shape, generator=generator) for axis, shape in shapes.items()}
    attached.set(masks, support=masks)
    return attached


def check_near(found: tuple, reference: tuple) -> None:
    torch.testing.assert_close(found[0], reference[0], rtol=5e-3, atol=0)
    assert found[1].keys() == reference[1].keys()
    whole = torch.cat([gradient.flatten() for gradient in reference[1].values()])
    other = torch.cat([gradient.flatten() for gradient in found[1].values()])
    assert all(gradient.dtype == torch.float32 for gradient in found[1].values())
    assert float((other - whole).norm() / whole.norm()) < 0.05


@pytest.mark.parametrize("under_masks", [False, True])
@pytest.mark.parametrize("model_type", SIZES)
def test_products_are_in_autocasts_dtype(model_type: str, under_masks: bool) -> None:
    found = []
    for narrowed in (False, True):
        made = small_experts(model_type, num_experts_per_tok=6)  # all: rounding can't have others chosen
        if narrowed:
            autocast_experts(made.model, made.family, made.config)
        if under_masks:
            masked(made)
        found.append(step(made))
        assert found[-1][2] == {torch.bfloat16 if narrowed else torch.float32}
        assert all(p.dtype == torch.float32 for p in made.model.parameters())
    check_near(found[1], found[0])


def test_compiled_it_is_the_same() -> None:
    found = []
    for compiled in (False, True):
        made = small_experts("mixtral")
        autocast_experts(made.model, made.family, made.config)
        found.append(step(made, compiled=compiled))
        assert found[-1][2] == {torch.bfloat16}
    check_near(found[1], found[0])


def test_without_autocast_nothing_is_cast() -> None:
    made = small_experts("olmoe")
    before = next_token_loss(copy.deepcopy(made.model), IDS)
    autocast_experts(made.model, made.family, made.config)
    assert torch.equal(next_token_loss(made.model, IDS), before)


def test_sizes_that_the_kernel_refuses_in_16_bits_stay() -> None:
    made = small_experts("olmoe", intermediate_size=20)
    autocast_experts(made.model, made.family, made.config)
    assert step(made)[2] == {torch.float32}
