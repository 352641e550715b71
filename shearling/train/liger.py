"""Liger's kernels in place of transformers' own norms and activations, on CUDA (arXiv 2410.10989).

Its loss isn't taken: ours forms the gradients at once too, and knows of teachers and of documents left out.
"""

import sys
from importlib.util import find_spec
from typing import Any

from shearling.errors import UserError


def check_liger(device: str, model_type: str) -> None:
    """Raises UserError where it can't run."""
    change = "leave kernels out; --compile fuses the same operations"
    if not device.startswith("cuda"):
        raise UserError("kernels liger", found=f"device {device}", expected="cuda", change=change)
    if find_spec("liger_kernel") is None:
        raise UserError("kernels liger", found="none", expected="them", change='pip install "shearling[liger]"')
    from liger_kernel.transformers.monkey_patch import (  # pyright: ignore[reportMissingImports]
        MODEL_TYPE_TO_APPLY_LIGER_FN as known,
    )

    if model_type not in known:
        raise UserError("kernels liger", found=model_type, expected=f"one of {', '.join(known)}", change=change)


def use_liger(model: Any) -> None:
    """Gives a model its norms and activations.

    Liger also puts its own into transformers' modules, for whatever is loaded after. That is undone: there they would
    run in a rehearsal too, on tensors without storage, which takes a GPU down.
    """
    from liger_kernel.transformers import (  # pyright: ignore[reportMissingImports]
        _apply_liger_kernel_to_instance as apply,
    )

    found = [vars(module) for name, module in sys.modules.items() if name.startswith("transformers.")]
    before = [dict(names) for names in found]
    apply(model, rope=False, cross_entropy=False, fused_linear_cross_entropy=False)
    for names, values in zip(found, before, strict=True):
        names.update(values)
