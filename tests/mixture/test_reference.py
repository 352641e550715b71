"""References as files and as text: what is read from them, converted and refused."""

import json

import pytest

from shearling.errors import UserError
from shearling.mixture.reference import Reference, parse_given, parse_reference

MADE = Reference({"d": 1.9, "e": 2.1}, "as measured", tokenizer="abc", notes=("a note",))
BYTES = {"d": 4.0, "e": 3.0}


def per_token(found: Reference, *, tokenizer: str | None = "abc", bytes_per_token=BYTES) -> dict[str, float]:
    return found.per_token(domains=("e", "d"), tokenizer=tokenizer, bytes_per_token=bytes_per_token, where="r")


def test_what_is_written_is_read():
    raw = json.loads(json.dumps(MADE.to_json()))
    assert raw["format"] == "shearling-reference"
    assert raw["version"] == 1
    found = parse_reference(raw, where="r.json")
    assert (found.losses, found.unit, found.tokenizer) == (MADE.losses, MADE.unit, MADE.tokenizer)
    assert list(per_token(found).items()) == [("e", 2.1), ("d", 1.9)]  # in the order asked for


def test_a_bare_mapping_is_nats_per_token():
    found = parse_reference({"d": 1, "e": "2e-05"}, where="r.yaml")
    assert found == Reference({"d": 1.0, "e": 2e-5}, "r.yaml")


def test_nats_per_byte_belong_to_any_tokenizer():
    found = parse_reference({"losses": {"d": 0.5, "e": 0.25}, "unit": "nats_per_byte", "tokenizer": "x"}, where="r")
    assert per_token(found) == {"d": 2.0, "e": 0.75}
    with pytest.raises(UserError, match="domain 'e': found nats per byte, and data that doesn't say"):
        per_token(found, bytes_per_token={"d": 4.0, "e": 0.0})


def test_another_tokenizer_is_refused():
    with pytest.raises(UserError, match="found nats per token of the tokenizer abc; expected of the tokenizer xyz"):
        per_token(MADE, tokenizer="xyz")
    assert per_token(MADE, tokenizer=None) == MADE.losses


def test_domains_that_differ_are_named_together():
    with pytest.raises(UserError) as raised:
        Reference({"d": 1.0, "ee": 1.0}, "").per_token(
            domains=("d", "e", "f"), tokenizer=None, bytes_per_token={}, where="r"
        )
    lines = str(raised.value).splitlines()
    assert [line.split("; expected")[0] for line in lines] == [
        "r, domain 'e': found no loss",
        "r, domain 'f': found no loss",
        "r, domain 'ee': found no such domain",
    ]
    assert "did you mean 'e'?" in lines[2]


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        ([], "found list; expected a loss for each domain"),
        ({}, "found nothing; expected a loss for each domain"),
        ({"d": float("nan"), "e": -1}, "domain 'd': found the loss nan; expected a finite number, 0 or above"),
        ({"d": float("nan"), "e": -1}, "domain 'e': found the loss -1;"),
        ({"d": [1.0, 2.0]}, "domain 'd': found the loss [1.0, 2.0];"),
        ({"d": True}, "domain 'd': found the loss True;"),
        (
            {**MADE.to_json(), "version": 2},
            "found shearling-reference version 2; expected shearling-reference version 1",
        ),
        ({**MADE.to_json(), "unit": "bits"}, "unit: found 'bits'; expected nats_per_token or nats_per_byte"),
        ({**MADE.to_json(), "loses": {}}, "loses: found an unknown key; expected a known one; did you mean 'losses'?"),
        ({"format": "shearling-reference", "version": 1}, "losses: found nothing; expected a loss for each domain"),
        ({**MADE.to_json(), "losses": {"d": "low"}}, "domain 'd': found the loss 'low';"),
    ],
)
def test_files_that_are_refused(raw, told):
    with pytest.raises(UserError) as raised:
        parse_reference(raw, where="r.json")
    assert told in str(raised.value)


def test_losses_as_text():
    assert parse_given(" d = 1.9,a=b=2.1") == {"d": 1.9, "a=b": 2.1}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", ["found ''; expected domain=loss"]),
        ("d", ["found 'd'; expected domain=loss"]),
        ("=1", ["found '=1'"]),
        ("d=low,e=1,e=2", ["found 'd=low'", "found 'e' twice"]),
        ("d=nan,e=-1", ["domain 'd': found the loss nan", "domain 'e': found the loss -1.0"]),
    ],
)
def test_text_that_is_refused(text, told):
    with pytest.raises(UserError) as raised:
        parse_given(text)
    for part in told:
        assert part in str(raised.value)
