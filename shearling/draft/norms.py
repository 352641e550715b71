"""What kind of norm a module is, found by running it on inputs of its own: a formula that gives the same, or none.

D entries along the last dim; a norm is  y = (offset + w) * (x - centred * mean(x)) / sqrt(ms(x) + eps) + b.
"""

from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from shearling.axes.spec import Normalisation
from shearling.draft.refused import Refused

TOLERANCE = 1e-5  # relative: nearly all compute in float32
LARGE_EPS = 0.37  # so that it can't hide


def identify(path: str, norm: nn.Module, eps_keys: dict[str, float]) -> Normalisation:
    """The kind of one norm. `eps_keys` are the config's keys that may hold its epsilon, with their values.

    Raises Refused for a module that is no such norm.
    """
    found = [one for attribute in _attributes(norm) for one in _fitting(norm, attribute)]
    if len(found) != 1:
        raise Refused(f"{path}, a {type(norm).__name__}, is no RMSNorm and no LayerNorm of a known kind")
    attribute, centred, offset = found[0]
    value = float(getattr(norm, attribute))
    keys = [key for key, held in eps_keys.items() if held == value]
    return Normalisation(attribute, keys[0] if keys else "", offset=offset, centred=centred)


def _attributes(norm: nn.Module) -> list[str]:
    """Attributes that may be the epsilon: small numbers."""
    return [name for name, value in vars(norm).items() if isinstance(value, float) and 0 < value < 0.01]


@torch.no_grad()
def _fitting(norm: nn.Module, attribute: str) -> list[tuple[str, bool, float]]:
    """The (attribute, centred, offset) whose formula is what the module computes, at two epsilons and three scales."""
    before = getattr(norm, attribute)
    weight: Any = norm.get_parameter("weight") if "weight" in dict(norm.named_parameters()) else None
    if weight is None:
        return []
    bias = dict(norm.named_parameters()).get("bias")
    fits = list(product((False, True), (0.0, 1.0)))
    generator = torch.Generator().manual_seed(0)
    try:
        for eps, scale in product((LARGE_EPS, before), (0.05, 1.0, 20.0)):
            setattr(norm, attribute, eps)
            x = scale * (torch.randn(5, weight.numel(), generator=generator, dtype=torch.float64) + 0.5).to(
                weight.dtype
            )
            y = norm(x.reshape(5, *weight.shape))
            fits = [(c, o) for c, o in fits if _close(y, _formula(x, weight, bias, eps, centred=c, offset=o))]
    except (RuntimeError, TypeError, ValueError):
        return []
    finally:
        setattr(norm, attribute, before)
    return [(attribute, centred, offset) for centred, offset in fits]


def _formula(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, centred: bool, offset: float) -> Tensor:
    x = x.double()
    x = x - x.mean(-1, keepdim=True) if centred else x
    y = (offset + weight.double().reshape(-1)) * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return y if bias is None else y + bias.double().reshape(-1)


def _close(found: Tensor, expected: Tensor) -> bool:
    difference = (found.double().reshape(expected.shape) - expected).norm()
    return bool(difference <= TOLERANCE * expected.norm())


@dataclass(frozen=True)
class Kinds:
    """The kinds of norm that a family has, named: the commonest first."""

    named: dict[str, Normalisation]

    def name_of(self, kind: Normalisation) -> str:
        return next(name for name, other in self.named.items() if other == kind)
