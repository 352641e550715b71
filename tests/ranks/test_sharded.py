"""Sharded over two ranks: the gradients of weights and masks are those of one process in float64."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from time import sleep

import pytest
import torch
from small_experts import small_experts
from small_models import Small, small, small_of_any
from torch import Tensor
from torch.distributed.tensor import DTensor
from two_ranks import on_ranks

from shearling.axes.axis import FOLLOWS, MASKABLE, mask_shape
from shearling.data.batch import Batch
from shearling.errors import UserError
from shearling.masks.attach import Attached
from shearling.ranks.ranks import ALONE, Ranks, joined
from shearling.ranks.rows import gathered
from shearling.ranks.sharded import inside
from shearling.train.objective import NextToken
from shearling.verbs.source import Source
from shearling.verbs.together import load_under_masks

MADE = {
    "llama, tied": partial(small, "llama", tied=True, biases=True),
    "qwen3": partial(small, "qwen3"),
    "gpt2": partial(small_of_any, "gpt2", tied=True),
    "gemma2": partial(small_of_any, "gemma2", tied=True),
    "qwen3_moe": partial(small_experts, "qwen3_moe"),
}
Gradients = dict[str, Tensor]


def masks_of(made: Small) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    axes = [axis for axis in MASKABLE if axis in made.shape.axes and axis not in FOLLOWS]
    masks = {axis: 0.1 + 0.9 * torch.rand(mask_shape(axis, made.shape.axes), generator=generator) for axis in axes}
    return {axis: mask.requires_grad_() for axis, mask in masks.items()}


def gradients(
    attached: Attached,
    masks: dict[str, Tensor],
    batch: Batch,
    ranks: Ranks,
    *,
    micro: int,
    compute: torch.dtype | None = None,
) -> Gradients:
    """Of the mean loss over a batch of which this rank has its part, all of each of them."""
    attached.set(masks, support=masks)
    targets = ranks.sum(batch.num_targets())
    for part in batch.split(micro):
        with torch.autocast("cpu", dtype=compute, enabled=compute is not None):
            losses = inside(attached.model, NextToken(1), part)
        (losses.total * (ranks.count / targets)).backward()
    attached.push(over_ranks=lambda gradient: ranks.add_up(gradient) / ranks.count)
    named = {name: p.grad for name, p in attached.model.named_parameters()} | {a: m.grad for a, m in masks.items()}
    return {name: gathered(grad).clone() for name, grad in named.items() if grad is not None}


def on_one_rank(
    made: Small, folder: Path, checkpointing: bool = False, offload: bool = False, compute: torch.dtype | None = None
) -> tuple[Gradients, int]:
    with joined("cpu") as (ranks, device):
        ranks = replace(ranks, offload=offload)
        masks = masks_of(made)
        source = Source.open(str(folder))
        attached = load_under_masks(source, tuple(masks), device=device, ranks=ranks, compute=compute)
        assert all(isinstance(parameter, DTensor) for parameter in attached.model.parameters())
        held = sum(gathered_bytes(parameter) for parameter in attached.model.parameters())
        if checkpointing:
            attached.model.train()
            attached.model.activation_checkpointing_enable({"use_reentrant": False})
        ids = made.ids(sequences=4)[ranks.rank * 2 : ranks.rank * 2 + 2]
        return gradients(attached, masks, Batch(ids, (0, 0)), ranks, micro=1, compute=compute), held


def gathered_bytes(parameter: Tensor) -> int:
    return parameter.to_local().nbytes if isinstance(parameter, DTensor) else parameter.nbytes


CASES = [*((name, False, False) for name in MADE), ("qwen3", True, False), ("qwen3", False, True)]


@pytest.mark.parametrize(("name", "checkpointing", "offload"), CASES)
def test_gradients_of_weights_and_masks(name: str, checkpointing: bool, offload: bool, tmp_path: Path) -> None:
    made = MADE[name]()
    made.model.save_pretrained(tmp_path)
    (found, held), (other, _) = on_ranks(on_one_rank, made, tmp_path, checkpointing, offload)
    expected = in_float64(made)
    assert found.keys() == other.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for key, gradient in expected.items():
        assert torch.equal(found[key], other[key]), key
        error = float((found[key] - gradient).abs().max()) / max(float(gradient.abs().max()), 1e-3 * largest)
        assert error < 1e-5, f"{key}: {error}"
    assert held < 0.6 * sum(parameter.numel() * 4 for parameter in made.model.parameters())


def in_float64(made: Small) -> Gradients:
    """Of one process; the model is float64 from here on."""
    made.model.double()
    masks = {axis: mask.detach().double().requires_grad_() for axis, mask in masks_of(made).items()}
    attached = Attached(made.model, made.family, config=made.config, axes=tuple(masks))
    return gradients(attached, masks, Batch(made.ids(sequences=4), (0,) * 4), ALONE, micro=1)


@pytest.mark.parametrize("name", ["llama, tied", "qwen3"])
def test_gradients_computed_in_bfloat16(name: str, tmp_path: Path) -> None:
    """They are float32, and off by some of bfloat16's roundings, 0.4% each: weights' by few of them, masks' by more,
    as they sum up what cancels.
    """
    made = MADE[name]()
    made.model.save_pretrained(tmp_path)
    (found, _), _ = on_ranks(partial(on_one_rank, compute=torch.bfloat16), made, tmp_path)
    for key, gradient in in_float64(made).items():
        assert found[key].dtype == torch.float32
        error = float((found[key] - gradient).norm() / gradient.norm())
        assert 0 < error < (0.05 if "." in key else 0.2), f"{key}: {error}"


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_offload_is_for_cuda(device: str) -> None:
    with pytest.raises(UserError, match=f"offload: found device {device}; expected cuda"), joined(device, offload=True):
        pass


def test_mps_is_for_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError) as told, joined("mps"):
        pass
    assert str(told.value) == (
        "device: found mps for 2 ranks; expected one process on mps; start it without torchrun, or take --device cpu"
    )
    monkeypatch.setenv("WORLD_SIZE", "1")
    with joined("mps") as found:
        assert found == (ALONE, "mps")


def joined_so_often(times: int) -> list[int]:
    found = []
    for _ in range(times):
        with joined("cpu") as (ranks, _):
            found.append(ranks.sum(1 + ranks.rank))
    return found


def test_ranks_may_join_again_and_again() -> None:
    """As one script does that prunes, then heals."""
    assert on_ranks(joined_so_often, 3) == [[3, 3, 3]] * 2


def cached(folder: Path) -> str:
    """Who made what both look for: the second would find nothing, if it came at the same time."""
    with joined("cpu") as (ranks, _):

        def work() -> str:
            made = folder / "made"
            if made.exists():
                return f"rank {ranks.rank} found it"
            sleep(0.2)
            made.touch()
            return f"rank {ranks.rank} made it"

        return ranks.one_before_others(work)


def test_what_one_rank_puts_into_a_cache_the_others_find(tmp_path: Path) -> None:
    assert on_ranks(cached, tmp_path) == ["rank 0 made it", "rank 1 found it"]
