"""`reference` three ways, and what `heal --reference` reads of it."""

import json
import sys

import pytest

from shearling import cli
from shearling.data.loader import bytes_per_token
from shearling.data.store import Store
from shearling.errors import UserError
from shearling.recipe import Eval, Heal
from shearling.verbs.evaluate import evaluate
from shearling.verbs.reference import load_reference, parse_size, reference, write_reference

DOMAINS = ("code", "prose", "sums")
TABLE = {"sizes": [10**6, 10**7, 10**8], "losses": {domain: [3.0, 2.5, 2.25] for domain in DOMAINS}}
AT = dict.fromkeys(DOMAINS, 4.0)  # the falls halve with every factor of ten: 1.0 from 10^5 to 10^6


@pytest.fixture
def store(store_folder) -> Store:
    return Store.open(store_folder)


@pytest.fixture
def write(tmp_path):
    """Writes a table as JSON, which is YAML, and returns the path."""

    def write_table(**changes: object) -> str:
        path = tmp_path / "table.yaml"
        path.write_text(json.dumps({**TABLE, **changes}))
        return str(path)

    return write_table


def load(given: object, store: Store) -> dict[str, float]:
    ratios = bytes_per_token(store)
    return load_reference(given, domains=store.domains, tokenizer=store.fingerprint, bytes_per_token=ratios)  # type: ignore[arg-type]


def run_main(monkeypatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["shearling", "reference", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code or 0


def refused(**options: object) -> str:
    with pytest.raises(UserError) as raised:
        reference(**options)  # type: ignore[arg-type]
    return str(raised.value)


def test_the_sources_own_losses_are_those_of_eval(tmp_path, model_folder, store, store_folder):
    asked = Eval(seq_len=32, windows=8, device="cpu")
    found = reference(from_source=str(model_folder), data=str(store_folder), asked=asked)
    measured = evaluate(str(model_folder), data=str(store_folder), seq_len=32, windows=8, device="cpu")
    assert found.losses == measured.losses
    assert found.tokenizer == store.fingerprint
    assert all("standard error 0." in note for note in found.notes)
    write_reference(found, tmp_path / "r.json")
    assert load(tmp_path / "r.json", store) == measured.losses


def test_left_alone_it_measures_where_healing_does(model_folder, store_folder):
    found = reference(from_source=str(model_folder), data=str(store_folder), asked=Eval(device="cpu"))
    assert f"at most {Heal().eval_windows} held-out windows of 64 tokens" in found.how


def test_a_scaling_law(monkeypatch, capsys, tmp_path, write, store, store_folder):
    out = tmp_path / "r.json"
    words = [
        "--scaling-law",
        write(tokenizer=store.fingerprint),
        "--size",
        "100K",
        "--data",
        store_folder,
        "--out",
        out,
    ]
    assert run_main(monkeypatch, *words, "--json") == 0
    told = capsys.readouterr()
    assert json.loads(told.out) == pytest.approx(AT)
    assert told.out.count("\n") == 1
    raw = json.loads(out.read_text())
    assert (raw["format"], raw["version"], raw["unit"]) == ("shearling-reference", 1, "nats_per_token")
    assert raw["tokenizer"] == store.fingerprint
    assert raw["losses"] == json.loads(told.out)
    assert load(out, store) == raw["losses"]
    # Again, and in words: the same file is no obstacle, another one is.
    assert run_main(monkeypatch, *words) == 0
    assert ["prose", "4.0000"] in [line.split() for line in capsys.readouterr().out.splitlines()]
    assert run_main(monkeypatch, *words[:3], "200K", *words[4:]) == 2
    assert "found another reference; expected nothing, or this one" in capsys.readouterr().err
    assert json.loads(out.read_text()) == raw
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_nats_per_byte_become_the_stores_tokens(write, store, store_folder):
    law = write(unit="nats_per_byte", tokenizer="anothers")
    found = reference(scaling_law=law, size="100K", data=str(store_folder))
    ratios = bytes_per_token(store)
    assert found.losses == pytest.approx({domain: 4.0 * ratios[domain] for domain in DOMAINS})
    assert (found.unit, found.tokenizer) == ("nats_per_token", store.fingerprint)
    assert "--data: found nothing, and losses in nats per byte" in refused(scaling_law=law, size="100K")


def test_bytes_per_token_are_the_texts_own(store, texts):
    for domain in store.domains:
        assert 1 < bytes_per_token(store)[domain] < max(map(len, texts[domain]))


def test_losses_of_another_tokenizer(write, store_folder):
    told = refused(scaling_law=write(tokenizer="another's"), size="100K", data=str(store_folder))
    assert "found nats per token of the tokenizer another's; expected of the tokenizer " in told
    assert "unit: nats_per_byte" in told


def test_domains_that_the_store_does_not_have(write, store_folder):
    losses = {"code": [3.0, 2.5, 2.25], "pros": [3.0, 2.5, 2.25]}
    told = refused(scaling_law=write(losses=losses), size="100K", data=str(store_folder))
    for part in (
        "domain 'prose': found no loss",
        "domain 'sums': found no loss",
        "domain 'pros': found no such domain",
    ):
        assert part in told
    assert "did you mean 'prose'?" in told


def test_losses_given(store_folder):
    found = reference(given="sums=1,code=2,prose=3", data=str(store_folder))
    assert list(found.losses.items()) == [("code", 2.0), ("prose", 3.0), ("sums", 1.0)]
    assert found.tokenizer is None
    assert any("the tokenizer isn't known" in note for note in found.notes)
    assert reference(given="d=1.9").losses == {"d": 1.9}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, ["reference: found none of them; expected one of --from-source"]),
        ({"given": "d=1", "scaling_law": "x", "size": "1B"}, ["reference: found 2 of them"]),
        ({"from_source": "m"}, ["--data: found nothing; expected a token store"]),
        ({"scaling_law": "x"}, ["--size: found nothing; expected the size"]),
        (
            {"given": "d=1", "size": "1B", "asked": Eval(seq_len=8, windows=3)},
            ["--size: found 1B; expected it with --scaling-law only", "--seq-len: found 8", "--windows: found 3"],
        ),
        ({"scaling_law": "absent.yaml", "size": "1B"}, ["scaling law absent.yaml: found No such file or directory"]),
    ],
)
def test_words_that_do_not_go_together(options, told):
    found = refused(**options)
    for part in told:
        assert part in found


