"""Odd data: links, encodings, line ends, suffixes, bad lines, names, and an output among it: it works, or is named."""

import json
import os

import pytest

from fused_lora import data
from fused_lora.data import Document


def write(path, content=b"some words\n" * 9):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def names_of(*paths):
    return [document.name for document in data.read_documents(tuple(map(str, paths)), "text")]


def test_linked_directories_are_read_once_and_loops_end(tmp_path):
    write(tmp_path / "elsewhere/b.txt")
    write(tmp_path / "data/a.txt")
    (tmp_path / "data/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/twin").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/up").symlink_to(tmp_path / "data")
    (tmp_path / "file").symlink_to("data/a.txt")
    (tmp_path / "whole").symlink_to("data")
    assert names_of(tmp_path / "data") == names_of(tmp_path / "whole") == ["a.txt", "link/b.txt"]
    assert names_of(tmp_path / "file") == ["file"]


def test_a_directory_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    write(tmp_path / "data/a.txt")
    write(tmp_path / "data/closed/b.txt")
    real = data.os.scandir

    def scandir(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(data.os, "scandir", scandir)
    with pytest.raises(PermissionError, match="closed"):
        names_of(tmp_path / "data")


def test_what_is_passed_over_in_a_directory_is_said(tmp_path):
    write(tmp_path / "data/a.txt")
    for name in ("latin.txt", "more.txt", "other.txt"):
        write(tmp_path / "data" / name, "é".encode("latin-1"))
    write(tmp_path / "data/wide.txt", "wide".encode("utf-16"))
    (tmp_path / "data/gone.txt").symlink_to("nowhere")
    said = []
    assert len(data.read_documents((str(tmp_path / "data"),), "text", said.append)) == 1
    assert said == [
        "passed over 5 files that are no UTF-8 text, or links to nothing: gone.txt, latin.txt, more.txt and 2 more"
    ]
    (tmp_path / "data/a.txt").unlink()
    with pytest.raises(
        ValueError, match="data must hold text; got none in .*/data, but 5 files that are no UTF-8 text"
    ):
        names_of(tmp_path / "data")
    said.clear()
    write(tmp_path / "data/a.txt")
    data.read((str(tmp_path / "data"),), (str(tmp_path / "data"),), "text", said.append)
    assert len(said) == 2


@pytest.mark.parametrize("suffix", [".JSONL", ".Jsonl", ".ndjson"])
def test_jsonl_in_other_letters(tmp_path, suffix):
    path = write(tmp_path / f"data/train{suffix}", b'{"text": "one"}\n{"text": "two"}\n')
    assert names_of(path) == names_of(tmp_path / "data") == [f"train{suffix}:1", f"train{suffix}:2"]


@pytest.mark.parametrize("name", ["t.jsonl.gz", "t.JSONL.ZST", "t.parquet", "t.arrow", "part.jsonl.0.xz"])
def test_packed_data_is_refused_also_in_a_directory(tmp_path, name):
    path = write(tmp_path / "data" / name)
    write(tmp_path / "data/readme.md")
    for given in (path, tmp_path / "data"):
        with pytest.raises(ValueError, match=f"{name} must be text or JSONL; got a {path.suffix.lower()} file: unpack"):
            names_of(given)


def test_other_archives_are_refused_by_name_and_passed_over_in_a_directory(tmp_path):
    path = write(tmp_path / "data/logo.zip", b"PK\x03\x04\x00")
    write(tmp_path / "data/readme.md")
    assert names_of(tmp_path / "data") == ["readme.md"]
    with pytest.raises(ValueError, match=r"logo.zip must be text or JSONL; got a .zip file"):
        names_of(path)


@pytest.mark.parametrize(
    "content, texts",
    [
        (b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "two"}\r\n', {1: "one", 3: "two"}),
        (b'{"text": "one"}\r{"text": "two"}', {1: "one", 2: "two"}),
        ('{"text": "a\u2028b\u0085c"}\n{"text": "two"}'.encode(), {1: "a\u2028b\u0085c", 2: "two"}),
        (b'{"text": "half \\ud83d"}\n{"text": "\\ude00 \\ud83d\\ude00"}', {1: "half \ufffd", 2: "\ufffd \U0001f600"}),
    ],
)
def test_line_ends_marks_and_half_letters_of_jsonl(tmp_path, content, texts):
    path = write(tmp_path / "t.jsonl", content)
    documents = data.read_documents((str(path),), "text")
    assert {int(document.name.split(":")[1]): document.text for document in documents} == texts


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"text": ' + b"[" * 100_000, "nested too deep"),
        (b'{"text": ' + b"[" * 500 + b"]" * 500 + b"}", "is a string .*; got "),
        (b'{"text": ' + b"1" * 5000 + b"}", "must be JSON; got Exceeds the limit"),
        (b'{"text": 1e999}', "is a string .*; got inf"),
        (b'{"text": "caf\xe9"}', "can't decode byte 0xe9 in position 13"),
        ('{"text": "wide"}'.encode("utf-16"), "can't decode byte 0xff in position 0"),
        (json.dumps({f"field{i}": 1 for i in range(1000)}).encode(), r"got the fields \['field0', .*\]$"),
    ],
    ids=["deep", "deep value", "huge int", "huge float", "latin", "utf-16", "fields"],
)
def test_odd_lines_are_named_in_a_line(tmp_path, line, message):
    path = write(tmp_path / "t.jsonl", b'{"text": "fine"}\n' if b"\0" not in line else b"")
    path.write_bytes(path.read_bytes() + line)
    number = 1 if b"\0" in line else 2
    with pytest.raises(ValueError, match=f"t.jsonl, line {number}: .*{message}") as caught:
        names_of(path)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
