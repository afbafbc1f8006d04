"""Files that are whole at every moment, old or new, and a directory that one run at a time works in."""

import errno
import fcntl
import json
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOCK = ".fused-lora.lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # some network file systems


def write_whole(contents: dict[Path, bytes]) -> None:
    """Write one file or several that belong together: all are on the disk under temporary names before the first
    replaces its predecessor.

    A symbolic link stays, its target is replaced; a device or a pipe is written to as it is. New files have the mode
    that the umask says.

    Args:
        contents: what to write, by file; directories are made as needed.
    Raises: OSError naming the file; every old file that was not replaced yet is whole then, and no temporary is left.
    """
    targets = {path: Path(os.path.realpath(path)) for path in contents}
    temporary = {
        path: target.with_name(_temporary(target.name, secrets.token_hex(8))) for path, target in targets.items()
    }
    path = next(iter(contents))
    try:
        for path, content in contents.items():
            if _is_stream(path):
                path.write_bytes(content)
                del targets[path]
                continue
            targets[path].parent.mkdir(parents=True, exist_ok=True)
            with open(temporary[path], "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path, target in targets.items():
            os.replace(temporary[path], target)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        for leftover in temporary.values():
            with suppress(OSError):  # gone after the rename, or never made
                leftover.unlink()


def _temporary(name: str, mark: str) -> str:
    return f".{name}.{mark}.tmp"


def _is_stream(path: Path) -> bool:
    """Whether this is a device or a pipe (/dev/stdout), which no file may replace."""
    with suppress(OSError):
        mode = path.stat().st_mode
        return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))
    return False


def write_json(path: Path, value: object) -> None:
    """Write a value as indented JSON, see `write_whole`. Raises: OSError naming the file."""
    write_whole({path: (json.dumps(value, indent=1) + "\n").encode()})


@contextmanager
def claimed(directory: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Keep a directory for this process: made if missing, written to for a trial, locked against other runs.

    The kernel holds the lock (flock), so that nothing of it outlives a process that is killed. On leaving, the lock's
    file goes, and the directory too if it was made here and nothing is in it.

    Args:
        directory: its missing parents are made too, and stay.
        say: gets a line where the file system has no locks.
    Raises: OSError naming the directory if another run is at work in it, or nothing can be written there.
    """
    directory = Path(os.path.realpath(directory))  # the target of a link to nothing can be made, the link cannot
    made = not directory.exists()
    file = None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = _locked(directory / LOCK, say)
        yield
    finally:
        if file is not None:
            with suppress(OSError):
                (directory / LOCK).unlink()  # while the lock is held: nobody else's
            os.close(file)
        if made:
            with suppress(OSError):  # not empty
                directory.rmdir()


def _locked(path: Path, say: Callable[[str], None]) -> int:
    """The descriptor of the lock's file, which holds this process's number."""
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path.parent)) from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file), os.stat(path)):
                    break
            os.close(file)  # its owner removed it between open and flock
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(file)
                words = "another run is at work in it" if isinstance(error, BlockingIOError) else error.strerror
                raise OSError(error.errno, words, str(path.parent)) from None
            say(f"the file system of {path.parent} has no locks: no second run may use it at the same time")
            break
    try:
        os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
        os.fsync(file)
    except OSError as error:  # a full disk shows here
        with suppress(OSError):
            path.unlink()
        os.close(file)
        raise OSError(error.errno, error.strerror, str(path.parent)) from None
    return file


def remove_leftovers(directory: Path, names: tuple[str, ...]) -> None:
    """Remove the temporaries of `write_whole` that a killed run left of these files; the directory must be claimed."""
    for name in names:
        for path in directory.glob(_temporary(name, "?" * 16)):
            path.unlink(missing_ok=True)


def check_space(directory: Path, needed: int) -> None:
    """Raises OSError naming the directory if its file system says that fewer than `needed` bytes are free."""
    system = os.statvfs(directory)
    free = system.f_bavail * system.f_frsize
    if system.f_blocks and free < needed:  # some network file systems say 0 of everything
        words = f"{os.strerror(errno.ENOSPC)}: needs {needed / 1e9:.3g} GB, {free / 1e9:.3g} GB are free"
        raise OSError(errno.ENOSPC, words, str(directory))
