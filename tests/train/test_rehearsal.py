"""A step that is only rehearsed takes what the same step on tensors with storage takes, to the byte."""

import pytest
import torch
from small_models import small, small_of_any, tokens

from shearling.axes.axis import MASKABLE, mask_shape
from shearling.data.batch import Batch
from shearling.masks.attach import Attached
from shearling.train.checkpointing import checkpointing as recomputing
from shearling.train.objective import NextToken
from shearling.train.rehearsal import Ledger, _grouped, pretending, rehearse
from shearling.weights.adapters import Adapters
from shearling.weights.pretend import whole_windows, without_weights


def test_a_storage_counts_from_its_making_to_its_last_tensors_end() -> None:
    with Ledger("cpu") as ledger:
        with ledger.part("first"):
            x = torch.ones(10, 10)
        view = x[:5]  # no storage of its own
        with ledger.part("second"):
            y = x + x
        del x
        assert ledger.peak == {"first": 400, "second": 400}
        del view
        with ledger.part("third"):
            z = torch.ones(100)
        assert ledger.peak == {"first": 400, "second": 400}
        more = y + z.view(10, 10)
    assert ledger.peak == {"first": 0, "second": 400, "third": 400, "activations": 400}
    assert len(more) == 10


def test_casts_of_weights_moves_and_what_is_held() -> None:
    ledger, weight, packed = Ledger("cpu"), torch.ones(8, 4), torch.ones(8, 4)
    ledger.hold([weight], "weights")
    ledger.hold([packed], "teacher_weights", lambda tensor: tensor.numel())
    with ledger:
        half, other = weight.bfloat16(), torch.ones(4).bfloat16()
        gradient = torch.ones(8, 4)
        ledger.move(gradient, "gradients")
        last = torch.ones(1)
    assert ledger.peak == {
        "weights": 128,
        "teacher_weights": 32,
        "casts": 64,
        "gradients": 128,
        "activations": 8 + 4,  # the ones that `other` was made of are gone
    }
    assert half.dtype == other.dtype == torch.bfloat16
    assert len(last) == 1


def taken(model, made, *, masked: bool, autocast, accumulates: bool, adapters=None) -> dict[str, int]:
    ledger = Ledger("cpu")
    adapted = adapters.add(model, made.family, made.config) if adapters else ()
    ledger.hold(model.parameters(), "weights")
    if masked:
        axes = [axis for axis in MASKABLE if axis in made.shape.axes]
        with ledger, ledger.part("masks"):
            attached = Attached(model, made.family, config=made.config, axes=axes, adapted=adapted)
            masks = {a: torch.ones(mask_shape(a, made.shape.axes), requires_grad=True) for a in axes}
            attached.set(masks, support=masks)
    ids = torch.zeros(3, 33, dtype=torch.int64)
    batch = Batch(ids, (0, 1, 0))
    rehearse(model, NextToken(2), batch, ledger=ledger, autocast=autocast, accumulates=accumulates)
    return dict(ledger.peak)


@pytest.mark.parametrize(
    ("masked", "checkpointing", "autocast", "accumulates"),
    [
        (False, False, None, False),
        (True, False, None, True),
        (True, True, torch.bfloat16, True),
        (False, True, None, False),
        (True, "selective", torch.bfloat16, False),
    ],
)
def test_pretended_is_as_real(tmp_path, masked, checkpointing, autocast, accumulates) -> None:
    made = small("llama", vocab=200, tied=True)  # more ids than channels: a large head
    made.model.config.save_pretrained(tmp_path)

    def of(model) -> dict[str, int]:
        if checkpointing:
            model.train()
            model.activation_checkpointing_enable(recomputing("full" if checkpointing is True else checkpointing))
        return taken(model, made, masked=masked, autocast=autocast, accumulates=accumulates)

    torch.manual_seed(0)
    with pretending("cpu"), whole_windows():
        pretended = of(without_weights(tmp_path))
    assert torch.initial_seed() == 0
    assert pretended == of(without_weights(tmp_path))
    parameters = sum(p.numel() for p in made.model.parameters())
    assert pretended["weights"] == 4 * parameters
    if accumulates:
        assert pretended["gradients"] == 4 * parameters
    if autocast is not None and not masked:
        assert pretended["casts"] > 0


@pytest.mark.parametrize(("masked", "autocast"), [(False, None), (True, torch.bfloat16)])
def test_pretended_is_as_real_with_adapters(tmp_path, masked, autocast) -> None:
    made = small("llama", vocab=200, tied=True)
    made.model.config.save_pretrained(tmp_path)

    def of(model) -> dict[str, int]:
        return taken(model, made, masked=masked, autocast=autocast, accumulates=True, adapters=Adapters(4, 0))

    with pretending("cpu"), whole_windows():
        pretended = of(without_weights(tmp_path, dtype=torch.bfloat16))
    assert pretended == of(without_weights(tmp_path, dtype=torch.bfloat16))
    assert pretended["weights"] == 2 * sum(p.numel() for p in made.model.parameters()) + pretended["gradients"]


@pytest.mark.parametrize("kind", ["forward", "weight's gradient"])
def test_products_of_experts_have_their_shapes(kind) -> None:
    a, b, offsets = torch.randn(12, 16), torch.randn(3, 16, 8), torch.tensor([4, 4, 12], dtype=torch.int32)
    if kind != "forward":
        a, b = torch.randn(12, 16).T, torch.randn(12, 8)
    assert _grouped(a, b, offsets).shape == torch._grouped_mm(a.bfloat16(), b.bfloat16(), offsets).shape


def test_what_goes_through_experts_counts(tmp_path) -> None:
    made = small_of_any("qwen3_moe", tied=False)
    made.model.config.save_pretrained(tmp_path)
    with pretending("cpu"):
        found = taken(without_weights(tmp_path), made, masked=True, autocast=None, accumulates=True)
    assert found["weights"] == found["gradients"] == 4 * sum(p.numel() for p in made.model.parameters())
    assert found["activations"] > tokens(40).numel() * 4
