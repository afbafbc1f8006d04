"""Writing files so that they are whole at every moment, old or new: aside, synced, renamed."""

import os
import secrets
from contextlib import suppress
from pathlib import Path


def write_whole(contents: dict[Path, bytes]) -> None:
    """Write one file or several that belong together: all are on the disk under temporary names before the first
    replaces its predecessor.

    Args:
        contents: what to write, by file; directories are made as needed.
    Raises: OSError naming the file; every old file that was not replaced yet is whole then, and no temporary is left.
    """
    temporary = {path: path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp") for path in contents}
    path = next(iter(contents))
    try:
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary[path], "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path in contents:
            os.replace(temporary[path], path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        for leftover in temporary.values():
            with suppress(OSError):  # gone after the rename, or never made
                leftover.unlink()
