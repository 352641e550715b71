"""Masks in training: drawn anew at each step, put on the model, their gradients and their constraint's gathered."""

from collections.abc import Callable, Mapping

from torch import Tensor

from shearling.masks.attach import Attached
from shearling.masks.gates import Gates


class LearnedMasks:
    """A term of the training loss: the gates of an attached model.

    `over_ranks` makes one gradient of those of several ranks, each of which has the same gates.
    """

    def __init__(self, attached: Attached, gates: Gates, *, over_ranks: Callable[[Tensor], Tensor] | None = None):
        self.attached, self.gates, self.step = attached, gates, 0
        self.over_ranks = over_ranks

    def begin(self, step: int) -> None:
        self.step = step
        masks = self.gates.draw(step)
        self.attached.set(masks, support=self.gates.support(masks))

    def backward(self, step: int) -> None:
        """Brings the masks' gradients to the gates, and adds the constraint's."""
        self.attached.push(over_ranks=self.over_ranks)
        penalty = self.gates.penalty(step)
        if penalty is not None:
            penalty.backward()

    def end(self, step: int) -> None:
        self.gates.end(step)

    def settle(self) -> Mapping[str, Tensor]:
        """Sets the masks to what a cut now would fold in, and gives them."""
        masks = self.gates.masks(self.gates.kept())
        self.attached.set(masks)
        return masks

    def metrics(self) -> dict[str, float]:
        """By axis, the expected number of entries kept, on average over its places."""
        gates = self.gates
        return {f"expected_{axis}": float(gates.expected(axis, self.step).detach().mean()) for axis in gates.learned}
