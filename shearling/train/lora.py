"""Low-rank adapters on weights that stay as they are (LoRA, Hu et al. 2021, arXiv 2106.09685), by PEFT.

Each linear W [O, I] inside a block learns s B A beside it, A [rank, I] and B [O, rank], in fp32; embeddings, norms, the
choice of experts and stacks of experts learn nothing. In what is saved they are merged: W + s B A, in fp32.
"""

import math
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from shearling.axes.spec import Family
from shearling.axes.table import Tensor as Row
from shearling.errors import UserError
from shearling.ranks.ranks import Ranks

ALPHA = 2  # by the rank: s, whatever the rank is
RATE = 10.0  # of their learning rate, by that of whole weights
NAME = "default"  # of a model's only adapters

Read = Callable[[Row, int | None], Tensor]


def check_lora(ranks: Ranks) -> None:
    """Raises UserError where they can't be had."""
    if find_spec("peft") is None:
        change = 'pip install "shearling[lora]", or leave it out'
        raise UserError("lora_rank", found="no peft", expected="peft, which adapters are of", change=change)
    if ranks.mesh is not None:
        found = "offload" if ranks.count == 1 else f"{ranks.count} ranks"
        change = "leave it out: whole weights are shared out, or lie in the computer's memory"
        raise UserError("lora_rank", found=found, expected="one process, all of it on one device", change=change)


def adapt(model: Any, family: Family, config: Mapping[str, Any], *, rank: int, seed: int) -> None:
    """Puts them on a model; all that learns from here on is theirs. They start at W + 0."""
    from peft import LoraConfig, inject_adapter_in_model  # pyright: ignore[reportMissingImports]

    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for layer in range(family.setting(config, "num_hidden_layers")):
        block, path = model.get_submodule(family.block(layer)), f"{family.block(layer)}."
        rows = [row for row, at in family.named(config) if at == layer and _takes_one(row)]
        names = [row.at(layer).removeprefix(path).removesuffix(".weight") for row in rows]
        turned = any(row.output == 1 for row in rows)  # as Conv1D stores them
        options = LoraConfig(r=rank, lora_alpha=ALPHA * rank, target_modules=names, bias="none", fan_in_fan_out=turned)
        # A block at a time: told of a whole model, PEFT would mean its stacks of experts too. Apart from a rehearsal,
        # where modules can't be cast.
        with unset_fake_temporarily():
            inject_adapter_in_model(options, block, NAME, low_cpu_mem_usage=True)
        for name in names:
            _start(block.get_submodule(name), generator)


def _start(module: Any, generator: torch.Generator) -> None:
    """As PEFT begins: A as a linear, B at 0."""
    a, b = module.lora_A[NAME], module.lora_B[NAME]
    start = torch.empty(a.weight.shape, device="cpu")
    nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
    a.weight = nn.Parameter(start.to(module.weight.device))
    b.weight = nn.Parameter(torch.zeros(b.weight.shape, device=module.weight.device))


def merging(read: Read, model: Any) -> Read:
    """Reads weights with what a model's adapters add to them."""
    found = {f"{path}.weight": module for path, module in model.named_modules() if hasattr(module, "lora_A")}

    def merged(row: Row, layer: int | None) -> Tensor:
        weight, module = read(row, layer), found.get(row.at(layer))
        return weight if module is None else weight.float() + _added(module).to(weight.device)

    return merged


def _takes_one(row: Row) -> bool:
    return row.per_layer and row.input is not None and not row.stacked and row.role != "route"


@torch.no_grad()
def _added(module: Any) -> Tensor:
    """s B A as the weight is stored."""
    product = (module.lora_B[NAME].weight @ module.lora_A[NAME].weight) * module.scaling[NAME]
    return product.T if module.fan_in_fan_out else product
