import gzip
import json
from pathlib import Path

import pytest
import zstandard

from shearling.data import files
from shearling.data.documents import Part, find_domains, read
from shearling.errors import UserError, UserErrors

COMPRESS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}
LINES = b'{"text": "one"}\n{"text": "two", "src": 1}\r\n\n{"text": ""}\n{"text": "a\\u0000b \\u00e9"}'


def texts(path):
    return [document.text for document in read(Part(path))]


def message(path) -> str:
    with pytest.raises(UserError) as caught:
        list(read(Part(path)))
    return str(caught.value)


def tree(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")
    return root


def layout(*inputs):
    found = find_domains(inputs)
    return {d.name: ([Path(p).name for p in d.train], [Path(p).name for p in d.eval]) for d in found}


# Reading


@pytest.mark.parametrize("suffix", COMPRESS)
def test_json_lines_plain_and_compressed(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix](LINES))
    found = list(read(Part(path)))
    assert [document.text for document in found] == ["one", "two", "", "a\0b é"]
    assert [document.num_bytes for document in found] == [3, 3, 0, 6]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_plain_file_is_one_document_with_its_line_ends(tmp_path, suffix):
    path = tmp_path / f"a.py{suffix}"
    path.write_bytes(COMPRESS[suffix]("a = 1\r\nb = 'é'\r\n".encode()))
    assert texts(path) == ["a = 1\r\nb = 'é'\r\n"]


def test_only_a_bom_at_the_start_is_dropped(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfx\xef\xbb\xbf")
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "x"}\n{"text": "\xef\xbb\xbfy"}\n')
    assert texts(tmp_path / "a.txt") == ["x\ufeff"]
    assert texts(tmp_path / "a.jsonl") == ["x", "\ufeffy"]


def test_zstd_frames_after_one_another_and_skippable_ones(tmp_path):
    frame = zstandard.compress(b'{"text": "x"}\n')
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(frame + b"\x50\x2a\x4d\x18\x04\x00\x00\x00skip" + frame)
    assert texts(path) == ["x", "x"]


@pytest.mark.parametrize("read_bytes", [1, 7, 64])
def test_lines_don_t_depend_on_the_chunks(tmp_path, monkeypatch, read_bytes):
    monkeypatch.setattr(files, "READ_BYTES", read_bytes)
    lines = [{"text": "x" * length} for length in (0, 1, 200, 3)]
    raw = "\n".join(map(json.dumps, lines)).encode()
    for suffix, compress in COMPRESS.items():
        path = tmp_path / f"a.jsonl{suffix}"
        path.write_bytes(compress(raw))
        assert texts(path) == [line["text"] for line in lines]


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        (b'{"text": "x"', ["broken JSON", "at character 12"]),
        (b"[" * 100_000, ["broken JSON"]),
        (b'["x"]', ["a JSON list", "an object"]),
        (b"null", ["a JSON NoneType"]),
        (b'{"content": "x", "id": 1}', ["no 'text' among the keys (content, id)"]),
        (b"{}", ["no 'text' among the keys (none)"]),
        (b'{"text": 7}', ["'text' of type int", "a string"]),
        (b'{"text": null}', ["'text' of type NoneType"]),
        (b'{"text": "ab\\ud800"}', ["lone surrogate, \\ud800 at character 2", "UTF-8"]),
        (b'{"text": "\xff"}', ["0xff at byte 36", "not UTF-8", "convert the file"]),
    ],
)
@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_bad_line_is_named_with_its_byte(tmp_path, line, parts, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix]('{"text": "é"}\n\n         \n'.encode() + line + b"\n"))
    found = message(path)
    unit = "decompressed byte" if suffix else "byte"
    assert f"{path}, line 4 ({unit} 26)" in found
    assert [part for part in parts if part not in found] == []


