"""Training text: files to documents, documents to train and held-out token blocks, and the endless shuffled order of
the blocks.

Everything is a pure function of the files and the seed, so a resumed run needs only the number of blocks that it has
used.
"""

import hashlib
import json
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

IGNORED = -100  # the label that cross_entropy leaves out; fills up a short last block
_NOT_CODE = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data", "__pycache__"}


@dataclass(frozen=True)
class Document:
    """One text: a file, or a line of a JSONL file. The name does not depend on where the data lies."""

    name: str
    text: str


def stdlib_documents() -> list[Document]:
    """Python's own standard library: its modules' sources without tests, character tables and installed packages.

    Raises: ValueError if this Python carries no sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = [path for path in sorted(root.rglob("*.py")) if not _NOT_CODE & set(path.relative_to(root).parts)]
    if not files:
        raise ValueError(f"--data must be given, the standard library at {root} has no sources (*.py)")
    found = (_text_document(path, path.relative_to(root).as_posix(), strict=False) for path in files)
    return [document for document in found if document is not None]


def read_documents(paths: tuple[str, ...], text_field: str) -> list[Document]:
    """The documents of files and directories, in a fixed order.

    A *.jsonl file is a document a line, any other file one document. In a directory hidden files and files that are not
    UTF-8 text are passed over; a file that is named itself must be text.

    Args:
        paths: files or directories.
        text_field: the field of a JSONL line that holds its text.
    Raises: FileNotFoundError naming the path; ValueError naming file and line for bad JSONL, text that is not UTF-8, or
        no text at all.
    """
    documents: list[Document] = []
    for given in map(Path, paths):
        if not given.exists():
            raise FileNotFoundError(2, "No such file or directory", str(given))
        if given.is_dir():
            inside = [(path, path.relative_to(given)) for path in sorted(given.rglob("*")) if path.is_file()]
            files = [
                (path, name.as_posix()) for path, name in inside if not any(part.startswith(".") for part in name.parts)
            ]
        else:
            files = [(given, given.name)]
        for path, name in files:
            if path.suffix == ".jsonl":
                documents += _jsonl_documents(path, name, text_field)
            else:
                document = _text_document(path, name, strict=not given.is_dir())
                documents += [] if document is None else [document]
    documents = [document for document in documents if document.text.strip()]
    if not documents:
        raise ValueError(f"data must hold text; got none in {', '.join(paths)}")
    return documents


def _text_document(path: Path, name: str, strict: bool) -> Document | None:
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if strict:
            raise ValueError(f"{path} must be UTF-8 text; got {error.reason} at byte {error.start}") from None
        return None
    if "\0" in text:
        if strict:
            raise ValueError(f"{path} must be UTF-8 text; got a NUL at byte {content.index(0)}")
        return None
    return Document(name, text.replace("\r\n", "\n"))


def _jsonl_documents(path: Path, name: str, text_field: str) -> list[Document]:
    documents = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}, line {number}: must be JSON; got {error}") from None
        text = row.get(text_field) if isinstance(row, dict) else row
        if not isinstance(row, dict) or not isinstance(text, str):
            got = f"the fields {sorted(row)}" if isinstance(row, dict) and text_field not in row else repr(text)[:80]
            raise ValueError(
                f"{path}, line {number}: must be an object whose {text_field!r} is a string (--text-field); got {got}"
            )
        documents.append(Document(f"{name}:{number}", text))
    return documents


def read(paths: tuple[str, ...], eval_paths: tuple[str, ...], text_field: str) -> tuple[list[Document], list[Document]]:
    """(train, held out): what the paths hold; without paths the standard library, without eval_paths a part of the
    first.

    Raises: FileNotFoundError and ValueError as `read_documents`, `stdlib_documents` and `split`.
    """
    documents = read_documents(paths, text_field) if paths else stdlib_documents()
    return (documents, read_documents(eval_paths, text_field)) if eval_paths else split(documents)


def split(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """(train, held out): a twentieth of the documents by the hash of their names, at least one; of a single document
    its last tenth.

    Raises: ValueError if a single document has no second line to hold out.
    """
    if len(documents) == 1:
        lines = documents[0].text.splitlines(keepends=True)
        if len(lines) < 2:
            raise ValueError(
                "data must hold a second document or line to hold out, or give --eval-data; got one line in "
                f"{documents[0].name}"
            )
        cut = min(len(lines) - 1, len(lines) * 9 // 10 or 1)
        return [Document(documents[0].name, "".join(lines[:cut]))], [Document(documents[0].name, "".join(lines[cut:]))]
    ranks = [int.from_bytes(hashlib.sha256(document.name.encode()).digest()[:8], "big") for document in documents]
    order = sorted(range(len(documents)), key=ranks.__getitem__)
    held_out = {order[0], *(i for i in order if ranks[i] % 20 == 0)} - {order[-1]}
    return [d for i, d in enumerate(documents) if i not in held_out], [documents[i] for i in sorted(held_out)]


def to_blocks(documents: list[Document], tokenizer, seq_len: int) -> Tensor:
    """The documents' tokens in one row, each document ended by the end-of-text token, cut into blocks [n, seq_len]
    int64.

    A short last block is filled up with IGNORED; a last block of one token, which predicts nothing, is left out.

    Raises: ValueError if there are not two tokens.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rows = tokenizer([document.text for document in documents], add_special_tokens=False, verbose=False)["input_ids"]
    tokens = torch.tensor([token for row in rows for token in (*row, *end)], dtype=torch.int64)
    if len(tokens) < 2:
        raise ValueError(f"data must hold at least 2 tokens; got {len(tokens)} in {len(documents)} documents")
    if len(tokens) % seq_len == 1:
        tokens = tokens[:-1]
    blocks = torch.full((-(-len(tokens) // seq_len), seq_len), IGNORED)
    blocks.view(-1)[: len(tokens)] = tokens
    return blocks


def shuffled(n: int, start: int, count: int, seed: int) -> Tensor:
    """The block numbers [count] at positions start … start + count of an endless order that visits all n blocks once an
    epoch."""
    positions = torch.arange(start, start + count)
    numbers = torch.empty(count, dtype=torch.int64)
    for epoch in range(start // n, (start + count - 1) // n + 1):
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        here = positions // n == epoch
        numbers[here] = order[positions[here] % n]
    return numbers


def spread(blocks: Tensor, tokens: int) -> Tensor:
    """At most `tokens` tokens of the blocks [n, L], at least one block, picked at even distances so that every part of
    the text counts."""
    count = min(len(blocks), max(1, tokens // blocks.shape[1]))
    return blocks[torch.arange(count) * len(blocks) // count]


def fingerprint(*blocks: Tensor) -> str:
    """A hash of the tokens: what a resumed run must find unchanged."""
    digest = hashlib.sha256()
    for tensor in blocks:
        digest.update(repr(tuple(tensor.shape)).encode() + tensor.numpy().tobytes())
    return digest.hexdigest()
