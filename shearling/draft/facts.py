"""What the tensors don't tell: kinds of norm, what is done to logits, what a token adds to the cache, what it costs."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from shearling.axes.axis import Dim
from shearling.axes.spec import Normalisation
from shearling.draft.build import on_meta, quiet, random_model, tokens
from shearling.draft.norms import identify
from shearling.draft.probe import Probe
from shearling.draft.refused import Refused
from shearling.draft.trace import explain

LENGTHS = (6, 12, 18)  # tokens: three, so that what grows with their square can be told apart
MEASURED = 2  # sizes at which cache and FLOPs are measured


def norm_kinds(probe: Probe, paths: Mapping[str, str]) -> dict[str, Normalisation]:
    """The kind of each norm, by its name with a star; `paths` gives a module of each."""
    keys = _eps_keys(probe, tuple(paths.values()))
    found = {}
    for name, path in paths.items():
        module = probe.model.get_submodule(path)
        kind = identify(path, module, {})
        key = keys.get(path) or float(getattr(module, kind.eps_attribute))
        found[name] = Normalisation(kind.eps_attribute, key, offset=kind.offset, centred=kind.centred)
    return found


def _eps_keys(probe: Probe, paths: tuple[str, ...]) -> dict[str, str]:
    """By norm, the config's key that its epsilon follows when all small numbers of the config are moved apart."""
    small = {key: v for key, v in probe.small.items() if isinstance(v, float) and 0 < v < 0.01}
    moved = {key: 2e-3 + 1e-4 * i for i, key in enumerate(small)}
    try:
        model = on_meta({**probe.small, **moved})
    except Exception:  # a number that isn't an epsilon, and has a range
        return {}
    values = {value: key for key, value in moved.items()}
    found = {}
    for path in paths:
        held = [values[v] for v in vars(model.get_submodule(path)).values() if isinstance(v, float) and v in values]
        if held:
            found[path] = held[0]
    return found


def logits_keys(probe: Probe) -> dict[str, str]:
    """What is done to logits after the head, and the config's key for it. Raises Refused for anything unknown."""
    if probe.ends.logits is not None and abs(probe.ends.logits - 1) < 1e-6:
        return {}
    floats = {
        key: float(v) for key, v in probe.small.items() if isinstance(v, (int, float)) and not isinstance(v, bool)
    }
    head = probe.trace.at(probe.ends.head).output.double()
    if probe.ends.logits is None:
        for key, cap in floats.items():
            if cap > 0 and _relative(cap * torch.tanh(head / cap), probe.trace.logits) < 1e-5:
                return {"cap": key}
        raise Refused("something is done to the head's logits that isn't a factor or a soft cap of the config's")
    for key, value in floats.items():
        for how, expected in (("times", value), ("over", 1 / value if value else 0.0)):
            if abs(probe.ends.logits - expected) < 1e-6 and _follows(probe, key, value, how):
                return {how: key}
    raise Refused(f"logits are multiplied by {probe.ends.logits:.6g}, and no key of the config was found that says so")


def _follows(probe: Probe, key: str, value: float, how: str) -> bool:
    """Whether doubling the key doubles, or halves, the factor on the logits."""
    try:
        model = random_model({**probe.small, key: 2 * value})
        with torch.no_grad(), quiet():
            logits = model(probe.trace.ids).logits
        found = explain(logits, [probe.trace.at(probe.ends.head).output])
    except Exception:  # a key that isn't the factor may have a range
        return False
    times = 2 * probe.ends.logits if how == "times" else probe.ends.logits / 2  # type: ignore[operator]
    return found is not None and abs(found[0] - times) < 1e-6 * abs(times)


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def costs(probe: Probe) -> tuple[str, str]:
    """The dims `cache` and `scores` where all layers attend. Raises Refused where they are other than usual."""
    heads = "kv_head*group*head_dim" if probe.keys.grouped else "kv_head*head_dim"
    cache, scores = "2*kv_head*head_dim", f"2*{heads}"
    for axes in probe.samples[:MEASURED]:
        cached, scored = _measured(probe, axes)
        for dim, found, what in (
            (cache, cached, "what a token adds to the cache"),
            (scores, scored, "attention's cost"),
        ):
            expected = Dim.parse(dim).size(axes) * probe.depth
            if found != expected:
                raise Refused(f"{what} is {found}, not {dim} = {expected}: no term of a table says what it is")
    return cache, scores


def _measured(probe: Probe, axes: Mapping[str, int]) -> tuple[int, int]:
    """Entries of the cache a token, and multiply-adds a token and position, at these sizes; over all layers."""
    try:
        model = random_model(probe.keys.small(layers=probe.depth, **axes), dtype=torch.float32)
        with torch.no_grad(), quiet():
            ids = [tokens(axes["vocab"], sequences=1, length=n) for n in LENGTHS]
            cache = model(ids[0], use_cache=True).past_key_values
            a, b, c = (_flops(model, each) for each in ids)
    except Exception as error:  # whatever a model does at sizes that it wasn't made for
        raise Refused(f"a small model doesn't run at other sizes ({type(error).__name__}: {error})") from error
    held = [t for layer in getattr(cache, "layers", ()) for t in (layer.keys, layer.values) if t is not None]
    step = LENGTHS[1] - LENGTHS[0]
    return sum(t.numel() for t in held) // LENGTHS[0], (c - 2 * b + a) // (4 * step * step)


def _flops(model: nn.Module, ids: torch.Tensor) -> int:
    counter = FlopCounterMode(display=False)
    with counter:
        model(ids, use_cache=False)
    return counter.get_total_flops()


def head_is_tied(model: Any) -> bool:
    """Whether the head's weight is the token table itself."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight
