"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) on a frozen model's linears, by PEFT.

A linear W [O, I] becomes W + (alpha / rank) B A, with A [rank, I] drawn from the seed and B [O, rank] 0 at first, both
in float32 whatever W is in.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from importlib.util import find_spec
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from shearling.axes.spec import Family
from shearling.axes.table import Tensor as Row
from shearling.errors import UserError
from shearling.ranks.rows import gathered

Read = Callable[[Row, int | None], Tensor]

# The same at every rank, so that the best learning rate hardly moves with it (Schulman et al. 2025, "LoRA Without
# Regret"); at rank 16 it is twice the rank, which is what PEFT's users mostly take.
ALPHA = 32
BASE, A, B = "base_layer", "lora_A.default", "lora_B.default"  # what PEFT has in the place of a linear


@dataclass(frozen=True)
class Adapters:
    """What is asked of them."""

    rank: int
    seed: int

    @classmethod
    def asked(cls, rank: int | None, seed: int) -> "Adapters | None":
        """None where there are to be none. Raises UserError without the extra `shearling[lora]`."""
        if rank is None:
            return None
        if find_spec("peft") is None:
            change = "pip install 'shearling[lora]', or leave lora_rank out"
            raise UserError("lora_rank", found="no peft", expected="peft, which has the adapters", change=change)
        return cls(rank, seed)

    def add(self, model: Any, family: Family, config: Mapping[str, Any]) -> frozenset[str]:
        """Freezes a family's model and puts adapters on all linears in its layers but routers; gives their paths.

        Those of a model on the meta device are there too, and get from `read` what they start from.
        """
        from peft import LoraConfig, inject_adapter_in_model
        from transformers.pytorch_utils import Conv1D

        paths = [row.at(layer).removesuffix(".weight") for row, layer in _adaptable(family, config)]
        kinds = {path: type(model.get_submodule(path)) for path in paths}
        linears = [path for path, kind in kinds.items() if issubclass(kind, nn.Linear | Conv1D)]
        transposed = Conv1D in kinds.values()  # GPT-2's, and then all of them are
        # Inside of a list: in a model whose type it knows PEFT goes by older names (qwen3_moe's gates, for experts').
        targets = [f"0.{path}" for path in linears]
        asked = LoraConfig(r=self.rank, lora_alpha=ALPHA, target_modules=targets, fan_in_fan_out=transposed)
        device = next(model.parameters()).device
        with torch.device("meta"):  # so that PEFT draws nothing
            inject_adapter_in_model(asked, nn.ModuleList([model]))
        for name in (f"{path}.{part}" for path in linears for part in (A, B) if device.type != "meta"):
            part = model.get_submodule(name)
            part.weight = nn.Parameter(self.initial(f"{name}.weight", part.weight.shape).to(device))
        return frozenset(linears)

    def initial(self, name: str, shape: torch.Size) -> Tensor:
        """What an adapter's parameter starts from: PEFT's own distribution, drawn for each name by itself."""
        if f".{B}." in name:
            return torch.zeros(shape, device="cpu")
        generator = torch.Generator().manual_seed(int.from_bytes(sha256(f"{self.seed} {name}".encode()).digest()[:8]))
        return nn.init.kaiming_uniform_(torch.empty(shape, device="cpu"), a=sqrt(5), generator=generator)

    def read(self, name: str, shape: torch.Size, base: Callable[[str], Tensor]) -> Tensor:
        """A parameter of the model with adapters, `base` being that of the model without, by name."""
        if f".{A}." in name or f".{B}." in name:
            return self.initial(name, shape)
        return base(name.replace(f".{BASE}.", "."))


def check_rank(rank: int | None, family: Family, config: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
    """Raises UserError for a rank that no linear in a family's layers has, at these sizes of its axes.

    What is above the smaller dimension of a linear adds nothing there. Some are small: of few kv heads, of one gate.
    """
    if rank is None:
        return
    shapes = [row.shape(sizes) for row, _ in _adaptable(family, config)]
    most = max(min(shape) for shape in shapes if len(shape) == 2)
    if rank > most:
        expected = f"at most {most}, the highest rank of a linear in its layers"
        raise UserError("lora_rank", found=rank, expected=expected, change="lower it: 16 is common")


def _adaptable(family: Family, config: Mapping[str, Any]) -> Iterator[tuple[Row, int]]:
    """The weights in a family's layers, by layer, but routers': those that are of a linear may have adapters."""
    for row, layer in family.named(config):
        if layer is not None and row.role != "route" and row.name.endswith(".weight"):
            yield row, layer


def merged(model: nn.Module, read: Read) -> Read:
    """`read`, with what a model's adapters have learned added in float32, by all ranks together if they share it out.

    PEFT's own merging adds it to the weight in memory: in bfloat16 most of a small update is lost there.
    """
    from peft.tuners.lora import LoraLayer

    found: dict[str, Any] = {f"{path}.weight": m for path, m in model.named_modules() if isinstance(m, LoraLayer)}

    def tensor(row: Row, layer: int | None) -> Tensor:
        base, adapted = read(row, layer), found.get(row.at(layer))
        if adapted is None:
            return base
        with torch.no_grad():
            return base + gathered(adapted.get_delta_weight("default")).cpu()  # in the wider dtype, float32

    return tensor
