import hashlib
import importlib.util

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from shearling.data.tokenise import VOCABULARIES
from shearling.errors import UserError
from shearling.weights import checkpoint, folder, gguf
from shearling.weights.folder import CARRIED_FILES, carry, resolve

CARRIED = {
    "tokenizer.json": b"\xef\xbb\xbf{\r\n}",
    "tokenizer_config.json": b"{}",
    "special_tokens_map.json": b"{}",
    "vocab.json": b"{}",
    "merges.txt": b"a b\r\n",
    "vocab.txt": b"a",
    "tokenizer.model": b"\x00\xff",
    "spiece.model": b"\x00\xfe",
    "tekken.json": b"{}",
    "added_tokens.json": b"{}",
    "chat_template.jinja": b"{{ ''.__class__.__mro__ }}",
    "chat_template.json": b"{}",
    "additional_chat_templates/rag.jinja": b"{{ x }}",
    "generation_config.json": b'{"eos_token_id": 2}',
    "LICENSE": b"terms",
    "license.md": b"terms",
    "NOTICE.txt": b"notice",
    "Use_Policy.md": b"policy",
}
LEFT = (
    "config.json",
    "model.safetensors",
    "pytorch_model.bin",
    "README.md",
    "modeling_evil.py",
    "my_license.txt",
    ".env",
)


def names(path):
    return {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}


def test_carried_files_are_byte_for_byte_and_nothing_else(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    for name, content in {**CARRIED, **dict.fromkeys(LEFT, b"x")}.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(content)
    assert set(carry(source, out)) == CARRIED.keys()
    assert names(out) == CARRIED.keys()
    assert {name: (out / name).read_bytes() for name in CARRIED} == CARRIED


def test_every_vocabulary_that_is_read_is_carried():
    assert set(VOCABULARIES) <= CARRIED_FILES


def test_carrying_from_a_bare_folder(tmp_path):
    (tmp_path / "source").mkdir()
    assert carry(tmp_path / "source", tmp_path / "out") == ()


def test_carrying_follows_no_link_out(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "source" / "NOTICE").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="leads out of the folder"):
        carry(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_is_itself(tmp_path, monkeypatch):
    assert resolve(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~") == tmp_path


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./absent", "nothing at this path"),
        ("/absent/model", "nothing at this path"),
        ("~/absent/model", "nothing at this path"),
        ("models/absent.gguf", "nothing at this path"),
        ("here.bin", "a file that isn't GGUF"),
        ("gpt2", "neither a local folder nor a Hub id"),
        ("a/b/c", "neither a local folder nor a Hub id"),
        ("org/na me", "neither a local folder nor a Hub id"),
    ],
)
def test_refused_models(tmp_path, monkeypatch, model, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.bin").write_text("")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: pytest.fail("downloaded"))
    with pytest.raises(UserError, match=message):
        resolve(model)


def test_a_hub_id_asks_for_no_pickles(tmp_path, monkeypatch):
    asked = {}

    def download(repository, **options):
        asked.update(options, repository=repository)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("org/Model-1.5B") == tmp_path
    assert asked["repository"] == "org/Model-1.5B"
    files = [*CARRIED, *LEFT, "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    files += [
        "original/consolidated.00.pth",
        "pytorch_model-00001-of-00002.bin",
        "consolidated.safetensors",
        "model.gguf",
    ]
    wanted = set(
        huggingface_hub.utils.filter_repo_objects(
            files, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
        )
    )
    weights = {"model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"}
    assert wanted == CARRIED.keys() | weights | {"config.json"}


@pytest.mark.parametrize(
    "fault",
    [LocalEntryNotFoundError("https://user:hf_secret@hub"), ConnectionError("hf_secret"), RuntimeError("hf_secret")],
)
def test_an_unreachable_hub_is_a_user_error_without_secrets(monkeypatch, fault):
    def download(*args, **kwargs):
        raise fault

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(UserError, match="not a local folder, and the Hub could not be reached") as caught:
        resolve("org/name")
    assert "hf_secret" not in str(caught.value)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "shearling" / "gguf"


@pytest.fixture
def gguf_file(tmp_path):
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF" + bytes(20))
    return tmp_path / "tiny.gguf"


def test_a_gguf_is_converted_once(cache, gguf_file, monkeypatch):
    calls = []

    def save(path, out):
        calls.append(path)
        out.mkdir()
        (out / "config.json").write_text("{}")

    monkeypatch.setattr(gguf, "_save", save)
    first = resolve(str(gguf_file))
    assert first.parent == cache
    assert len(first.name) == 64
    assert resolve(str(gguf_file)) == first
    assert calls == [gguf_file]
    assert [path.name for path in cache.iterdir()] == [first.name]
    gguf_file.write_bytes(b"GGUF" + bytes(21))
    assert resolve(str(gguf_file)) != first


def test_an_interrupted_conversion_leaves_nothing(cache, gguf_file, monkeypatch):
    def save(path, out):
        out.mkdir()
        (out / "model.safetensors").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf, "_save", save)
    with pytest.raises(KeyboardInterrupt):
        resolve(str(gguf_file))
    assert list(cache.iterdir()) == []


def test_two_conversions_at_once_settle_on_one(cache, gguf_file, monkeypatch):
    def save(path, out):
        out.mkdir()
        (out / "config.json").write_text("ours")
        other = cache / hashlib.sha256(gguf_file.read_bytes()).hexdigest()
        other.mkdir()
        (other / "config.json").write_text("theirs")

    monkeypatch.setattr(gguf, "_save", save)
    assert (resolve(str(gguf_file)) / "config.json").read_text() == "theirs"
    assert len(list(cache.iterdir())) == 1


def test_a_missing_extra_is_named(cache, gguf_file, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else found(name))
    with pytest.raises(UserError, match=r"no package gguf.*pip install 'shearling\[gguf\]'"):
        resolve(str(gguf_file))


def test_a_gguf_by_name_only(cache, tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"\x80\x04pickle")
    with pytest.raises(UserError, match="starts with"):
        resolve(str(tmp_path / "x.gguf"))


def test_a_cache_that_cant_be_made(tmp_path, gguf_file, monkeypatch):
    pytest.importorskip("gguf")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set XDG_CACHE_HOME"):
        resolve(str(gguf_file))


def test_fingerprint_is_the_checkpoints():
    assert folder.fingerprint is checkpoint.fingerprint
