"""Tables that are wrong in one place are not proved: conformance would be worth nothing otherwise."""

from dataclasses import replace

import pytest

from shearling.arch import family_of
from shearling.axes.spec import Family, Normalisation
from shearling.conformance.proof import Proof, prove
from shearling.conformance.small import small

LLAMA = family_of({"model_type": "llama"})
CONFIGS = {name: small(LLAMA)[name] for name in ("grouped, tied, all flags",)}


def proof_of(family: Family) -> Proof:
    return prove(family, configs=CONFIGS, checks=("table", "axes"))


def rewritten(old: str, new: str, family: Family = LLAMA) -> Family:
    assert old in family.table
    return replace(family, table=family.table.replace(old, new))


WRONG = {
    "heads laid out the other way": (
        rewritten("kv_head*group*head_dim", "group*kv_head*head_dim"),
        ("kv_head", "group"),
    ),
    "entries of a head laid out the other way": (
        rewritten("kv_head*group*head_dim", "head_dim*kv_head*group"),
        ("kv_head", "group"),
    ),
    "an offset that norms don't have": (
        replace(LLAMA, norms=Normalisation("variance_epsilon", "rms_norm_eps", offset=1.0)),
        ("hidden",),
    ),
    "another epsilon": (
        replace(LLAMA, norms=Normalisation("variance_epsilon", "initializer_range")),
        ("hidden", "layer", "intermediate"),
    ),
    "a cache of another size": (replace(LLAMA, cache="kv_head*head_dim"), ("hidden", "kv_head")),
    "a default that isn't transformers'": (
        replace(LLAMA, defaults={**LLAMA.defaults, "rms_norm_eps": 1e-4}),
        ("hidden", "layer"),
    ),
    "a missing row": (
        replace(LLAMA, table="\n".join(line for line in LLAMA.table.splitlines() if "up_proj" not in line)),
        ("hidden", "intermediate"),
    ),
    "embeddings that the config doesn't tie": (
        rewritten("tied=model.embed_tokens.weight", ""),
        ("hidden", "layer"),
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_table_is_not_proved(wrong: str) -> None:
    family, axes = WRONG[wrong]
    proof = proof_of(family)
    assert proof.broken
    assert not set(axes) & set(proof.axes)


def test_the_right_one_is() -> None:
    proof = proof_of(LLAMA)
    assert not proof.broken, [str(finding) for finding in proof.broken]
    assert proof.axes == ("hidden", "layer", "kv_head", "group", "head_dim", "rotary", "intermediate")
