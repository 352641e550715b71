"""Hard-concrete gates: a relaxation of 0/1 masks that is exactly 0 or 1 with positive probability.

Louizos et al. 2018 (arXiv 1712.01312), section 2.2; constants as in Sheared-LLaMA (arXiv 2310.06694).
Every function is elementwise; `log_alpha` is a gate's location, of any shape.
"""

from hashlib import blake2b
from math import log

import torch
from torch import Tensor

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
NOISE_EDGE = 1e-6
LOG_ALPHA_MIN, LOG_ALPHA_MAX = log(0.01), log(100)

# At inference the gate's own temperature is sharpened a little (LLM-Shearing, l0_module.py).
DETERMINISTIC_SLOPE = 0.8

# Kept values below this are raised to it, so that dividing by them at a tied head stays exact in fp32.
KEPT_MIN = 0.01


def sample(log_alpha: Tensor, *, uniform: Tensor) -> Tensor:
    """A draw z in [0, 1] from noise u ~ U(0, 1) of the same shape (eq. 10-11). Differentiable in log_alpha."""
    u = uniform.clamp(NOISE_EDGE, 1 - NOISE_EDGE)
    s = torch.sigmoid((torch.log(u) - torch.log1p(-u) + log_alpha) / BETA)
    return (s * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def keep_probability(log_alpha: Tensor) -> Tensor:
    """P(z > 0) (eq. 12)."""
    return torch.sigmoid(log_alpha - BETA * log(-GAMMA / ZETA))


def soft_value(log_alpha: Tensor) -> Tensor:
    """The value that a kept gate ends with: no noise, in [KEPT_MIN, 1)."""
    return torch.sigmoid(log_alpha / BETA * DETERMINISTIC_SLOPE).clamp(min=KEPT_MIN)


def noise_seed(seed: int, step: int) -> int:
    """The generator's seed for one step's noise. Hashed, as torch's CPU generator looks at the low 32 bits alone."""
    return int.from_bytes(blake2b(f"{seed}/{step}".encode(), digest_size=4).digest(), "little")
