"""The file of figures: what it is called, whether it can be written, and what an interrupted run left in it.

A document holds environment, preset, candidates, and five lists of rows: rows (a candidate in a case), host,
train_step, mixed, latency. The row of a dropped candidate has `fault` (wrong, failed or does not fit) and `why` instead
of figures.
"""

import json
import os
import tempfile
from pathlib import Path

CASE = ("dtype", "M", "K", "N", "R", "dropout")
_FIGURES = ("both_us", "both_p20_us", "both_p80_us", "both_ratio", "fwd_ratio", "bwd_ratio", "held_bytes", "gflops")


def key(row: dict) -> tuple:
    """What names a row's case."""
    return tuple(row[name] for name in CASE)


def faults(document: dict) -> list[dict]:
    """The rows of candidates that were dropped for being wrong or for failing; not fitting into memory is no fault."""
    lists = ("rows", "host", "train_step", "mixed", "latency")
    rows = [row for name in lists for row in document.get(name, [])]
    return [row for row in rows if row.get("fault", "does not fit") != "does not fit"]


def target(document: dict, path: str | Path, suffix: str, name: str) -> Path:
    """The file that `path` means: itself, or <preset>-<device>[-<CPU>] in the directory that it is.

    Args:
        document: gives preset and environment.
        path: a file, or a directory that is there or that has no suffix.
        suffix: .json or .png.
        name: the argument's name, for the message.
    Raises: ValueError for another suffix, or for a directory in the file's place.
    """
    if not str(path):
        raise ValueError(f"{name} must be a {suffix} file or a directory; got an empty path")
    path, environment = Path(path), document["environment"]
    if path.is_dir() or not (path.suffix or path.exists()):
        parts = (document["preset"], environment["kind"], environment["cpu"])
        path /= "-".join(part for part in parts if part) + suffix
    elif path.suffix.lower() != suffix:
        raise ValueError(f"{name} must be a {suffix} file or a directory; got {str(path)!r}")
    if path.is_dir():
        raise ValueError(
            f"{name} must be a {suffix} file or a directory; got {str(path)!r}, whose place a directory has"
        )
    return path


def check_writable(path: Path) -> None:
    """Make the directory of `path`, and try it with a file that is gone at once.

    Raises: OSError naming what refuses.
    """
    directory = Path(os.path.realpath(path)).parent  # where write_whole writes
    directory.mkdir(parents=True, exist_ok=True)
    try:
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(directory)) from None


def _read(path: Path) -> dict:
    """Raises: ValueError if `path` is not what `fused-lora bench` writes."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # undecodable bytes and bad JSON are ValueErrors
        raise ValueError(
            f"{path} cannot be resumed: it must be whole JSON; got {type(error).__name__}: {error}"
        ) from None
    parts = (("environment", dict), ("rows", list))
    whole = isinstance(document, dict) and all(isinstance(document.get(name), kind) for name, kind in parts)
    if not whole or not all(_is_row(row) for row in document["rows"]):
        raise ValueError(
            f"{path} cannot be resumed: it must be a file that `fused-lora bench` has written; got another"
        )
    return document


def _is_row(row: object) -> bool:
    if not isinstance(row, dict):
        return False
    texts, numbers = ["candidate", "dtype"], [*CASE[1:]]
    if "fault" in row:
        texts += ["fault", "why"]
    else:
        numbers += _FIGURES
    return all(isinstance(row.get(name), str) for name in texts) and all(
        isinstance(row.get(name), int | float) for name in numbers
    )


def rows_to_resume(document: dict, path: Path) -> list[dict]:
    """The rows of an interrupted run of `document`'s preset, candidates and environment (but for the date); none where
    there is no file yet.

    Raises: ValueError if the file is damaged or comes from another run.
    """
    if not path.exists():
        return []
    old = _read(path)
    facts = {name: (old.get(name), document[name]) for name in ("preset", "candidates")}
    facts |= {name: (old["environment"].get(name), value) for name, value in document["environment"].items()}
    for name, (there, here) in facts.items():
        if there != here and name != "date":
            raise ValueError(f"{path} cannot be resumed: {name} must be {here!r}; got {there!r}")
    return old["rows"]
