"""Models that do something their weights don't say. None of them may get a table that says otherwise.

Each is a Llama of transformers' own with something silent added, registered as a type of its own.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from shearling.draft.draft import Draft, draft
from shearling.errors import UserError

CHECKS = ("table", "axes")
ALL = {"hidden", "layer", "kv_head", "group", "intermediate"}


class SilentConfig(LlamaConfig):
    model_type = "silent_llama"
    how: str = "nothing"


class SilentForCausalLM(LlamaForCausalLM):
    config_class = SilentConfig

    def __init__(self, config: SilentConfig):
        super().__init__(config)
        HOW[config.how](self)


AutoConfig.register("silent_llama", SilentConfig)
AutoModelForCausalLM.register(SilentConfig, SilentForCausalLM)


def comes_in(parent: nn.Module, name: str, change: Callable[[Tensor], Tensor]) -> None:
    """What the parent's own code does to the input of a child, whatever module stands there: a masked one too."""
    _around(
        parent, name, lambda child: child.register_forward_pre_hook(lambda _, x: (change(x[0]), *x[1:]), prepend=True)
    )


def goes_out(parent: nn.Module, name: str, change: Callable[[Tensor], Tensor]) -> None:
    """The same of its output."""

    def changed(_: nn.Module, args: Any, output: Any) -> Any:
        return change(output) if isinstance(output, Tensor) else output

    _around(parent, name, lambda child: child.register_forward_hook(changed, prepend=True))


def _around(parent: nn.Module, name: str, hook: Callable[[nn.Module], Any]) -> None:
    handles: list[Any] = []
    parent.register_forward_pre_hook(lambda it, *_: handles.append(hook(it.get_submodule(name))))  # a copy's own
    parent.register_forward_hook(lambda *_: handles.pop().remove())


def heads_permuted(model: Any) -> None:
    for layer in model.model.layers:
        comes_in(layer.self_attn, "o_proj", lambda x: x.flip(-1))


def heads_unlike(model: Any) -> None:
    """A slope for each head, as in ALiBi."""
    for layer in model.model.layers:
        comes_in(layer.self_attn, "o_proj", lambda x: x * torch.linspace(0.5, 1.5, x.shape[-1], dtype=x.dtype))


def feed_forward_normalised(model: Any) -> None:
    for layer in model.model.layers:
        comes_in(layer.mlp, "down_proj", lambda x: x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt())


def scaled_by_width(model: Any) -> None:
    for layer in model.model.layers:
        comes_in(layer.mlp, "gate_proj", lambda x: x * (x.shape[-1] / 36))


def scaled_by_depth(model: Any) -> None:
    for layer in model.model.layers:
        comes_in(layer.mlp, "down_proj", lambda x: x / model.config.num_hidden_layers)


def late_layers_differ(model: Any) -> None:
    for layer in list(model.model.layers)[6:]:
        comes_in(layer.mlp, "down_proj", lambda x: 0.5 * x)


def channels_scaled(model: Any) -> None:
    for layer in model.model.layers:
        comes_in(layer.mlp, "gate_proj", lambda x: x * torch.linspace(0.5, 1.5, x.shape[-1], dtype=x.dtype))


def stream_scaled(model: Any) -> None:
    goes_out(model.model, "layers.0", lambda x: 1.5 * x)


def stream_normalised(model: Any) -> None:
    goes_out(model.model.layers[0], "mlp", lambda x: x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt())


def linear_doubles(model: Any) -> None:
    for layer in model.model.layers:
        goes_out(layer.self_attn, "q_proj", lambda x: 2 * x)


def norm_shifts(model: Any) -> None:
    for layer in model.model.layers:
        goes_out(layer, "input_layernorm", lambda x: x + 0.01)


def norm_is_another(model: Any) -> None:
    for layer in model.model.layers:
        layer.input_layernorm.register_forward_hook(lambda _, args, output: output + 0.01)


def logits_cubed(model: Any) -> None:
    model.register_forward_hook(lambda _, args, output: output.__setitem__("logits", output["logits"] ** 3))


HOW: dict[str, Callable[[Any], None]] = {
    "nothing": lambda model: None,
    **{
        f.__name__: f
        for f in (
            heads_permuted,
            heads_unlike,
            feed_forward_normalised,
            scaled_by_width,
            scaled_by_depth,
            late_layers_differ,
            channels_scaled,
            stream_scaled,
            stream_normalised,
            linear_doubles,
            norm_shifts,
            norm_is_another,
            logits_cubed,
        )
    },
}


def drafted(how: str, **settings: Any) -> Draft:
    config = SilentConfig(how=how, num_hidden_layers=settings.pop("num_hidden_layers", 4), **settings).to_dict()
    return draft({**config, "model_type": "silent_llama"}, checks=CHECKS)


@pytest.mark.parametrize(
    ("how", "left"),
    [
        ("nothing", ALL),
        ("heads_permuted", ALL - {"kv_head", "group"}),
        ("heads_unlike", ALL - {"kv_head", "group"}),
        ("feed_forward_normalised", ALL - {"intermediate"}),
        ("scaled_by_width", ALL - {"hidden"}),
        ("norm_shifts", ALL - {"hidden"}),
        ("scaled_by_depth", ALL - {"layer"}),
    ],
)
def test_an_axis_that_is_not_what_it_seems_is_left_whole(how: str, left: set[str]) -> None:
    found = drafted(how)
    assert found.family is not None, found.refused
    assert set(found.axes) == left
    assert set(found.family.uncut) >= ALL - left


def test_a_rule_that_shows_in_deep_models_alone() -> None:
    found = drafted("late_layers_differ", num_hidden_layers=12)
    assert found.family is None or "layer" not in found.axes


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("channels_scaled", "no role of a table describes|in no module|reads the stream|FLOPs"),
        ("stream_scaled", "gives the stream on changed"),
        ("stream_normalised", "is not its input plus"),
        ("linear_doubles", "in a way that no role of a table describes"),
        ("norm_is_another", "is no RMSNorm and no LayerNorm"),
        ("logits_cubed", "something is done to the head's logits"),
    ],
)
def test_what_is_not_explained_is_refused(how: str, said: str) -> None:
    found = drafted(how)
    assert found.family is None
    assert any(word in found.refused for word in said.split("|")), found.refused


def test_a_type_without_a_causal_decoder_is_refused() -> None:
    assert "no config of the type 'nonesuch'" in draft({"model_type": "nonesuch"}, checks=CHECKS).refused
    assert "no causal decoder" in draft({"model_type": "vit"}, checks=CHECKS).refused


def test_a_config_that_says_otherwise_is_not_for_a_draft() -> None:
    from shearling.arch import family_of

    found = drafted("nothing")
    config = {**SilentConfig(how="nothing", num_hidden_layers=4).to_dict(), "model_type": "silent_llama"}
    assert family_of(config, found.family) is found.family
    with pytest.raises(UserError, match="attention_bias: found True; expected False"):
        family_of({**config, "attention_bias": True}, found.family)
