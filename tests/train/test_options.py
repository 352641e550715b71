"""Options that not every machine has what it takes for: refused before the start, with what to take instead."""

from typing import Any

import pytest
import torch
from small_models import small
from torch import nn

from shearling.errors import UserError
from shearling.ranks.ranks import ALONE, Ranks
from shearling.recipe import Heal, Prune, validated
from shearling.train import eight_bit, liger
from shearling.train.eight_bit import begun, check_8bit, moment_bytes, parts
from shearling.train.liger import check_liger, use_liger
from shearling.train.optim import adamw, set_rates


def test_moments_in_8_bits_need_one_rank_torchao_and_a_compiler(monkeypatch) -> None:
    monkeypatch.setattr(eight_bit, "find_spec", lambda name: object())
    mesh: Any = object()
    for ranks, found in ((Ranks(count=2, mesh=mesh), "2 ranks"), (Ranks(mesh=mesh, offload=True), "offload")):
        with pytest.raises(UserError, match=f"found {found}; expected one process without it; take adamw"):
            check_8bit("cuda", ranks)
    with pytest.raises(UserError, match="found mps; expected cuda or cpu"):
        check_8bit("mps", ALONE)
    monkeypatch.setenv("CXX", "c++")
    check_8bit("cpu", ALONE)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX")
    with pytest.raises(UserError, match=r"found no C\+\+ compiler"):
        check_8bit("cpu", ALONE)
    monkeypatch.setattr(eight_bit, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"found no torchao; .*shearling\[int8\]"):
        check_8bit("cpu", ALONE)


def test_moments_take_what_is_said() -> None:
    pytest.importorskip("torchao")
    weights = [nn.Parameter(torch.zeros(shape)) for shape in ((64, 64), (64, 65), (8, 8), (300,))]
    optimizer = adamw(weights, lr=0.1, bits=8)
    for weight in weights:
        fresh = begun(optimizer, weight)
        assert fresh is not None
        for key in ("exp_avg", "exp_avg_sq"):
            found = sum(part.nbytes for part in parts(key, fresh[key]).values())
            assert found == moment_bytes(weight.numel())
    assert begun(adamw(weights, lr=0.1), weights[0]) is None


def test_rates_follow_the_schedule_whatever_holds_them() -> None:
    groups = [{"lr": 1.0, "peak_lr": 0.5}, {"lr": torch.tensor(1.0), "peak_lr": 0.25}]
    set_rates(groups, 0.5)
    assert [float(group["lr"]) for group in groups] == [0.25, 0.125]
    assert isinstance(groups[1]["lr"], torch.Tensor)


def test_liger_needs_cuda_itself_and_no_masks(monkeypatch) -> None:
    with pytest.raises(UserError, match=r"kernels liger: found device cpu; expected cuda; .*--compile"):
        check_liger("cpu", "llama")
    monkeypatch.setattr(liger, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"shearling\[liger\]"):
        check_liger("cuda", "llama")
    with pytest.raises(UserError, match="kernels: found liger with compile; expected one of them"):
        validated(Heal, {"kernels": "liger", "compile": True})
    with pytest.raises(UserError, match="kernels: found liger with masks; expected torch"):
        validated(Prune, {"to": "hidden_size=8", "kernels": "liger"})


def test_liger_changes_one_model_and_no_other() -> None:
    pytest.importorskip("triton")
    pytest.importorskip("liger_kernel")
    from transformers.models.llama import modeling_llama

    before, model = dict(vars(modeling_llama)), small("llama").model
    use_liger(model)
    assert dict(vars(modeling_llama)) == before
    assert "Liger" in repr(model.model.norm.forward.__func__)
    assert "Liger" not in repr(small("llama").model.model.norm.forward.__func__)
