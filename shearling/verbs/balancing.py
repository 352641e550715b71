"""The load-balancing loss of a model with experts, as its config has it."""

from shearling.axes.shape import shape_of
from shearling.train.balanced import Balanced
from shearling.train.objective import Objective
from shearling.verbs.source import Source


def balanced(objective: Objective, source: Source) -> Balanced | None:
    """The objective with it; None for a model without experts. Hand it to the loop as its objective and as a term."""
    family, config = source.family, source.config
    rows = [(row, layer) for row, layer in family.named(config) if row.role == "route" and not row.is_bias]
    if not rows:
        return None
    return Balanced(
        objective,
        routers=[row.at(layer).removesuffix(".weight") for row, layer in rows],
        top_k=shape_of(family, config).fixed["top_k"],
        coefficient=float(family.setting(config, "router_aux_loss_coef")),
    )
