import builtins
import json

import datasets
import pytest
from sources import documents_of, fault_of, texts_of

from shearling.data import hub
from shearling.data.documents import find_domains, parts

TEXTS = [f"text {number}" for number in range(50)]


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    hub._load.cache_clear()


def dataset(**columns):
    return datasets.Dataset.from_dict(columns or {"id": list(range(50)), "text": TEXTS})


@pytest.mark.parametrize("part_bytes", [1, 100, 1 << 25])
def test_a_saved_dataset_is_a_domain(tmp_path, monkeypatch, part_bytes):
    monkeypatch.setattr(hub, "PART_BYTES", part_bytes)
    dataset().save_to_disk(tmp_path / "wiki")
    (domain,) = find_domains([tmp_path / "wiki"])
    assert (domain.name, domain.train, domain.eval) == ("wiki", (f"hf-dataset:{tmp_path}/wiki",), ())
    found = documents_of(domain.train[0])
    assert [document.text for document in found] == TEXTS
    assert found[49].where == f"hf-dataset:{tmp_path}/wiki, row 50"
    assert len(parts(domain.train[0])) == {1: 50, 1 << 25: 1}.get(part_bytes, len(parts(domain.train[0])))


def test_of_saved_splits_train_and_eval_count(tmp_path):
    half = dataset(text=["held out"])
    datasets.DatasetDict(train=dataset(), eval=half, test=half).save_to_disk(tmp_path / "all/wiki")
    datasets.DatasetDict(train=dataset(), test=half).save_to_disk(tmp_path / "all/web")
    web, wiki = find_domains([tmp_path / "all"])
    assert (len(web.train), len(web.eval)) == (1, 0)
    assert [texts_of(source) for source in (*wiki.train, *wiki.eval)] == [TEXTS, ["held out"]]
    name = f"hf-dataset:{tmp_path}/all/wiki"
    assert texts_of(f"{name}::test") == ["held out"]
    assert "no split 'dev' among train, eval, test" in fault_of(parts, f"{name}::dev")
    datasets.DatasetDict(test=half).save_to_disk(tmp_path / "none")
    assert "no split 'train' among test" in fault_of(find_domains, [tmp_path / "none"])


def test_a_dataset_by_name_is_streamed_shard_by_shard(tmp_path):
    folder = tmp_path / "owner/name"
    for split, texts in (("train", TEXTS), ("validation", ["v"])):
        for shard in range(2):
            path = folder / f"data/{split}-{shard:05d}-of-00002.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in texts[shard::2]))
    name = f"hf-dataset:{folder}"
    assert [domain.name for domain in find_domains([name])] == ["name"]
    assert len(parts(name)) == 2
    found = documents_of(name)
    assert [document.text for document in found] == TEXTS[0::2] + TEXTS[1::2]
    assert found[25].where == f"{name}, shard 1, row 1"
    assert texts_of(f"{name}::validation") == ["v"]
    assert "expected a dataset that `datasets` opens" in fault_of(parts, f"{name}::dev")
    missing = fault_of(documents_of, name, text_column="body")
    assert "'body'" in missing
    assert "text" in missing


def test_conversations_and_rows_without_text(tmp_path):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    dataset(messages=[chat, chat[:1]]).save_to_disk(tmp_path / "chat")
    name = f"hf-dataset:{tmp_path}/chat"
    assert documents_of(name, messages_column="messages")[0].messages == chat
    found = fault_of(documents_of, name, messages_column="messages", assistant_loss_only=True)
    assert "row 2: found no message of the assistant (user)" in found
    assert "no column 'text' among messages" in fault_of(parts, name)
    dataset(text=["x", None]).save_to_disk(tmp_path / "none")
    assert "row 2: found a 'text' of type NoneType" in fault_of(documents_of, f"hf-dataset:{tmp_path}/none")


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("hf-dataset:owner/wiki", "wiki"),
        ("hf-dataset:owner/wiki:en", "wiki-en"),
        ("hf-dataset:owner/wiki:en:validation", "wiki-en"),
        ("hf-dataset:owner/wiki::validation", "wiki"),
        ("hf-dataset:s3://bucket/wiki::validation", "wiki"),
    ],
)
def test_how_a_dataset_is_spelled(spec, name):
    assert find_domains([spec])[0].name == name


@pytest.mark.parametrize("spec", ["hf-dataset:", "hf-dataset::en", "hf-dataset:a:b:c:d"])
def test_what_is_no_name(spec):
    assert "expected hf-dataset:NAME[:CONFIG][:SPLIT]" in fault_of(find_domains, [spec])


def test_a_name_that_nobody_has(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    found = fault_of(parts, "hf-dataset:nobody/nothing-hf_secretsecret")
    assert "check its name, configuration and split, your access" in found


def test_without_datasets_the_extra_is_named(monkeypatch):
    importing = builtins.__import__

    def refuse(name, *args):
        if name == "datasets":
            raise ImportError(name)
        return importing(name, *args)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert "pip install 'shearling[datasets]'" in fault_of(parts, "hf-dataset:owner/name")
