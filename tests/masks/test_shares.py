"""Vectors of all layers made at once: values by the definition, as many operations for few layers as for many."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from small_experts import small_experts
from small_models import Small, small, tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from shearling.axes.axis import FOLLOWS, MASKABLE, Dim, is_per_layer, mask_shape
from shearling.axes.index import positions
from shearling.loss.cross_entropy import next_token_loss
from shearling.masks.attach import Attached
from shearling.masks.shares import Part, Rows, Share

SIZES = {"layer": 3, "hidden": 10, "kv_head": 2, "group": 3, "head_dim": 4, "rotary": 4, "intermediate": 5}
SIZES |= {"expert": 3, "moe_intermediate": 2}
DIMS = (
    "hidden",
    "kv_head*group*head_dim",
    "kv_head*group*head_dim + 2*kv_head*head_dim",
    "kv_head*group*rotary + kv_head*head_dim",
    "2*intermediate",
    "kv_head*2*head_dim",
    "expert*moe_intermediate",
)


def masks_of(sizes: Mapping[str, int], *axes: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {a: torch.rand(mask_shape(a, sizes), generator=generator, dtype=torch.float64) for a in axes}


@pytest.mark.parametrize("text", DIMS)
def test_a_part_is_the_mask_at_its_positions(text: str) -> None:
    """Values and gradients, however the part does without an index."""
    dim = Dim.parse(text)
    for axis in dim.axes():
        (mask,) = masks_of(SIZES, axis).values()
        mask.requires_grad_()
        where = positions(dim, axis, SIZES)
        found = Part.at(axis, where, SIZES, "cpu").of({axis: mask})
        rows = mask.reshape(3, -1) if is_per_layer(axis) else mask.reshape(1, -1)
        expected = torch.stack([torch.stack([row[i] if i >= 0 else torch.tensor(1.0) for i in where]) for row in rows])
        assert torch.equal(found, expected), axis
        weights = torch.rand(expected.shape)
        got, wanted = (torch.autograd.grad((value * weights).sum(), mask)[0] for value in (found, expected))
        torch.testing.assert_close(got, wanted)


def test_what_needs_no_index_has_none() -> None:
    heads = Dim.parse("kv_head*group*head_dim")
    parts = [Part.at(axis, positions(heads, axis, SIZES), SIZES, "cpu") for axis in ("kv_head", "group")]
    assert [(part.where, part.each) for part in parts] == [(None, 12), (None, 4)]


@pytest.mark.parametrize("entries", [1, 3, 4, 10])
def test_rows_are_aligned_tensors_of_their_own(entries: int) -> None:
    rows = Rows.ones(Share((), 3, entries), "cpu", entries=entries)
    leaf = rows.at(2).requires_grad_()
    assert leaf is rows.at(2)
    assert leaf.is_leaf
    assert not rows.buffer.requires_grad
    assert leaf.data_ptr() == rows.buffer[2].data_ptr()
    assert leaf.data_ptr() % 16 == rows.buffer.data_ptr() % 16


class Operations(TorchDispatchMode):
    """Counts what is dispatched while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[str(func)] += 1
        return func(*args, **(kwargs or {}))


def operations(made: Small) -> Counter[str]:
    """Of setting the masks and of pushing their gradients, in a step."""
    axes = [axis for axis in MASKABLE if axis in made.shape.axes and axis not in FOLLOWS]
    masks = {axis: mask.float().requires_grad_() for axis, mask in masks_of(made.shape.axes, *axes).items()}
    attached = Attached(made.model, made.family, config=made.config, axes=axes)
    with Operations() as setting:
        attached.set(masks, support=masks)
    next_token_loss(made.model, tokens(made.shape["vocab_size"])).backward()
    with Operations() as pushing:
        attached.push()
    assert all(mask.grad is not None for mask in masks.values())
    return setting.found + pushing.found


@pytest.mark.parametrize("make", [small, small_experts])
def test_as_many_operations_at_any_number_of_layers(make: Any) -> None:
    name = "qwen3" if make is small else "qwen3_moe"
    few, many = (operations(make(name, layers=layers)) for layers in (2, 6))
    assert few == many
    assert few.total() < 150


def test_blocks_of_all_layers_share_what_was_compiled() -> None:
    graphs = {}
    for layers in (2, 4):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        made = small("llama", layers=layers)
        masks = {a: m.float().requires_grad_() for a, m in masks_of(made.shape.axes, "hidden", "intermediate").items()}
        attached = Attached(made.model, made.family, config=made.config, axes=tuple(masks))
        for layer in range(layers):
            made.model.get_submodule(made.family.block(layer)).compile(backend="eager")
        for _ in range(2):
            attached.set(masks, support=masks)
            next_token_loss(made.model, tokens(made.shape["vocab_size"])).backward()
            attached.push()
        graphs[layers] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()
    assert graphs == {2: 1, 4: 1}
