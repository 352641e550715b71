"""Masks in training: gates drawn anew at each step, held to their target by multipliers that climb."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from shearling.masks.attach import Attached
from shearling.masks.constraint import Slide, penalty
from shearling.masks.gates import Gates


class Multipliers(nn.Module):
    """l1 and l2 by axis, one pair for each place with a choice of its own: [*within]."""

    def __init__(self, gates: Gates):
        super().__init__()
        zeros = {axis: torch.zeros_like(s.detach()) for axis, s in gates.sparsity().items()}
        self.linear = nn.ParameterDict({axis: nn.Parameter(z.clone()) for axis, z in zeros.items()})
        self.quadratic = nn.ParameterDict({axis: nn.Parameter(z.clone()) for axis, z in zeros.items()})


class LearnedMasks:
    """A term of the training loss: the gates of an attached model and their constraint."""

    def __init__(self, attached: Attached, gates: Gates, *, slide: Slide, seed: int):
        self.attached, self.gates, self.slide, self.seed = attached, gates, slide, seed
        self.multipliers = Multipliers(gates).to(attached.device)

    def optimizers(self, *, mask_lr: float, multiplier_lr: float, ascent: str) -> list[Optimizer]:
        """AdamW on the gates; on the multipliers AdamW too (`adamw`, the paper) or plain gradient ascent (`plain`).

        AdamW moves a multiplier by its rate at each step whatever the violation; plain ascent by rate x violation.
        """
        gates = AdamW([{"params": list(self.gates.parameters()), "peak_lr": mask_lr, "clip": False}], weight_decay=0.0)
        group = {"params": list(self.multipliers.parameters()), "peak_lr": multiplier_lr, "clip": False}
        climbing: Optimizer
        if ascent == "adamw":
            climbing = AdamW([group], weight_decay=0.0, maximize=True)
        else:
            climbing = SGD([group], lr=multiplier_lr, maximize=True)
        return [gates, climbing]

    def begin(self, step: int) -> None:
        """Draws this step's masks, by noise that follows from (seed, step) alone."""
        generator = torch.Generator().manual_seed((self.seed << 32) + step)
        self.attached.set(self.gates.sample(generator))

    def backward(self, step: int) -> None:
        """Brings the masks' gradients to the gates, and adds the constraint's."""
        self.attached.push()
        self.penalty(step).backward()

    def penalty(self, step: int) -> Tensor:
        """The constraint's part of the loss at this step."""
        progress = self.slide.progress(step + 1)
        terms = [
            penalty(
                sparsity,
                target=progress * self.gates.wanted_sparsity(axis),
                linear=self.multipliers.linear[axis],
                quadratic=self.multipliers.quadratic[axis],
            )
            for axis, sparsity in self.gates.sparsity().items()
        ]
        return torch.stack(terms).sum()

    def end(self, step: int) -> None:
        self.gates.clamp_()

    def settle(self) -> Mapping[str, Tensor]:
        """Sets the masks to what a cut now would fold in, and gives them."""
        masks = self.gates.masks(self.gates.kept())
        self.attached.set(masks)
        return masks

    def metrics(self) -> dict[str, float]:
        """By axis, the expected number of entries kept, on average over its places."""
        return {
            f"expected_{axis}": float((1 - sparsity.detach()).mean()) * self.gates.source.axes[axis]
            for axis, sparsity in self.gates.sparsity().items()
        }
