"""Preparing a store: by any number of processes, after any end, onto a store that is there."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import documents, files, message

from shearling.data import jobs
from shearling.data.jobs import TICKETS, has_receipts
from shearling.data.prepare import prepare
from shearling.data.store import Store
from shearling.data.tokenise import load_tokenizer
from shearling.recipe import Data, validated
from shearling.verbs.data import add_documents, make_store

TEXTS = [f"the cat {number} sat on the mat, café 🐑" for number in range(120)]


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(jobs, "SHARD_BYTES", 1000)


@pytest.fixture
def corpus(write_documents, tmp_path):
    """Two domains in nine files that make a shard each, and one whose files are splits."""
    for number in range(5):
        write_documents(f"corpus/wiki/{number}.jsonl", TEXTS[20 * number : 20 * number + 20])
    for number in range(4):
        write_documents(
            f"corpus/code/{number}.jsonl", [f"def f{n}(x): return {n}" for n in range(30 + 10 * number)] + [""]
        )
    write_documents("corpus/said/train.jsonl", ["a dog ran", "the sheep was shorn"])
    write_documents("corpus/said/eval.jsonl", ["the mat"])
    return tmp_path / "corpus"


@pytest.fixture
def make(corpus, tokenizer_folder, tmp_path):
    def make(name, *, inputs=corpus, **options):
        (tmp_path / name).mkdir(exist_ok=True)
        return prepare([inputs], tokenizer=tokenizer_folder, out=tmp_path / name, held_out=0.2, **options)

    return make


def script(corpus, tokenizer, out, *, processes, told):
    """A process that makes a store with small shards and does `told` once the first is finished; then all of it end."""
    code = f"""
        import os, signal, sys
        from shearling.data import jobs
        from shearling.recipe import Data, validated
        from shearling.verbs.data import make_store

        def progress(domain, documents, tokens):
            {told}

        if __name__ == "__main__":
            jobs.SHARD_BYTES = 1000
            asked = validated(Data, {{"inputs": [{str(corpus)!r}], "held_out": 0.2, "processes": {processes}}})
            make_store(asked, tokenizer={str(tokenizer)!r}, out={str(out)!r}, progress=progress)
    """
    path = out.with_suffix(".py")
    path.write_text(textwrap.dedent(code))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, str(path)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        # A shell that starts the tests in the background has SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


# Processes


def test_any_number_of_processes_writes_the_same_bytes(make, tmp_path, small_shards):
    store = make("one", processes=1)
    assert len(store.manifest.domains["wiki"].train.shards) == 5
    make("three", processes=3)
    assert files(tmp_path / "one") == files(tmp_path / "three")
    assert {name.rpartition(".")[2] for name in files(tmp_path / "one")} == {"json", "tokens", "offsets"}
    assert sorted(map(tuple, documents(store, "wiki", "train") + documents(store, "wiki", "eval"))) == sorted(
        (*load_tokenizer_ids(text, store), store.eos_id) for text in TEXTS[:100]
    )


def load_tokenizer_ids(text, store):
    tokenizer = load_tokenizer(store.manifest.tokenizer.source)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_mistake_in_a_worker_is_the_user_s(make, corpus, write_documents, small_shards):
    write_documents("corpus/wiki/9.jsonl", ["fine"])
    (corpus / "wiki/9.jsonl").write_text('{"text": "fine"}\n{"text": 7}\n')
    found = message(make, "out", processes=2)
    assert f"{corpus / 'wiki/9.jsonl'}, line 2 (byte 17): found a 'text' of type int; expected" in found


def test_a_killed_worker_ends_it_without_a_hang(make, small_shards):
    def kill(*_):
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)

    found = message(make, "out", processes=2, progress=kill)
    assert "found a process that was killed while it tokenised" in found
    assert "run the same command again, it goes on where it was; fewer --processes" in found
    assert multiprocessing.active_children() == []


def test_ctrl_c_ends_all_processes(corpus, tokenizer_folder, tmp_path):
    process = script(corpus, tokenizer_folder, tmp_path / "out", processes=2, told="os.killpg(0, signal.SIGINT)")
    _, errors = process.communicate()  # until the last process that holds its outputs has ended
    assert process.returncode == -signal.SIGINT
    assert errors.count(b"Traceback") <= 2
    assert not (tmp_path / "out").exists()


# Going on


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_it_goes_on_where_it_was(corpus, make, tokenizer_folder, tmp_path, monkeypatch, small_shards, processes):
    kill = "os.kill(os.getpid(), signal.SIGKILL)"
    process = script(corpus, tokenizer_folder, tmp_path / "out", processes=processes, told=kill)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out.partial").glob("*/train-*.tokens")}
    finished = len(list((tmp_path / "out.partial").glob("*/*.job")))
    assert finished >= 1
    done, real = [], jobs.do
    monkeypatch.setattr("shearling.data.pool.do", lambda job, *rest: done.append(job.name) or real(job, *rest))
    asked = validated(Data, {"inputs": [str(corpus)], "held_out": 0.2, "processes": 1})
    store, before = make_store(asked, tokenizer=str(tokenizer_folder), out=str(tmp_path / "out"))
    assert not before
    assert len(done) == 11 - finished
    now = {path: (store.folder / path.parent.name / path.name).stat().st_mtime_ns for path in kept}
    again = [path for path in kept if now[path] != kept[path]]
    assert len(again) <= len(kept) - finished  # of a job without its receipt
    make("whole")
    (store.folder / "stage.json").unlink()
    assert files(store.folder) == files(tmp_path / "whole")


def interrupt(*_):
    raise KeyboardInterrupt


def test_what_changed_in_between_is_done_again(make, corpus, write_documents, tmp_path, small_shards):
    with pytest.raises(KeyboardInterrupt):
        make("out", progress=interrupt)
    assert has_receipts(tmp_path / "out")
    first = next(path for path in sorted(corpus.rglob("*.jsonl")) if path.parent.name == "code")
    write_documents(first.relative_to(tmp_path), ["another text"])
    (tmp_path / "out/code/half.tokens.77.part").write_bytes(b"half")
    (tmp_path / "out/gone").mkdir()
    make("out")
    make("fresh")
    assert files(tmp_path / "out") == files(tmp_path / "fresh")


@pytest.mark.parametrize("damage", ["cut", "gone", "receipt"])
def test_a_shard_that_is_not_whole_is_done_again(make, tmp_path, small_shards, damage):
    with pytest.raises(KeyboardInterrupt):
        make("out", progress=interrupt)
    (receipt,) = (tmp_path / "out").glob("*/*.job")
    tokens = next(receipt.parent.glob("*.tokens"))
    if damage == "cut":
        tokens.write_bytes(tokens.read_bytes()[:-1])
    elif damage == "gone":
        tokens.unlink()
    else:
        receipt.write_text(receipt.read_text()[:-9])
    make("out")
    make("fresh")
    assert files(tmp_path / "out") == files(tmp_path / "fresh")


def test_a_file_that_changes_while_it_is_read(make, corpus, small_shards, monkeypatch):
    real = jobs.read

    def touched(part, **options):
        yield from real(part, **options)
        os.utime(part.path, ns=(1, 1))

    monkeypatch.setattr(jobs, "read", touched)
    assert "found another size or time of change" in message(make, "out")


def test_a_mistake_late_keeps_what_is_finished(corpus, tokenizer_folder, tmp_path, small_shards):
    asked = validated(Data, {"inputs": [str(corpus)], "processes": 1})
    (corpus / "wiki/4.jsonl").write_text("{broken")
    found = message(make_store, asked, tokenizer=str(tokenizer_folder), out=str(tmp_path / "out"))
    assert "4.jsonl, line 1" in found
    assert len(list((tmp_path / "out.partial").glob("*/*.job"))) == 10
    (corpus / "wiki/4.jsonl").write_text('{"text": "mended"}\n')
    store, _ = make_store(asked, tokenizer=str(tokenizer_folder), out=str(tmp_path / "out"))
    store.verify()


def test_a_full_disk_keeps_what_is_finished(make, tmp_path, small_shards, monkeypatch):
    real, synced = os.fsync, []

    def full(descriptor):
        synced.append(descriptor)
        if len(synced) > 9:
            raise OSError(28, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        found = message(make, "out", processes=1)
    assert "found it can't be written to (No space left on device); expected room for the store" in found
    assert not list((tmp_path / "out").glob("*/*.part"))
    assert has_receipts(tmp_path / "out")
    make("out")
    make("fresh")
    assert files(tmp_path / "out") == files(tmp_path / "fresh")


# Held-out documents


@settings(max_examples=40)
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=6),
    st.sampled_from([1e-9, 0.01, 0.3, 0.5, 0.999999]),
    st.integers(0, 99),
)
def test_held_out_by_the_hash_alone_but_never_none_or_all(tmp_path_factory, tokenizer_folder, sizes, share, seed):
    folder = tmp_path_factory.mktemp("held")
    (folder / "d").mkdir()
    (folder / "out").mkdir()
    texts = iter(f"the cat {number} sat" for number in range(99))
    tickets = {}
    for shard, size in enumerate(sizes):
        mine = [next(texts) for _ in range(size)]
        (folder / f"d/{shard}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in mine))
        tickets |= {text: jobs._ticket(f"{seed}/d/{shard}/{number}") for number, text in enumerate(mine)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "SHARD_BYTES", 1)
        store = prepare(
            [folder / "d"], tokenizer=tokenizer_folder, out=folder / "out", held_out=share, seed=seed, processes=1
        )
    tokenizer = load_tokenizer(tokenizer_folder)
    found = {split: [tokenizer.decode(ids[:-1]) for ids in documents(store, "d", split)] for split in ("train", "eval")}
    if len(tickets) == 1:
        assert len(found["train"]) == len(found["eval"]) == 1
        return
    ranked = sorted(tickets, key=tickets.__getitem__)
    count = min(max(sum(ticket < share * TICKETS for ticket in tickets.values()), 1), len(ranked) - 1)
    assert sorted(found["eval"]) == sorted(ranked[:count])
    assert sorted(found["train"]) == sorted(ranked[count:])


# More documents


@pytest.fixture
def add(tokenizer_folder, tmp_path):
    def add(*inputs, **options):
        asked = validated(Data, {"inputs": [str(path) for path in inputs], **options})
        return add_documents(asked, tokenizer=str(tokenizer_folder), out=str(tmp_path / "store"))

    return add


@pytest.fixture
def store(corpus, tokenizer_folder, tmp_path, small_shards):
    asked = validated(Data, {"inputs": [str(corpus)], "held_out": 0.2})
    return make_store(asked, tokenizer=str(tokenizer_folder), out=str(tmp_path / "store"))[0]


def test_documents_are_added_without_writing_again(store, add, write_documents, tmp_path):
    before, times = files(store.folder), {path: path.stat().st_mtime_ns for path in store.folder.rglob("*.*s")}
    write_documents("more/wiki/0.jsonl", [f"more of it, {n}" for n in range(200)])
    write_documents("more/sums/0.jsonl", [f"{n} + 1" for n in range(50)])
    grown = add(tmp_path / "more")
    assert grown.domains == (*store.domains, "sums")
    assert grown.num_documents("wiki", "train") + grown.num_documents("wiki", "eval") == 300
    for domain in store.domains:
        for split in ("train", "eval"):
            count = store.num_tokens(domain, split)
            assert (grown.slice(domain, split, 0, count) == store.slice(domain, split)).all()
            for index in range(store.window_count(domain, split, 7)):
                assert (grown.window(domain, split, index, 7) == store.window(domain, split, index, 7)).all()
    after = files(store.folder)
    changed = [name for name in before if after[name] != before[name]]
    assert changed == ["manifest.json"]
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert grown.digest != store.digest
    grown.verify()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("store")) == ["store"]


def test_the_same_documents_are_refused(store, add, write_documents, corpus, tmp_path):
    found = message(add, corpus)
    assert f"domain 'code' of {store.folder}: found documents that it has already, from {corpus / 'code'}" in found
    assert "domain 'wiki'" in found
    (tmp_path / "wiki").mkdir()
    copy = tmp_path / "wiki/another-name.jsonl"
    copy.write_bytes((corpus / "wiki/3.jsonl").read_bytes())
    assert "another-name.jsonl; expected new ones; leave those files out" in message(add, tmp_path / "wiki")
    copy.write_text('{"text": "new"}\n')
    add(tmp_path / "wiki")
    assert "documents that it has already" in message(add, tmp_path / "wiki")


def test_another_tokenizer_cannot_add(store, corpus, write_documents, tmp_path, tokenizer_folder):
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "other")
    asked = validated(Data, {"inputs": [str(write_documents("new.jsonl", ["x"]))]})
    found = message(add_documents, asked, tokenizer=str(tmp_path / "other"), out=str(store.folder))
    assert "expected the tokenizer of" in found
    assert "prepare the data again with that tokenizer" in found


@pytest.mark.parametrize("at", ["shards", "links", "manifest", "end"])
def test_an_addition_killed_anywhere_is_whole_or_absent(store, add, write_documents, tmp_path, monkeypatch, at):
    write_documents("more/wiki/0.jsonl", [f"more of it, {n}" for n in range(60)])
    write_documents("more/wiki/1.jsonl", [f"and yet more, {n}" for n in range(60)])
    before = store.digest

    def die(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if at == "shards":
            patch.setattr("shearling.data.prepare.Manifest.write", die)
        elif at == "links":
            real, calls = os.link, []
            patch.setattr(os, "link", lambda *a: die() if len(calls) == 2 else calls.append(real(*a)))
        elif at == "manifest":
            patch.setattr("shearling.verbs.data.Manifest.write", die)
        else:
            patch.setattr("shearling.verbs.data.shutil.rmtree", die)
        with pytest.raises(KeyboardInterrupt):
            add(tmp_path / "more")
    now = Store.open(store.folder)
    now.verify()
    assert (now.digest == before) == (at != "end")
    if at == "end":
        assert "documents that it has already" in message(add, tmp_path / "more")
    else:
        add(tmp_path / "more")
    Store.open(store.folder).verify()
    assert Store.open(store.folder).num_documents("wiki", "train") > store.num_documents("wiki", "train")
    assert not (tmp_path / "store.more").exists()


def test_an_address_is_no_output(corpus, tokenizer_folder, tmp_path):
    asked = validated(Data, {"inputs": [str(corpus)]})
    for function in (make_store, add_documents):
        found = message(function, asked, tokenizer=str(tokenizer_folder), out="s3://bucket/store")
        assert "output s3://bucket/store: found an address; expected a local folder" in found


def test_counts_are_of_what_was_read(make, small_shards):
    told = Counter()
    store = make("out", progress=lambda domain, documents, tokens: told.update({domain: documents - told[domain]}))
    assert told == {d: store.num_documents(d, "train") + store.num_documents(d, "eval") for d in store.domains}
    assert store.manifest.domains["code"].train.skipped == 4
