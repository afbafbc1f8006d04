"""Documents, their split, token blocks and the order of the blocks: all a function of the files and the seed."""

import json

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
            r"rows.jsonl, line 1: .* 'text' is a string \(--text-field\), .*; got the fields \['body', 'id'\]",
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
