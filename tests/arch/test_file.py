"""Families as files: what is written is read back the same, and what is wrong is told by its field."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from shearling.arch import families, family_of, towered
from shearling.arch.file import digest, dump, load, parse
from shearling.axes.spec import Family, Normalisation
from shearling.errors import UserError

KNOWN = [*families(), *towered().values()]


@pytest.mark.parametrize("family", KNOWN, ids=lambda family: family.name)
def test_a_family_comes_back_as_it_was(family: Family, tmp_path: Path) -> None:
    path = tmp_path / "family.yaml"
    path.write_text(dump(family))
    again = load(path)
    assert again.tensors == family.tensors
    assert replace(again, table="") == replace(family, table="")
    assert digest(again) == digest(family)
    assert dump(again) == dump(family)


def test_each_family_has_a_digest_of_its_own() -> None:
    assert len({digest(family) for family in KNOWN}) == len(KNOWN)


def test_a_file_holds_tables_as_they_are_read() -> None:
    text = dump(KNOWN[0])
    assert all(line.strip() in text for line in KNOWN[0].table.splitlines())
    assert "python/" not in text


def broken(**changes: object) -> dict[str, object]:
    values = {**yaml.safe_load(dump(KNOWN[0])), **changes}
    return {key: value for key, value in values.items() if value is not None}


def row(line: str) -> str:
    """A table, and a line that is wrong."""
    return f"{KNOWN[0].table}\n{line}"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (broken(tabel="x"), "found an unknown field 'tabel'; expected a known one; did you mean 'table'"),
        (broken(table=None), "found no table"),
        (broken(name=3), "family, name: found 3; expected a str"),
        (broken(model_types="llama"), "family, model_types: found 'llama'; expected a list"),
        (broken(model_types=["llama", 4]), "family, model_types, entry 1: found 4"),
        (broken(table="read x.weight hiden"), "'hiden' is not an axis"),
        (broken(table="reads x.weight hidden"), "a table's line is"),
        (broken(norms={"eps_attribute": "eps"}), "family, norms: found no eps_key"),
        (broken(norms={"a": {"eps_attribute": "e", "eps_key": "k", "offest": 1}}), "unknown field 'offest'"),
        (broken(layer_rules=[{"kee": "layer_types"}]), "family, layer_rules, entry 0: found an unknown field 'kee'"),
        (broken(tensors=[]), "unknown field 'tensors'"),
        (broken(table=""), "family, table: found no row of a layer"),
        (broken(norms={}), "family, norms: found none; expected one, or several by name"),
        (
            broken(table=row("norm model.*.weight hidden norm=foo")),
            "family, table: found norm=foo; expected one of norms",
        ),
        (broken(table=row("head a.weight vocab hidden tied=b.weight")), "family, table: found tied=b.weight"),
        (broken(table=row("head a.weight vocab hidden tied=a.weight")), "family, table: found tied=a.weight"),
        (broken(table=row("read model.*.w hidden hidden reads=x")), "family, table: found reads=x"),
        (broken(table=row("embed w vocab hidden scaled=hiden")), "family, table: found scaled=hiden; expected an axis"),
        (broken(cache="2*kv_heads"), "family, cache: found 'kv_heads' is not an axis"),
        (broken(scores="2*expert"), "family, scores: found expert, along which no row of the table lies"),
        (broken(uncut={"layers": "no"}), "family, uncut: found 'layers'; expected an axis"),
        (broken(logits={"divided": "k"}), "family, logits: found 'divided'; expected one of times"),
        (broken(coupled=["hidden_size == heads * head_dim"]), "family, coupled: found heads in"),
        (broken(divides=["hidden_size"]), "family, divides: found 'hidden_size'; expected SIZE % SIZE"),
    ],
)
def test_what_is_wrong_is_told_by_its_field(values: dict[str, object], said: str) -> None:
    with pytest.raises(UserError) as error:
        parse(values)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"fixed": {"positions": "nosuch"}}, "fixed.positions: found 'nosuch', of which no 'nosuch' is known"),
        ({"fixed": {"positions": "vocab_size /"}}, "fixed.positions: found 'vocab_size /'"),
        ({"table": row("norm model.*.b hidden if=nosuchflag")}, "table: found 'nosuchflag', of which no"),
        ({"uncut": {"layer if nosuch": "no"}}, "uncut: found 'layer if nosuch', of which no 'nosuch' is known"),
        ({"layer_rules": [{"key": "k", "at": "every nosuch"}]}, "layer_rules, entry 0: found 'every nosuch', of which"),
        ({"defaults": {}}, "defaults: found 'tie_word_embeddings', of which no"),
    ],
)
def test_what_a_config_lacks_is_told_by_its_field(changes: dict[str, object], said: str) -> None:
    (model_type, *_) = KNOWN[0].model_types
    config = {"model_type": model_type, "num_hidden_layers": 2, "vocab_size": 8}
    with pytest.raises(UserError) as error:
        family_of(config, parse({**yaml.safe_load(dump(KNOWN[0])), **changes}))
    assert said in str(error.value)


def test_an_epsilon_under_another_name() -> None:
    norm = Normalisation(eps_attribute="epsilon", eps_key="rms_norm_eps")
    with pytest.raises(UserError, match=r"eps_attribute: found epsilon, which a SimpleNamespace has not; .*\(eps\)"):
        norm.epsilon(SimpleNamespace(eps=1e-5, hidden=3))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: a\nname: b\n", "'name' comes twice"),
        ("- name\n", "found list; expected keys and values"),
        ("name: !!python/object/apply:os.system [ls]\n", "could not determine a constructor"),
        ("name: [", "expected YAML"),
    ],
)
def test_a_file_that_is_no_family(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "family.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load(path)
    assert said in str(error.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        load(tmp_path / "none.yaml")