def test_wide_encodings_are_named(tmp_path, encoding):
    mark = b"" if encoding != "utf-16-be" else b"\xfe\xff"
    path = write(tmp_path / "t.txt", mark + "wide words".encode(encoding))
    with pytest.raises(ValueError, match=f"t.txt must be UTF-8 text; got .* {encoding[:6].upper()} at byte 0"):
        names_of(path)


def test_line_ends_of_text(tmp_path):
    path = write(tmp_path / "t.txt", b"a\r\nb\rc\nd\r\r\ne")
    assert data.read_documents((str(path),), "text")[0].text == "a\nb\nc\nd\n\ne"


def test_file_names_that_are_not_utf_8(tmp_path):
    for name in (b"a.txt", b"caf\xe9.txt", b"c.jsonl", b"\xff.jsonl"):
        write(tmp_path / os.fsdecode(name), b'{"text": "some words"}\n')
    train, held_out = data.read((str(tmp_path),), (), "text")
    assert len(train) + len(held_out) == 4


def test_empty_paths_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "private.txt")
    for paths in (("",), ("private.txt", "")):
        with pytest.raises(ValueError, match="data must be a file or a directory; got ''"):
            data.read(paths, (), "text")


def test_a_single_text_has_words_on_both_sides_of_its_split():
    for text, held in (("a\nb\n\n\n", "b\n\n\n"), ("\n\n\na\nb", "b"), ("a\n" * 9 + "\n" * 50, None)):
        (train,), (held_out,) = data.split([Document("one.txt", text)])
        assert train.text.strip() and held_out.text.strip() and train.text + held_out.text == text
        assert held is None or held_out.text == held
    with pytest.raises(ValueError, match="got one line in one.txt"):
        data.split([Document("one.txt", "\n\njust this\n\n")])


def test_an_output_whose_files_are_data_is_refused(tmp_path):
    own, out = ("metrics.jsonl",), tmp_path / "data/runs/out"
    write(tmp_path / "data/a.txt")
    write(tmp_path / "linked/b.txt")
    (tmp_path / "data/.hidden").mkdir()
    (tmp_path / "data/link").symlink_to(tmp_path / "linked")
    (tmp_path / "to-data").symlink_to("data")
    where = (str(tmp_path / "data"),)
    inside = [out, tmp_path / "data", tmp_path / "to-data/out", tmp_path / "linked/out", tmp_path / "data/x/../out"]
    for output in inside:
        with pytest.raises(ValueError, match="--output must lie outside the data, or its files are data too; got "):
            data.check_output(where, output, own)
    for output in (
        tmp_path,
        tmp_path / "data-2",
        tmp_path / "data/.runs/out",
        tmp_path / "data/.hidden",
        tmp_path / "o",
    ):
        data.check_output(where, output, own)


def test_an_output_that_writes_over_the_data_is_refused(tmp_path):
    write(tmp_path / "out/metrics.jsonl")
    write(tmp_path / "out/corpus/a.txt")
    (tmp_path / "link.jsonl").symlink_to("out/metrics.jsonl")
    for path in (tmp_path / "out/metrics.jsonl", tmp_path / "link.jsonl"):
        with pytest.raises(ValueError, match="--output must not write over the data"):
            data.check_output((str(path),), tmp_path / "out", ("metrics.jsonl",))
    data.check_output((str(tmp_path / "out/corpus"),), tmp_path / "out", ("metrics.jsonl",))
