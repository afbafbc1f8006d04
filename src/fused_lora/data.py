"""Training data: files to documents or examples, these to train and held-out token blocks, and the endless shuffled
order of the blocks.

Everything is a pure function of the files and the seed, so a resumed run needs only the number of blocks that it has
used.
"""

import codecs
import hashlib
import os
import sysconfig
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from fused_lora.jsonl import Document, Example, read_lines, to_rows
from fused_lora.rows import IGNORED, packed, padded

Data = list[Document | Example]  # of one kind
_JSONL, _TABLES = (".jsonl", ".ndjson"), (".parquet", ".arrow", ".feather")
_ARCHIVES = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip", ".tar", ".tgz", ".7z")
_MARKS = (  # UTF-32 first: its mark begins with UTF-16's
    ("UTF-32", codecs.BOM_UTF32_LE),
    ("UTF-32", codecs.BOM_UTF32_BE),
    ("UTF-16", codecs.BOM_UTF16_LE),
    ("UTF-16", codecs.BOM_UTF16_BE),
)
_NOT_CODE = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data", "__pycache__"}


def stdlib_documents() -> list[Document]:
    """Python's own standard library: its modules' sources without tests, character tables and installed packages.

    Raises: ValueError if this Python carries no sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = [path for path in sorted(root.rglob("*.py")) if not _NOT_CODE & set(path.relative_to(root).parts)]
    if not files:
        raise ValueError(f"--data must be given, the standard library at {root} has no sources (*.py)")
    documents = []
    for path in files:
        with suppress(ValueError):  # a few are in other encodings
            documents.append(_text_document(path, path.relative_to(root).as_posix()))
    return documents


def read_documents(paths: tuple[str, ...], text_field: str, say: Callable[[str], None] | None = None) -> Data:
    """The documents or the examples of files and directories, in a fixed order.

    A *.jsonl or *.ndjson file is a document or an example a line, any other file one document. In a directory hidden
    files and files that are not UTF-8 text are passed over, links are followed; a file that is named itself must be
    text.

    Args:
        paths: files or directories.
        text_field: the field of a JSONL line that holds its text; a line without it is an example.
        say: gets a line about files that were passed over.
    Raises: OSError naming the path; ValueError naming file and line for bad JSONL, text that is not UTF-8, data that
        must be unpacked first, an empty path, no text at all, or texts beside examples.
    """
    documents: Data = []
    passed_over: list[str] = []
    for given in paths:
        named = not Path(given).is_dir()
        for path, name in list_files(given)[0]:
            _check_format(path, named)
            if path.suffix.lower() in _JSONL:
                documents += read_lines(path, name, text_field)
                continue
            try:
                documents.append(_text_document(path, name))
            except (ValueError, FileNotFoundError):  # no text, or a link to nothing
                if named:
                    raise
                passed_over.append(name)
    documents = [document for document in documents if isinstance(document, Example) or document.text.strip()]
    more = f" and {len(passed_over) - 3} more" if len(passed_over) > 3 else ""
    words = f"{len(passed_over)} files that are no UTF-8 text, or links to nothing: {', '.join(passed_over[:3])}{more}"
    if not documents:
        raise ValueError(
            f"data must hold text; got none in {', '.join(paths)}{f', but {words}' if passed_over else ''}"
        )
    kinds = {isinstance(document, Example): document.name for document in reversed(documents)}
    if len(kinds) > 1:
        raise ValueError(
            f"data must be texts alone or examples alone; got the text {kinds[False]}, the example {kinds[True]}"
        )
    if passed_over and say is not None:
        say(f"passed over {words}")
    return documents


def list_files(given: str) -> tuple[list[tuple[Path, str]], set[str]]:
    """(files, directories) that a data path stands for: files with the names of their documents, in order; the real
    paths of the directories that they were looked for in.

    Hidden entries are left out. Links are followed, each real directory is entered once.

    Raises: OSError naming what is missing or cannot be listed; ValueError for an empty path.
    """
    if not given:
        raise ValueError("data must be a file or a directory; got ''")
    root = Path(given)
    if not root.exists():
        raise FileNotFoundError(2, "No such file or directory", given)
    if not root.is_dir():
        return [(root, root.name)], set()
    files, directories = [], set()

    def fail(error: OSError):
        raise error

    for folder, inner, names in os.walk(root, followlinks=True, onerror=fail):
        real = os.path.realpath(folder)
        if real in directories:  # a link back up, or to a directory that was there already
            inner.clear()
            continue
        directories.add(real)
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        found = (Path(folder, name) for name in names if not name.startswith("."))
        files += [(path, path.relative_to(root)) for path in found if path.is_file() or not path.exists()]
    return [(path, name.as_posix()) for path, name in sorted(files, key=lambda file: file[1].parts)], directories


def check_output(paths: tuple[str, ...], output: Path, own: tuple[str, ...]) -> None:
    """Raises ValueError if the files that a run writes into its output are data, as in an output inside a directory of
    data, seen through links too.

    Args:
        paths: the data, as in `read_documents`.
        output: the run's directory, which may not exist yet.
        own: names of the files that the run writes there.
    """
    real = Path(os.path.realpath(output))
    written = {str(real / name) for name in own}
    for given in paths:
        files, directories = list_files(given)
        for folder in (real, *real.parents):
            inside = real.relative_to(folder).parts
            if str(folder) in directories and not any(part.startswith(".") for part in inside):
                raise ValueError(
                    f"--output must lie outside the data, or its files are data too; got {output} in {given}"
                )
        for path, _ in files:
            if os.path.realpath(path) in written:
                raise ValueError(f"--output must not write over the data; got {output} and {path}")


def _check_format(path: Path, named: bool) -> None:
    """Raises ValueError for data that is no text before it is unpacked; in a directory other archives are passed over
    as any other file that is no text."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    last = suffixes[-1] if suffixes else ""
    packed = last in _ARCHIVES and (named or bool({*_JSONL} & set(suffixes)))
    if packed or last in _TABLES:
        raise ValueError(f"{path} must be text or JSONL; got a {last} file: unpack it, or convert it to JSONL")


