"""Families as files: what is written is read back the same, and what is wrong is told by its field."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from shearling.arch import families, towered
from shearling.arch.file import digest, dump, load, parse
from shearling.axes.spec import Family
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
    ],
)
def test_what_is_wrong_is_told_by_its_field(values: dict[str, object], said: str) -> None:
    with pytest.raises(UserError) as error:
        parse(values)
    assert said in str(error.value)


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
