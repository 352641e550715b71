"""Masked = cut, for each axis and for all at once; and a cut of nothing is the source, bit for bit."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from shearling.arch.config import config_at
from shearling.axes.index import Kept
from shearling.axes.shape import Shape
from shearling.conformance.finding import Finding
from shearling.conformance.model import Small, build, relative
from shearling.conformance.targets import Unit, random_cut
from shearling.cut.extract import Cut
from shearling.masks.attach import Attached
from shearling.weights.model import reader

# A mask that moves the logits by less might as well not be there.
LEAST_EFFECT = 1e-3


def masked_is_cut(made: Small, targets: Mapping[Unit, Shape]) -> Iterator[Finding]:
    """The logits of the masked model against those of the cut, with soft masks, for each unit of axes."""
    ids = made.ids()
    plain = made.logits(ids)
    for unit, target in targets.items():
        kept, masks = random_cut(made.shape, target)
        masked = masked_logits(made, masks, ids)
        cut = cut_model(made, Cut(made.family, made.config, target, kept, masks))
        with torch.no_grad():
            error = relative(masked, cut(ids, use_cache=False).logits)
        why = "" if relative(masked, plain) > LEAST_EFFECT else "the masks change next to nothing"
        yield Finding("masked = cut", made.name, unit, error, why=why)


def identity(made: Small) -> Iterator[Finding]:
    """A cut to the same shape gives every parameter of the model, in its dtype, bit for bit."""
    yield from (_identity_in(made, dtype) for dtype in (torch.float32, torch.bfloat16))


def _identity_in(made: Small, dtype: torch.dtype) -> Finding:
    parameters = {name: p.detach().to(dtype) for name, p in made.model.named_parameters()}
    cut = Cut(made.family, made.config, made.shape, Kept({}, made.shape.axes))
    rows = list(cut.rows())
    wrong = parameters.keys() ^ {row.at(layer) for row, layer in rows}
    for row, layer in rows:
        found = cut.tensor(row, layer, lambda row, layer: parameters[row.at(layer)])
        if found.dtype != dtype or not torch.equal(found, parameters[row.at(layer)]):
            wrong.add(row.at(layer))
    return Finding("identity", made.name, why=", ".join(sorted(wrong)[:5]))


def masked_logits(made: Small, masks: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """The model's logits on ids [B, T] with these masks attached."""
    attached = Attached(made.model, made.family, config=made.config, axes=tuple(masks))
    try:
        attached.set(masks)
        return made.logits(ids)
    finally:
        attached.remove()


def cut_model(made: Small, cut: Cut) -> Any:
    """The cut as a model of transformers, without a way through files."""
    read = reader(made.model)
    model = build(config_of(cut))
    parameters = {name for name, _ in model.named_parameters()}  # what is tied, once
    missing, unexpected = model.load_state_dict(
        {row.at(layer): cut.tensor(row, layer, read) for row, layer in cut.rows()}, strict=False
    )
    assert not unexpected, unexpected
    assert not parameters & set(missing), missing
    return model


def config_of(cut: Cut) -> dict[str, Any]:
    """The raw config of a cut in fp32."""
    kept = cut.kept
    return config_at(cut.family, cut.config, cut.shape, layers=kept.layers, dtype="float32", rotary=kept.rotary)