def _text_document(path: Path, name: str) -> Document:
    """Raises: ValueError naming the file and the byte that is no UTF-8 text."""
    content = path.read_bytes()
    for encoding, mark in _MARKS:
        if content.startswith(mark):
            raise ValueError(f"{path} must be UTF-8 text; got the byte-order mark of {encoding} at byte 0")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8 text; got {error.reason} at byte {error.start}") from None
    if "\0" in text:
        raise ValueError(f"{path} must be UTF-8 text; got a NUL at byte {content.index(0)}")
    return Document(name, text.replace("\r\n", "\n").replace("\r", "\n"))


def read(
    paths: tuple[str, ...], eval_paths: tuple[str, ...], text_field: str, say: Callable[[str], None] | None = None
) -> tuple[Data, Data]:
    """(train, held out): what the paths hold; without paths the standard library, without eval_paths a part of the
    first.

    Raises: OSError and ValueError as `read_documents`, `stdlib_documents` and `split`.
    """
    documents: Data = read_documents(paths, text_field, say) if paths else [*stdlib_documents()]
    return (documents, read_documents(eval_paths, text_field, say)) if eval_paths else split(documents)


def split(documents: Data) -> tuple[Data, Data]:
    """(train, held out): a twentieth of the documents by the hash of their names, at least one; of a single document
    its last tenth.

    Raises: ValueError if a single document has no second line to hold out, or for a single example.
    """
    if len(documents) == 1:
        if isinstance(documents[0], Example):
            raise ValueError(
                f"data must hold a second example to hold out, or give --eval-data; got {documents[0].place}"
            )
        lines = documents[0].text.splitlines(keepends=True)
        filled = [i for i, line in enumerate(lines) if line.strip()]
        if len(filled) < 2:
            raise ValueError(
                "data must hold a second document or line to hold out, or give --eval-data; got one line in "
                f"{documents[0].name}"
            )
        cut = min(max(len(lines) * 9 // 10, filled[0] + 1), filled[-1])  # words on both sides
        return [Document(documents[0].name, "".join(lines[:cut]))], [Document(documents[0].name, "".join(lines[cut:]))]
    ranks = [
        int.from_bytes(hashlib.sha256(document.name.encode("utf-8", "surrogateescape")).digest()[:8], "big")
        for document in documents
    ]
    order = sorted(range(len(documents)), key=ranks.__getitem__)
    held_out = {order[0], *(i for i in order if ranks[i] % 20 == 0)} - {order[-1]}
    return [d for i, d in enumerate(documents) if i not in held_out], [documents[i] for i in sorted(held_out)]


def to_blocks(documents: Data, tokenizer, seq_len: int, cut: bool = False, packing: bool = False) -> Tensor:
    """The documents' tokens in one row, each document ended by the end-of-text token, cut into blocks [n, seq_len]
    int64; of examples the rows of `to_rows`.

    A short last block is filled up with IGNORED; a last block of one token, which predicts nothing, is left out.

    Args:
        documents, tokenizer: what becomes tokens, by what.
        seq_len: tokens of a block.
        cut: as in `to_rows`.
        packing: documents and examples share blocks, each seen as if it stood alone: `packed`, a document that is
            longer than a block as parts of seq_len tokens and a rest, which is left out if it is one token.
    Raises: ValueError if there are not two tokens, or as `to_rows`.
    """
    examples = [document for document in documents if isinstance(document, Example)]
    rows = to_rows(examples, tokenizer, seq_len, cut) if examples else _rows_of(documents, tokenizer)
    if packing:
        pieces = [piece for row in rows for piece in row.split(seq_len) if len(piece) > 1]
        return packed(pieces, seq_len) if pieces else _refuse_short(documents, rows)
    if examples:
        return padded(rows)
    tokens = torch.cat(rows)
    if len(tokens) < 2:
        return _refuse_short(documents, rows)
    if len(tokens) % seq_len == 1:
        tokens = tokens[:-1]
    blocks = torch.full((-(-len(tokens) // seq_len), seq_len), IGNORED)
    blocks.view(-1)[: len(tokens)] = tokens
    return blocks


def _rows_of(documents: Data, tokenizer) -> list[Tensor]:
    """The tokens of each document and the end-of-text token, if there is one."""
    texts = [document.text for document in documents if isinstance(document, Document)]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    found = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return [torch.tensor([*row, *end], dtype=torch.int64) for row in found]


def _refuse_short(documents: Data, rows: list[Tensor]) -> NoReturn:
    names = f"{len(documents)} documents: {', '.join(document.name for document in documents[:3])}"
    raise ValueError(f"data must hold a text of at least 2 tokens; got {sum(map(len, rows))} in {names}")


def trimmed(blocks: Tensor) -> Tensor:
    """The blocks [n, L] without the columns at the end that are filling in all of them."""
    return blocks[:, : int((blocks != IGNORED).any(0).nonzero().max()) + 1]


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