def test_sizes():
    assert [parse_size(text) for text in ("1.3B", "370M", "1345423360")] == [1_300_000_000, 370_000_000, 1_345_423_360]
    for text in ("big", "0", "-1B", None):
        with pytest.raises(UserError, match=r"size: found .*; expected parameters, as 1\.3B or 1345423360"):
            parse_size(text)


def test_what_is_in_the_way_is_left_alone(monkeypatch, capsys, tmp_path):
    out = tmp_path / "notes.txt"
    out.write_text("mine")
    assert run_main(monkeypatch, "--given", "d=1", "--out", out) == 2
    assert "found something that isn't a reference; expected nothing; choose another --out" in capsys.readouterr().err
    assert out.read_text() == "mine"
    assert run_main(monkeypatch, "--given", "d=1", "--out", out / "r.json") == 2
    told = capsys.readouterr()
    assert f"found {out}, which is no folder; expected a folder that you may write to" in told.err
    assert told.out == ""  # before anything was computed


def test_what_was_found_is_printed_though_it_cannot_be_written(monkeypatch, capsys, tmp_path):
    out = tmp_path / "new" / "r.json"
    assert run_main(monkeypatch, "--given", "d=1", "--out", out) == 0
    assert run_main(monkeypatch, "--given", "d=2", "--out", out) == 2
    told = capsys.readouterr()
    assert "found another reference" in told.err
    assert ["d", "2.0000"] in [line.split() for line in told.out.splitlines()]


def test_a_floor_below_zero_is_told_even_beside_json(monkeypatch, capsys, write):
    losses = {"d": [3.0, 2.5, 2.01]}
    assert run_main(monkeypatch, "--scaling-law", write(losses=losses), "--size", "1M", "--json") == 0
    told = capsys.readouterr()
    assert json.loads(told.out) == {"d": pytest.approx(3.0)}
    assert "d: E = -" in told.err
    assert "E below 0" in told.err


def test_what_heal_may_be_given(tmp_path, store, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    bare, text = {"code": 1.0, "prose": 2.0, "sums": 3.0}, "code=1,prose=2,sums=3"
    (tmp_path / "bare.yaml").write_text("code: 1\nprose: 2.0\nsums: 3e0\n")
    (tmp_path / "bare.json").write_text(json.dumps(bare))
    for given in (bare, text, tmp_path / "bare.yaml", str(tmp_path / "bare.json"), "~/bare.json"):
        assert load(given, store) == bare
    ratios = bytes_per_token(store)
    assert load({"losses": bare, "unit": "nats_per_byte"}, store)["sums"] == pytest.approx(3 * ratios["sums"])
    (tmp_path / "twice.yaml").write_text("code: 1\ncode: 2\n")
    for given, told in [
        (tmp_path / "absent.json", "absent.json: found No such file or directory"),
        ("lang=en/absent", "reference lang=en/absent: found No such file or directory"),
        ("lang=en.json", "reference lang=en.json: found No such file or directory"),
        (",".join(f"{number:0100}=1" for number in range(9)), "found no such domain"),  # longer than a file's name
        ("lang=en=1.9", "domain 'lang=en': found no such domain"),
        (tmp_path / "twice.yaml", "'code' comes twice"),
        ("code=1,prose=2", "domain 'sums': found no loss"),
        ({"losses": bare, "tokenizer": "x"}, "found nats per token of the tokenizer x"),
    ]:
        with pytest.raises(UserError) as raised:
            load(given, store)
        assert told in str(raised.value)
