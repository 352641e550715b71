"""No value is looked at on the host between logged steps: on a GPU each look would wait for the device.

On a CPU looks can be counted as well, by the operators that they go through. What can't be seen here are copies to a
GPU that wait; benchmarks/gpu.py has torch count those.
"""

from functools import partial

import pytest
import torch
from small_models import small, tokens
from torch.utils._python_dispatch import TorchDispatchMode

from shearling.axes.axis import mask_shape
from shearling.axes.target import resolve_target
from shearling.data.batch import Batch
from shearling.loss.cross_entropy import hidden_states
from shearling.masks.attach import Attached
from shearling.masks.learned import LearnedMasks
from shearling.masks.options import Options
from shearling.masks.relaxations import make_gates
from shearling.mixture.weights import Mixture
from shearling.teacher.live import LiveTeacher
from shearling.train.distilled import Distilled, linear
from shearling.train.loop import train
from shearling.train.objective import NextToken
from shearling.train.optim import adamw
from shearling.train.step import Settings, State

STEPS, LOGGED = 4, 4
HALVED = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
LOOKS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "item")


class Looks(TorchDispatchMode):
    """Counts them by step."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.seen = 0, {step: [] for step in range(STEPS + 1)}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().partition("::")[2].partition(".")[0]
        picked = name == "index" and any(t is not None and t.dtype == torch.bool for t in args[1])
        if name in LOOKS or picked:
            self.seen[self.step].append(name)
        return func(*args, **(kwargs or {}))


def term_of(made, relaxation):
    target, _ = resolve_target(made.family, made.shape, {**HALVED, "num_key_value_heads": 2})
    probe = make_gates(made.shape, target, scores={}, options=Options(start="open"), steps=8, seed=0)
    scores = {axis: torch.rand(mask_shape(axis, made.shape.axes)) for axis in probe.axes}
    scores["intermediate"][..., 0] = 0.0  # is closed
    gates = make_gates(made.shape, target, scores=scores, options=Options(relaxation=relaxation), steps=8, seed=0)
    return LearnedMasks(Attached(made.model, made.family, config=made.config, axes=gates.axes), gates)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("kind", ["plain", "distilled", "soft_topk", "hard_concrete"])
def test_nobody_looks_between_logged_steps(kind, separate) -> None:
    made, looks = small("llama", tied=True), Looks()
    terms = [term_of(made, kind)] if kind in ("soft_topk", "hard_concrete") else []
    objective = NextToken(2)
    if kind == "distilled":
        teacher = LiveTeacher(small("llama", tied=True, seed=1).model.requires_grad_(False))
        objective = Distilled(teacher, domains=2, share=partial(linear, start=0.5, end=0.5), steps=STEPS)
        terms = [objective]

    def draw(at, weights):
        looks.step = at
        ids = tokens(40, sequences=4, seed=at)
        return Batch(ids, (0, 1, 0, 0), starts=torch.zeros_like(ids) if separate else None), at + 1

    gates = [
        optimizer for term in terms if kind in ("soft_topk", "hard_concrete") for optimizer in term.gates.optimizers()
    ]
    with looks:
        hidden_states(made.model, tokens(40))  # transformers looks whether windows are undivided
        assert looks.seen[0]
        looks.seen[0].clear()
        train(
            made.model,
            settings=Settings(
                steps=STEPS,
                seq_len=16,
                batch_sequences=4,
                micro_sequences=2,
                domains=("a", "b"),
                schedule=lambda step, steps: 1.0,
                log_every=LOGGED,
            ),
            state=State(step=0, tokens=0, sampler=0, mixture=Mixture.starting({"a": 0.75, "b": 0.25})),
            draw=draw,
            objective=objective,
            optimizers=[adamw(made.model.parameters(), lr=1e-3), *gates],
            terms=terms,
        )
    assert looks.seen[STEPS - 1]  # where it is logged
    # Documents kept apart: the batch counts its targets before it leaves the CPU, transformers makes a mask of them.
    allowed = 1 + 2 if separate else 0
    if kind == "distilled":
        allowed += 2 * separate
    assert all(len(looks.seen[step]) <= allowed for step in range(STEPS - 1)), looks.seen