def test_a_bad_byte_after_a_bom_is_counted_from_the_file_s_start(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfab\xe9c")
    assert "0xe9 at byte 5, which is not UTF-8" in message(path)


def test_a_plain_file_with_nul_is_binary(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"abc\0")
    found = message(path)
    assert f"{path}: found a NUL at byte 3, so a binary file; expected plain text or .jsonl" in found


@pytest.mark.parametrize("raw", ["id,text\n1,x\n", 'id,"text"\n1,x\n'])
def test_a_spreadsheet_of_documents_is_no_plain_text(tmp_path, raw):
    (tmp_path / "a.csv").write_text(raw)
    (tmp_path / "a.tsv").write_text(raw.replace(",", "\t"))
    for name in ("a.csv", "a.tsv"):
        assert f"{name}: found a spreadsheet with 'text' in it; expected JSON lines" in message(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("package.json", '{\n "text": "x"\n}\n'),
        ("minified.json", '{"a": 1}'),
        ("list.json", "[1, 2]"),
        ("empty.json", ""),
        ("data.csv", "id,name\n1,x\n"),
    ],
)
def test_what_code_comes_with_is_plain_text(tmp_path, name, raw):
    (tmp_path / name).write_text(raw)
    assert texts(tmp_path / name) == [raw]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_every_truncation_of_a_compressed_file_is_seen(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    whole = COMPRESS[suffix](LINES)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert f"{path}: found " in message(path)
    assert f"expected a whole {suffix} file; fetch or compress it again" in message(path)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("raw", [b"", b"plain text", "whole + rubbish"])
def test_what_is_not_compressed_or_goes_on_after_is_refused(tmp_path, suffix, raw):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(COMPRESS[suffix](b"x") + b"rubbish" if isinstance(raw, str) else raw)
    assert f"expected a whole {suffix} file" in message(path)


# Domains


def test_a_file_is_a_domain_named_after_its_stem(tmp_path):
    tree(tmp_path, "wiki.jsonl.gz", "v1.5-web.txt")
    assert set(layout(tmp_path / "wiki.jsonl.gz", tmp_path / "v1.5-web.txt")) == {"wiki", "v1.5-web"}


def test_a_folder_of_files_is_one_domain(tmp_path):
    tree(tmp_path / "code", "b.py", "a.txt", "train.py", ".hidden")
    assert layout(tmp_path / "code") == {"code": (["a.txt", "b.py", "train.py"], [])}


def test_a_folder_of_folders_is_a_domain_each_read_to_the_bottom(tmp_path):
    tree(tmp_path, "code/x/y/a.py", "code/b.py", "wiki/part-0.jsonl", ".git/c.py", "code/.git/d.py")
    assert layout(tmp_path) == {"code": (["b.py", "a.py"], []), "wiki": (["part-0.jsonl"], [])}


def test_splits_by_file_and_by_folder(tmp_path):
    tree(tmp_path, "a/train.jsonl.gz", "a/eval.jsonl.gz", "b/train/x.txt", "b/eval/y.txt")
    tree(tmp_path, "c/train-0.jsonl", "c/train-1.jsonl", "c/eval_0.jsonl", "d/training.txt", "d/evaluate.txt")
    assert layout(tmp_path) == {
        "a": (["train.jsonl.gz"], ["eval.jsonl.gz"]),
        "b": (["x.txt"], ["y.txt"]),
        "c": (["train-0.jsonl", "train-1.jsonl"], ["eval_0.jsonl"]),
        "d": (["evaluate.txt", "training.txt"], []),
    }
    assert layout(tmp_path / "b") == {"b": (["x.txt"], ["y.txt"])}


def test_a_linked_folder_is_followed_and_a_loop_refused(tmp_path):
    tree(tmp_path, "real/a.txt", "domains/one/b.txt")
    (tmp_path / "domains/one/link").symlink_to(tmp_path / "real")
    assert layout(tmp_path / "domains") == {"one": (["b.txt", "a.txt"], [])}
    (tmp_path / "domains/one/loop").symlink_to(tmp_path / "domains/one")
    with pytest.raises(UserError, match="loop: found a link that leads back"):
        find_domains([tmp_path / "domains"])


@pytest.mark.parametrize(
    ("names", "given", "parts"),
    [
        ([], ["gone"], ["gone: found no such file or folder"]),
        (["one/a.txt", "README.md"], ["."], ["files (README.md) beside folders (one)", "move the files"]),
        (["d/train.jsonl", "d/notes.md"], ["d"], ["notes.md beside the splits train.jsonl", "move the others"]),
        (["d/train/x.txt", "d/a.txt"], ["d"], ["a.txt beside the splits train"]),
        (["d/eval.jsonl"], ["d"], ["domain 'd'", "no file to train on"]),
        (["d/.hidden"], ["d"], ["domain 'd'", "no file to train on", "add documents"]),
        (["d/train/x.txt", "d/eval/.hidden"], ["d"], ["no file in eval"]),
        (["a/wiki.jsonl", "b/wiki.txt"], ["a/wiki.jsonl", "b/wiki.txt"], ["domain 'wiki'", "a/wiki.jsonl and ", "b/w"]),
        ([".secret/x.txt"], [".secret"], ["the domain name '.secret'", "rename it"]),
        (["a..b.txt"], ["a..b.txt"], ["the domain name 'a..b'"]),
    ],
)
def test_what_makes_no_domain_is_refused(tmp_path, names, given, parts):
    tree(tmp_path, *names)
    with pytest.raises(UserError) as caught:
        find_domains([tmp_path / name for name in given])
    assert [part for part in parts if part not in str(caught.value)] == []


def test_no_inputs_and_all_faults_at_once(tmp_path):
    with pytest.raises(UserError, match="inputs: found none"):
        find_domains([])
    with pytest.raises(UserErrors) as caught:
        find_domains([tmp_path / "gone", tmp_path / "lost"])
    assert "gone" in str(caught.value)
    assert "lost" in str(caught.value)
