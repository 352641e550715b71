"""Units that are exactly dead in the source are what a cut removes, and then it is the same function."""

from collections.abc import Iterable

import pytest
import torch
from small_models import DENSE, Small, build, small, tokens
from torch import Tensor

from shearling.arch.config import config_at
from shearling.axes.index import Kept, select
from shearling.axes.shape import Shape
from shearling.axes.target import resolve_target
from shearling.cut.extract import Cut
from shearling.cut.importance import Importance, measure
from shearling.loss.cross_entropy import next_token_loss
from shearling.masks.attach import Attached
from shearling.masks.learned import LearnedMasks
from shearling.masks.options import Options
from shearling.masks.relaxations import make_gates
from shearling.weights.model import reader

SMALLER = {
    "hidden": {"hidden_size": 20},
    "layer": {"num_hidden_layers": 2},
    "kv_head": {"num_key_value_heads": 1, "num_attention_heads": 2},
    "group": {"num_attention_heads": 2},
    "intermediate": {"intermediate_size": 15},
}


def zero(made: Small, name: str, dim: int, entries: Iterable[int]) -> None:
    """Zeroes slices of a weight along a dim; of its bias too where they are rows."""
    with torch.no_grad():
        made.model.get_parameter(f"{name}.weight").index_fill_(dim, torch.tensor(list(entries)), 0)
        bias = dict(made.model.named_parameters()).get(f"{name}.bias")
        if dim == 0 and bias is not None:
            bias.index_fill_(0, torch.tensor(list(entries)), 0)


def kill(made: Small, axis: str, way: str) -> Kept:
    """Makes just as many units dead as SMALLER cuts, other ones in each layer; gives those that are left alive."""
    axes = made.shape.axes
    d, group = axes["head_dim"], axes["group"]
    layers = range(axes["layer"])
    choices: dict[tuple[int, ...], tuple[int, ...]] = {}
    if axis == "hidden":
        dead = (1, 4, 9, 23)
        if way == "incoming":
            zero(made, "model.embed_tokens", 1, dead)
        for i in layers if way == "incoming" else ():
            zero(made, f"model.layers.{i}.self_attn.o_proj", 0, dead)
            zero(made, f"model.layers.{i}.mlp.down_proj", 0, dead)
        for i in layers if way == "outgoing" else ():
            for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
                zero(made, f"model.layers.{i}.{name}", 1, dead)
        if way == "outgoing":
            zero(made, "lm_head", 1, dead)
        return Kept({"hidden": {(): tuple(i for i in range(24) if i not in dead)}}, axes)
    if axis == "layer":
        zero(made, "model.layers.1.self_attn.o_proj", 0, range(24))
        zero(made, "model.layers.1.mlp.down_proj", 0, range(24))
        return Kept({"layer": {(): (0, 2)}}, axes)
    for i in layers:
        if axis == "intermediate":
            dead_units = [(i + n) % 20 for n in range(5)]
            if way == "outgoing":
                zero(made, f"model.layers.{i}.mlp.down_proj", 1, dead_units)
            else:
                zero(made, f"model.layers.{i}.mlp.up_proj", 0, dead_units)
            choices[(i,)] = tuple(n for n in range(20) if n not in dead_units)
            continue
        dead_heads = [i % 2 * group + g for g in range(group)] if axis == "kv_head" else [i % 2, group + 1 - i % 2]
        if way == "outgoing":
            zero(made, f"model.layers.{i}.self_attn.o_proj", 1, [h * d + n for h in dead_heads for n in range(d)])
        else:  # only a whole kv head can have nothing coming in
            zero(made, f"model.layers.{i}.self_attn.v_proj", 0, [i % 2 * d + n for n in range(d)])
        if axis == "kv_head":
            choices[(i,)] = (1 - i % 2,)
        else:
            choices |= {(i, 0): (1 - i % 2,), (i, 1): (i % 2,)}
    return Kept({axis: choices}, axes)


def target_of(made: Small, axis: str) -> Shape:
    return resolve_target(made.family, made.shape, SMALLER[axis])[0]


