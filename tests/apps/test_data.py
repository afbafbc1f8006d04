"""Documents, their split, token blocks and the order of the blocks: all a function of the files and the seed."""

import json
import os

import pytest
import torch

from fused_lora import data
from fused_lora.data import IGNORED, Document


class Letters:
    """A tokenizer of one token a letter."""

    eos_token_id = 0

    def __call__(self, texts, add_special_tokens, verbose):
        assert add_special_tokens is False
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


def named(n):
    return [Document(f"file{i}.py", f"x = {i}\n") for i in range(n)]


def test_a_directory_is_read_in_one_order_without_hidden_and_binary_files(tmp_path):
    root = tmp_path / "data"
    for name, content in {
        "b.txt": b"two\r\nlines",
        "a/z.md": "\ufeffzé".encode(),
        ".git/config": b"hidden",
        "a/.hidden.txt": b"hidden",
        "latin.txt": b"caf\xe9",
        "zero.bin": b"a\0b",
        "empty.txt": b" \n",
        "rows.jsonl": b'{"text": "r1"}\n\n{"text": "r2", "id": 7}\n',
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    found = data.read_documents((str(root),), "text")
    assert found == [
        Document("a/z.md", "zé"),
        Document("b.txt", "two\nlines"),
        Document("rows.jsonl:1", "r1"),
        Document("rows.jsonl:3", "r2"),
    ]
    assert data.read_documents((str(root / "b.txt"), str(root / "rows.jsonl")), "text") == found[1:]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("rows.jsonl", b'{"text": "good"}\n{"text": \n', r"rows.jsonl, line 2: must be JSON; got Expecting value"),
        (
            "rows.jsonl",
            b'{"body": "a", "id": 1}\n',
            r"rows.jsonl, line 1: .* 'text' is a string \(--text-field\); got the fields \['body', 'id'\]",
        ),
        ("rows.jsonl", b'{"text": 5}\n', r"rows.jsonl, line 1: .* 'text' is a string .*; got 5"),
        ("rows.jsonl", b"[1]\n", r"rows.jsonl, line 1: must be an object .*; got \[1\]"),
        ("rows.jsonl", b'{"text": "\xff"}\n', r"rows.jsonl, line 1: must be JSON"),
        ("latin.txt", b"caf\xe9", r"latin.txt must be UTF-8 text; got .* at byte 3"),
        ("zero.txt", b"ab\0", r"zero.txt must be UTF-8 text; got a NUL at byte 2"),
        ("blank.txt", b" \n\n", r"data must hold text; got none in .*blank.txt"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        data.read_documents((str(tmp_path / name),), "text")


def test_a_missing_path_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        data.read_documents((str(tmp_path / "nowhere"),), "text")


def test_text_field(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "no", "body": "yes"}))
    assert [document.text for document in data.read_documents((str(tmp_path),), "body")] == ["yes"]


@pytest.mark.parametrize("n", [2, 3, 10, 400])
def test_split_takes_whole_documents_whatever_their_order(n):
    documents = named(n)
    train, held_out = data.split(documents)
    assert train and held_out and sorted(map(repr, train + held_out)) == sorted(map(repr, documents))
    backwards = data.split(documents[::-1])
    assert backwards == (train[::-1], held_out[::-1])
    if n == 400:
        assert 8 <= len(held_out) <= 40
        more = data.split(named(500))[1]
        assert set(held_out) <= set(more), "a new file must not move an old one to the other side"


def test_split_of_twins_and_of_one_document():
    train, held_out = data.split([Document("same.txt", "text")] * 4)
    assert train and held_out
    text = "".join(f"line {i}\n" for i in range(20))
    (train,), (held_out,) = data.split([Document("one.txt", text)])
    assert train.text + held_out.text == text and held_out.text == "line 18\nline 19\n"
    with pytest.raises(
        ValueError, match="second document or line to hold out, or give --eval-data; got one line in one.txt"
    ):
        data.split([Document("one.txt", "just this")])


def test_eval_data_holds_nothing_out(tmp_path):
    for name in ("train.txt", "eval.txt"):
        (tmp_path / name).write_text(name)
    train, held_out = data.read((str(tmp_path / "train.txt"),), (str(tmp_path / "eval.txt"),), "text")
    assert [document.text for document in train + held_out] == ["train.txt", "eval.txt"]


def test_blocks_hold_every_token_once():
    blocks = data.to_blocks([Document("a", "abc"), Document("b", "de")], Letters(), 4)
    assert blocks.tolist() == [[97, 98, 99, 0], [100, 101, 0, IGNORED]]
    assert data.to_blocks([Document("a", "abcd")], Letters(), 4).tolist() == [[97, 98, 99, 100]], (
        "a block of one token predicts nothing"
    )
    with pytest.raises(ValueError, match="at least 2 tokens; got 1 in 1 documents"):
        data.to_blocks([Document("a", "")], Letters(), 4)


def test_the_order_visits_every_block_once_an_epoch_and_can_be_entered_anywhere():
    n = 7
    whole = data.shuffled(n, 0, 4 * n, seed=3)
    epochs = whole.view(4, n)
    assert (epochs.sort(dim=1).values == torch.arange(n)).all()
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 4
    for start, count in ((0, 1), (5, 3), (6, 15), (20, 8)):
        assert torch.equal(data.shuffled(n, start, count, seed=3), whole[start : start + count])
    assert not torch.equal(data.shuffled(n, 0, n, seed=4), epochs[0])


def test_spread_reaches_over_the_whole_text():
    blocks = torch.arange(100).view(10, 10)
    assert data.spread(blocks, 30)[:, 0].tolist() == [0, 30, 60]
    assert torch.equal(data.spread(blocks, 10**6), blocks)
    assert len(data.spread(blocks, 1)) == 1


def test_fingerprint_sees_every_token_and_the_block_length():
    blocks = torch.arange(12).view(3, 4)
    changed = blocks.clone()
    changed[2, 3] = 0
    marks = [
        data.fingerprint(*each)
        for each in ((blocks, blocks), (blocks, changed), (blocks.view(4, 3), blocks), (changed, blocks))
    ]
    assert len(set(marks)) == 4 and marks[0] == data.fingerprint(blocks.clone(), blocks)


def test_the_standard_library_is_code_and_splits():
    train, held_out = data.read((), (), "text")
    names = {document.name for document in train + held_out}
    assert {"json/decoder.py", "argparse.py", "collections/__init__.py"} <= names
    assert not [name for name in names if {"test", "tests", "site-packages", "encodings"} & set(name.split("/"))]
    assert (
        len(held_out) >= 5
        and len(train) > 10 * len(held_out)
        and not {d.name for d in train} & {d.name for d in held_out}
    )


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
