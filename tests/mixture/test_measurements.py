"""Tables of losses by size: what is read from them, and what is refused, all at once."""

import json
from pathlib import Path

import pytest

from shearling.errors import UserError
from shearling.mixture.measurements import parse_measurements

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())
TABLE = {
    "sizes": [int(size) for size in GOLDEN["measured"]],
    "losses": {
        domain: [row[place] for row in GOLDEN["measured"].values()] for place, domain in enumerate(GOLDEN["domains"])
    },
}


def refused(**changes: object) -> str:
    with pytest.raises(UserError) as raised:
        parse_measurements({**TABLE, **changes}, where="t.yaml").at(10**9, where="t.yaml")
    told = str(raised.value)
    assert all("t.yaml" in line and "; expected " in line for line in told.splitlines())
    return told


def test_the_papers_table():
    found = parse_measurements(TABLE, where="t.yaml").at(1_345_423_360, where="t.yaml")
    expected = dict(zip(GOLDEN["domains"], GOLDEN["references"]["1345423360"], strict=True))
    assert found.losses == pytest.approx(expected, abs=0.5e-4)
    assert "1,345,423,360" in found.how
    assert (found.unit, found.tokenizer) == ("nats_per_token", None)
    (warned,) = (note for note in found.notes if "E below 0" in note)
    assert warned.startswith("cc: E = -2.7980, a = 0.0283;")


def test_sizes_in_any_order_and_as_text():
    """YAML leaves 1e9 as text."""
    shuffled = {"sizes": ["7e10", 7e9, 13_000_000_000], "losses": {"d": [1.4, 1.7, 1.6]}, "tokenizer": "t"}
    found = parse_measurements(shuffled, where="t.yaml")
    assert (found.sizes, found.losses, found.tokenizer) == ((7e9, 1.3e10, 7e10), {"d": (1.7, 1.6, 1.4)}, "t")


def test_more_sizes_show_what_is_left():
    table = {"sizes": [10**8, 10**9, 10**10, 10**11], "losses": {"d": [3.1, 2.5, 2.2, 2.1]}}
    (note,) = parse_measurements(table, where="t.yaml").at(10**7, where="t.yaml").notes
    assert ", residuals " in note
    assert len(note.split("residuals ")[1].split()) == 4


def test_too_few_sizes():
    few = {"sizes": [10**9, 10**10], "losses": {"d": [2.5, 2.2]}}
    told = refused(**few)
    assert "found 2 of them; expected 3 or more, or 2 and an exponent; measure another size, or add" in told
    found = parse_measurements({**few, "exponent": 0.2}, where="t.yaml").at(10**8, where="t.yaml")
    assert found.losses["d"] == pytest.approx(2.5 + 0.3 * 10**0.2, abs=1e-9)  # falls go on by a factor of 10^a
    assert "residuals" not in found.notes[0]
    assert "found 1 of them; expected 2 or more" in refused(sizes=[10**9], losses={"d": [2.5]}, exponent=0.2)


def test_losses_that_do_not_fall_name_domain_and_pair():
    told = refused(losses={"a": [1.7, 1.7, 1.5], "b": [1.7, 1.6, 1.5], "c": [1.7, 1.5, 1.6]})
    first, second = told.splitlines()
    assert "domain 'a': found 1.7 at 6,738,415,616 parameters and 1.7 at 13,015,864,320; expected a loss that" in first
    assert "domain 'c': found 1.5 at 13,015,864,320 parameters and 1.6 at 68,976,648,192" in second


def test_losses_that_no_law_follows():
    assert "domain 'a': found losses that fall faster than any" in refused(losses={"a": [2.0, 1.95, 1.0]})


def test_a_law_that_ends_below_zero():
    table = {"sizes": [10**6, 10**7, 10**8], "losses": {"d": [2.0, 1.0, 0.1]}}
    with pytest.raises(UserError, match=r"comes to -\d.* at 1,000,000,000,000 parameters; expected a loss above 0"):
        parse_measurements(table, where="t.yaml").at(10**12, where="t.yaml")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"sizes": None}, "sizes: found NoneType; expected a list of parameter counts"),
        ({"sizes": [0, -5, float("nan"), 1.5, True, "big"]}, "sizes: found 'big'; expected a whole number"),
        ({"sizes": [10**9, 10**9, 10**10]}, "found 1,000,000,000 and 1,000,000,000; expected sizes that differ"),
        ({"sizes": [10**9, 10**9 + 1, 10**10]}, "found 1,000,000,000 and 1,000,000,001; expected sizes that differ"),
        ({"losses": None}, "losses: found nothing; expected a list of losses for each domain"),
        ({"losses": {"d": 1.5}}, "domain 'd': found float; expected a list"),
        ({"losses": {"d": [1.7, 1.6]}}, "domain 'd': found 2 losses; expected 3, one for each size"),
        ({"losses": {"d": [float("inf"), 1.6, 1.5]}}, "domain 'd': found the loss inf; expected a finite number"),
        ({"losses": {"d": [None, 1.6, 1.5]}}, "domain 'd': found the loss None; expected a finite number"),
        ({"unit": "nats_per_bite"}, "unit: found 'nats_per_bite'; expected nats_per_token or nats_per_byte; did you"),
        ({"tokenizer": 3}, "tokenizer: found 3; expected a tokenizer's fingerprint"),
        ({"exponent": 0}, "exponent: found 0; expected a number from 0.001 to 10"),
        ({"exponent": "steep"}, "exponent: found 'steep'; expected a number"),
        ({"size": [1]}, "size: found an unknown key; expected a known one; did you mean 'sizes'?"),
    ],
)
def test_tables_that_are_refused(changes, told):
    assert told in refused(**changes)


def test_all_mistakes_at_once():
    told = refused(sizes=[0, 1, -5], losses={"d": [float("nan"), 1.6], "e": "x"}, unit="bits", exponent=-1, extra=1)
    assert len(told.splitlines()) == 7
    with pytest.raises(UserError, match="found list; expected keys and values"):
        parse_measurements([], where="t.yaml")
