"""Half of each head's entries: q's and k's by either choice, v's by any of its own."""

import pytest

from shearling.arch import families
from shearling.axes.rotary import selections, unturnable
from shearling.axes.target import resolve_target
from shearling.conformance.exact import cut_model, masked_logits
from shearling.conformance.finding import TOLERANCE
from shearling.conformance.model import random_model, relative
from shearling.conformance.small import telling
from shearling.conformance.targets import random_cut
from shearling.cut.extract import Cut
from shearling.errors import UserError

CONFIGS = {
    model_type: config
    for family in families()
    for model_type in family.model_types
    for config in [next(iter(telling(family, model_type).values()))]
    if "rotary" in family.axes and not unturnable(config)
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
ROPES = {
    "llama": [LLAMA3, {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}],
    "gemma3_text": [{"sliding_attention": {"rope_type": "default", "rope_theta": 100.0}, "full_attention": LLAMA3}],
}
FAMILY = {model_type: family for family in families() for model_type in family.model_types}


def check(model_type: str, config: dict, way: int) -> None:
    made = random_model(FAMILY[model_type], config)
    size = made.shape["head_dim"]
    target, _ = resolve_target(made.family, made.shape, {"head_dim": size // 2}, config)
    _, masks = random_cut(made.shape, target)
    chosen = list(selections(made.shape.rotary, size, size // 2))[way]
    masks["rotary"] = masks["rotary"].zero_().index_fill(0, masks["rotary"].new_tensor(chosen).long(), 1.0)
    kept, _ = random_cut(made.shape, target)
    kept = type(kept)({**kept.choices, "rotary": {(): chosen}}, kept.source)
    cut = cut_model(made, Cut(made.family, made.config, target, kept, masks))
    ids = made.ids()
    masked = masked_logits(made, masks, ids)
    assert relative(masked, made.logits(ids)) > 1e-3
    assert relative(cut(ids, use_cache=False).logits.detach(), masked) < TOLERANCE


@pytest.mark.parametrize("way", [0, 1], ids=["prefix", "stride"])
@pytest.mark.parametrize("model_type", CONFIGS)
def test_masked_is_cut_by_either_choice(model_type: str, way: int) -> None:
    check(model_type, CONFIGS[model_type], way)


@pytest.mark.parametrize("way", [0, 1], ids=["prefix", "stride"])
@pytest.mark.parametrize(("model_type", "number"), [(t, n) for t, ropes in ROPES.items() for n in range(len(ropes))])
def test_frequencies_that_are_scaled_one_by_one(model_type: str, number: int, way: int) -> None:
    check(model_type, {**CONFIGS[model_type], "rope_parameters": ROPES[model_type][number]}, way)


@pytest.mark.parametrize(
    ("rope", "size", "said"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, 5, "expected an even number; choose head_dim=4 or 6"),
        (None, 6, "an even divisor of 8: no rope_theta in config; choose head_dim=4 or 8"),
        ({"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}, 4, "of the type 'yarn'"),
    ],
)
def test_refused(rope: dict | None, size: int, said: str) -> None:
    config = {**CONFIGS["llama"], "rope_parameters": rope}
    from shearling.axes.shape import shape_of

    with pytest.raises(UserError, match=said):
        resolve_target(FAMILY["llama"], shape_of(FAMILY["llama"], config), {"head_dim": size}, config)