def calibrate(made: Small) -> Importance:
    batches = [tokens(made.shape["vocab_size"], seed=seed) for seed in range(3)]
    return measure(made.model, made.family, config=made.config, batches=batches)


def one_shot(made: Small, target: Shape, importance: Importance) -> tuple[Kept, Tensor]:
    scores = {axis: score.tolist() for axis, score in importance.scores.items()}
    kept = select(scores, source=made.shape, target=target)
    cut = Cut(made.family, made.config, target, kept, norm_scales=importance.norm_scales(kept))
    read = reader(made.model)
    model = build(config_at(made.family, made.config, target, layers=kept.layers, dtype="float32"))
    model.load_state_dict({row.at(i): cut.tensor(row, i, read) for row, i in cut.rows()}, strict=False)
    with torch.no_grad():
        return kept, model(tokens(40, seed=9)).logits


WAYS = [
    *((axis, "outgoing") for axis in DENSE if axis != "layer"),
    ("hidden", "incoming"),
    ("kv_head", "incoming"),
    ("intermediate", "incoming"),
    ("layer", "outgoing"),
]


@pytest.mark.parametrize(("axis", "way"), WAYS)
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_the_one_shot_cut_removes_the_dead(model_type: str, axis: str, way: str) -> None:
    made = small(model_type, biases=model_type == "llama")
    alive = kill(made, axis, way)
    with torch.no_grad():
        before = made.model(tokens(40, seed=9)).logits
    importance = calibrate(made)
    kept, after = one_shot(made, target_of(made, axis), importance)
    assert kept.choices == alive.choices
    if (axis, way) == ("hidden", "outgoing"):
        # What nothing reads still counts in every norm, token by token: no cut can be the same function.
        return
    tolerance = 1e-3 if axis == "hidden" else 1e-5
    assert float((after - before).abs().max() / before.abs().max()) < tolerance


def test_without_the_energy_correction_dead_channels_would_not_be_free() -> None:
    made = small("llama")
    kill(made, "hidden", "incoming")
    scales = calibrate(made).norm_scales(Kept({"hidden": {(): tuple(range(24))}}, made.shape.axes))
    assert all(scale == pytest.approx(1, abs=1e-3) for scale in scales.values())
    importance = calibrate(made)
    kept, _ = one_shot(made, target_of(made, "hidden"), importance)
    assert all(s == pytest.approx((24 / 20) ** 0.5, rel=1e-3) for s in importance.norm_scales(kept).values())


@pytest.mark.parametrize("relaxation", ["soft_topk", "hard_concrete"])
@pytest.mark.parametrize("axis", DENSE)
def test_learned_masks_from_a_ranked_start_keep_none_of_the_dead(axis: str, relaxation: str) -> None:
    made = small("llama")
    alive = kill(made, axis, "outgoing")
    importance = calibrate(made)
    target = target_of(made, axis)
    # A rate at which the order of the living is shuffled at once.
    options = Options(relaxation=relaxation, lr=1.0)
    gates = make_gates(made.shape, target, scores=importance.scores, options=options, steps=8, seed=0)
    term = LearnedMasks(Attached(made.model, made.family, config=made.config, axes=gates.axes), gates)
    optimizers = gates.optimizers()
    for step in range(8):
        term.begin(step)
        next_token_loss(made.model, tokens(40, seed=step)).backward()
        term.backward(step)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"]
            optimizer.step()
            optimizer.zero_grad()
        term.end(step)
    assert gates.kept().choices == alive.choices


def test_scores_follow_what_a_unit_carries() -> None:
    """A unit scaled up in the source scores higher, by the square of it."""
    made = small("llama")
    before = calibrate(made).scores["intermediate"][0, 3]
    with torch.no_grad():
        made.model.get_parameter("model.layers.0.mlp.down_proj.weight")[:, 3] *= 3
    assert float(calibrate(made).scores["intermediate"][0, 3]) == pytest.approx(9 * float(before), rel=1e-6)


def test_kv_heads_score_what_their_groups_do() -> None:
    made = small("qwen3", kv_heads=3, group=2)
    scores = calibrate(made).scores
    assert torch.allclose(scores["kv_head"], scores["group"].sum(-1))
