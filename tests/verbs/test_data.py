"""`data` as commands: what a store holds, whether it is whole, more documents onto it."""

import json
import shutil
import sys

import fsspec
import pytest

from shearling import cli
from shearling.errors import UserError
from shearling.recipe import Data, Inspect, Recipe, validated
from shearling.run import run as run_recipe
from shearling.verbs.data import inspect_store, make_store, verify_store


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command in this process; gives its exit code, stdout and stderr."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["shearling", "data", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        told = capsys.readouterr()
        return ended.value.code or 0, told.out, told.err

    return run


@pytest.fixture
def copied_store(store_folder, tmp_path):
    return shutil.copytree(store_folder, tmp_path / "store")


def test_inspect_tells_what_is_there(run, store_folder, texts, model_folder):
    code, out, _ = run("--inspect", store_folder, "--tokens", "1M", "--weights", "code=.5,prose=.25,sums=.25", "--json")
    found = json.loads(out)
    assert code == 0
    for name, domain in found["domains"].items():
        assert domain["documents"] + domain["held_out_documents"] == len(texts[name])
        assert domain["repeats"] == pytest.approx(1e6 * domain["share"] / domain["tokens"])
        assert domain["bytes_per_token"] == domain["text_bytes"] / domain["tokens"]
        assert any(text.startswith(found["samples"][name][:20]) for text in texts[name])
    assert [domain["share"] for domain in found["domains"].values()] == [0.5, 0.25, 0.25]
    assert found["tokenizer"] == str(model_folder)
    code, out, _ = run("--inspect", store_folder)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[1:5]] == ["domain", "code", "prose", "sums"]


def test_by_size_all_domains_repeat_alike(store_folder):
    found = inspect_store(str(store_folder), validated(Inspect, {"tokens": "9K"}))
    repeats = [domain.repeats for domain in found.domains.values()]
    assert repeats == pytest.approx([9000 / sum(domain.tokens for domain in found.domains.values())] * 3)
    plain = inspect_store(str(store_folder), validated(Inspect, {}))
    assert {domain.repeats for domain in plain.domains.values()} == {None}


def test_no_samples_without_the_tokenizer_unless_it_is_named(run, copied_store, model_folder):
    path = copied_store / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["tokenizer"]["source"] = "org/gone"
    path.write_text(json.dumps(manifest))
    _, out, _ = run("--inspect", copied_store)
    assert out.endswith(
        "no samples: its tokenizer isn't on this machine under that name; --tokenizer says where it is\n"
    )
    _, out, _ = run("--inspect", copied_store, "--tokenizer", model_folder, "--json")
    assert json.loads(out)["samples"].keys() == {"code", "prose", "sums"}


def test_verify_reads_every_file(run, copied_store):
    assert run("--verify", copied_store) == (0, f"{copied_store}: 12 files, every sum as in the manifest\n", "")
    assert verify_store(str(copied_store)) == 12
    path = copied_store / "prose/train-00000.tokens"
    raw = path.read_bytes()
    path.write_bytes(bytes([raw[0] ^ 1]) + raw[1:])
    code, out, told = run("--verify", copied_store)
    assert (code, out) == (2, "")
    assert told.startswith(f"error: {path}: found sha256 ")
    path.write_bytes(raw[:-2])
    code, _, told = run("--inspect", copied_store)
    assert code == 2
    assert f"{path}: found {len(raw) - 2} bytes; expected {len(raw)} bytes; prepare the data again" in told


def test_documents_are_added_once(run, copied_store, corpus, model_folder, tmp_path):
    (tmp_path / "sums.jsonl").write_text(json.dumps({"text": "one plus one is equal to two"}) + "\n")
    words = [tmp_path / "sums.jsonl", "--tokenizer", model_folder, "--out", copied_store, "--add"]
    before = inspect_store(str(copied_store), Inspect()).domains["sums"]
    assert run(*words)[0] == 0
    after = inspect_store(str(copied_store), Inspect()).domains["sums"]
    assert after.documents + after.held_out_documents == before.documents + before.held_out_documents + 1
    code, _, told = run(*words)
    assert code == 2
    assert "domain 'sums' of" in told
    assert "found documents that it has already" in told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "inputs: found nothing; expected inputs, --tokenizer and --out; add inputs"),
        (["d"], "--tokenizer: found nothing"),
        (["d", "--tokenizer", "m"], "--out: found nothing"),
        (["d", "--tokenizer", "m", "--out", "o", "--processes", "0"], "processes: found 0; expected greater than 0"),
        (
            ["d", "--tokenizer", "m", "--out", "o", "--add", "--seed", "1"],
            "--add: found settings; expected the store's own",
        ),
        (["--inspect", "absent"], "absent/manifest.json: found no such file; expected a token store"),
        (["--inspect", "STORE", "--tokens", "many"], "tokens: found 'many'; expected a count of tokens"),
        (
            ["--inspect", "STORE", "--weights", "code"],
            "--weights: found 'code'; expected domain=number; write as a=.5,b=.5",
        ),
        (
            ["--inspect", "STORE", "--weights", "code=1,code=2"],
            "--weights: found 'code' twice; expected each domain once",
        ),
        (
            ["--inspect", "STORE", "--weights", "code=1,prose=x"],
            "--weights: found 'prose=x'; expected domain=number",
        ),
        (["--inspect", "STORE", "--weights", "code=1,prose=1,sum=1"], "found 'sum'; expected a domain of the data"),
        (["--inspect", "STORE", "--tokenizer", "./gone"], "model ./gone: found nothing at this path"),
    ],
)
def test_mistakes(run, store_folder, words, told):
    code, out, found = run(*[store_folder if word == "STORE" else word for word in words])
    assert (code, out) == (2, "")
    assert told in found


def lines(path, *records) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_each_input_in_a_way_of_its_own(tmp_path, model_folder):
    """Texts in another column beside conversations; what an input leaves open is as in the section."""
    says = [{"role": "user", "content": "the sheep"}, {"role": "assistant", "content": "was shorn"}]
    chat = lines(tmp_path / "chat.jsonl", *[{"messages": says}] * 4)
    web = lines(tmp_path / "web.jsonl", *[{"content": "the dog sat by the river"}] * 4, {"content": 5})
    own = {"path": web, "text_column": "content", "skip_broken": True}
    asked = validated(Data, {"inputs": [chat, own], "messages_column": "messages", "held_out": 0.3})
    store, there = make_store(asked, tokenizer=str(model_folder), out=str(tmp_path / "store"))
    assert not there
    assert inspect_store(str(tmp_path / "store"), validated(Inspect, {})).samples["web"].startswith("the dog sat")
    found = store.manifest.domains["web"]
    assert found.train.broken + found.eval.broken == 1
    assert make_store(asked, tokenizer=str(model_folder), out=str(tmp_path / "store"))[1]
    other = validated(Data, {**asked.model_dump(), "inputs": [chat, {**own, "text_column": "text"}]})
    with pytest.raises(UserError, match="other settings"):
        make_store(other, tokenizer=str(model_folder), out=str(tmp_path / "store"))
    with pytest.raises(UserError, match="unknown key"):
        validated(Data, {"inputs": [{"path": web, "colum": "content"}]})


def test_a_finished_store_of_inputs_that_changed_is_no_longer_that(tmp_path, model_folder, texts):
    path = lines(tmp_path / "corpus" / "prose" / "a.jsonl", *({"text": text} for text in texts["prose"]))
    asked, out = validated(Data, {"inputs": [str(tmp_path / "corpus")], "held_out": 0.2}), tmp_path / "store"
    before = make_store(asked, tokenizer=str(model_folder), out=str(out))[0].digest
    (tmp_path / "corpus" / "prose" / "empty.jsonl").write_text("")
    assert make_store(asked, tokenizer=str(model_folder), out=str(out))[1]
    lines(tmp_path / "corpus" / "prose" / "a.jsonl", {"text": "other words"})
    more = lines(tmp_path / "corpus" / "prose" / "b.jsonl", {"text": "more words"})
    with pytest.raises(UserError) as caught:
        make_store(asked, tokenizer=str(model_folder), out=str(out))
    for part in (str(out), path, more, "choose another --out", "--add"):
        assert part in str(caught.value)
    shutil.rmtree(tmp_path / "corpus")
    assert make_store(asked, tokenizer=str(model_folder), out=str(out))[0].digest == before


def test_what_a_template_fails_on_is_passed_over_if_asked(tmp_path, copied):
    """But not that there's no template at all, which is a fault of all conversations."""
    model = copied()
    (model / "chat_template.jinja").write_text("{{ messages[0].content }}{{ 1 // (messages | length - 2) }}")
    one, two = ([{"role": "user", "content": "the sheep"}] * n for n in (1, 2))
    path = lines(tmp_path / "chat.jsonl", *({"messages": says} for says in (one, two, one, one, two)))
    wanted = {"inputs": [path], "messages_column": "messages", "held_out": 0.3}
    with pytest.raises(UserError, match=r"chat.jsonl, line 2 .*the chat template fails on it"):
        make_store(validated(Data, wanted), tokenizer=str(model), out=str(tmp_path / "strict"))
    store, _ = make_store(
        validated(Data, {**wanted, "skip_broken": True}), tokenizer=str(model), out=str(tmp_path / "kept")
    )
    found = store.manifest.domains["chat"]
    assert (found.train.broken + found.eval.broken, found.train.documents + found.eval.documents) == (2, 3)
    (model / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        make_store(validated(Data, {**wanted, "skip_broken": True}), tokenizer=str(model), out=str(tmp_path / "none"))


def test_no_secret_gets_into_a_file_or_a_message(tmp_path, model_folder, texts, monkeypatch, caplog, target):
    """Of URLs, of the environment and of fsspec's settings: neither a store's files, nor a run's, nor what is said."""
    caplog.set_level("DEBUG", logger="shearling")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "CANARY-of-the-environment")
    monkeypatch.setitem(fsspec.config.conf, "memory", {"secret": "CANARY-of-settings"})
    url = "memory://me:CANARY-of-the-url@bucket/corpus?sig=CANARY-signed"
    with fsspec.open("memory://me:CANARY-of-the-url@bucket/corpus/prose/a.jsonl", "w") as file:
        file.write("".join(json.dumps({"text": text}) + "\n" for text in texts["prose"]))
    asked = validated(Data, {"inputs": [url.partition("?")[0]], "held_out": 0.2})
    make_store(asked, tokenizer=str(model_folder), out=str(tmp_path / "store"))
    gone = {"inputs": [f"{url}&also=CANARY-of-the-environment", {"path": url}]}
    asked = {"model": str(model_folder), "out": str(tmp_path / "run"), "data": gone, "prune": {"to": target}}
    with pytest.raises(UserError) as caught:
        run_recipe(validated(Recipe, asked))
    assert "CANARY" not in str(caught.value) + caplog.text
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"recipe.yaml", "record.jsonl", "manifest.json", "stage.json"} <= {path.name for path in written}
    for path in written:
        assert b"CANARY" not in path.read_bytes(), path
