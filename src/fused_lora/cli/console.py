"""What the commands share: the two consoles, options, and expected failures and signals as one red line."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Who read the output has gone, as in `| head`."""
        with suppress(SystemExit):  # rich's own code for it, 1
            super().on_broken_pipe()
        raise SystemExit(128 + signal.SIGPIPE)


out, err = _Console(highlight=False), _Console(stderr=True, highlight=False)

Model = Annotated[
    str | None,
    typer.Option(
        help="Model directory, GGUF file, hub id or 'packaged'; default: the packaged SmolLM2-135M.", show_default=False
    ),
]
Dtype = Annotated[str, typer.Option(help="Of the base model: fp32, bf16 or fp16.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.", show_default=False)]

_EXTRA_OF = {"peft": "peft", "pytest_benchmark": "bench"}  # others come with finetune


class Terminated(BaseException):
    """SIGTERM or SIGHUP, as an exception so that what is half done is cleaned up."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


@contextmanager
def errors(**options: str) -> Iterator[None]:
    """Expected failures as one red line and an exit code; anything else is a bug and keeps its traceback.

    Args: options: by the name of an argument that a ValueError may begin with, the option in its place.
    """
    from fused_lora.models import out_of_memory

    try:
        with _signals():
            yield
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except Terminated as ended:
        fail(f"ended by {signal.Signals(ended.number).name}", 128 + ended.number)
    except BrokenPipeError:  # who read the output has gone, as in `| head`
        raise typer.Exit(128 + signal.SIGPIPE) from None
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error), 1)
    except ImportError as error:
        fail(missing(error), 1)
    except ValueError as error:
        name, space, words = str(error).partition(" ")
        fail(options.get(name, name) + space + words, 2)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        fail(f"out of memory: {error}".removesuffix(": "), 1)


@contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM (docker stop, Slurm) and SIGHUP (a closed terminal) raise Terminated, the first of them only; what was
    ignored (nohup) stays so."""
    replaced: list[signal.Signals] = []

    def end(number: int, frame: object) -> None:
        for each in replaced:
            signal.signal(each, signal.SIG_IGN)
        raise Terminated(number)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, end)
                replaced.append(number)
    try:
        yield
    finally:
        for number in replaced:
            signal.signal(number, signal.SIG_DFL)


def missing(error: ImportError) -> str:
    """What to install for an import that failed; raises the error itself if that is this package's own fault."""
    if error.name == "fused_lora._C":
        return str(error)
    name = (error.name or "").partition(".")[0]
    if name == "fused_lora" or (not isinstance(error, ModuleNotFoundError) and name):
        raise error
    what = f"{name} is not installed" if name else str(error)
    return f"{what}: pip install 'fused-lora[{_EXTRA_OF.get(name, 'finetune')}]'"


def given(**options: str | None) -> None:
    """Raises ValueError for an option, or an argument in capitals, that is there and empty, as an unset variable in a
    script leaves it."""
    for name, value in options.items():
        if value == "":
            raise ValueError(f"{name if name.isupper() else f'--{name}'} must not be empty; got ''")


def say(line: str) -> None:
    out.print(Text(printable(line)), soft_wrap=True)


def print_table(table: Table) -> None:
    """Within the width of a terminal; a file or a pipe, where rich believes in 80 columns, gets each row whole."""
    (out if out.is_terminal else _Console(file=out.file, width=10_000)).print(table)


def fail(message: str, code: int) -> None:
    err.print(Text(printable(f"error: {' '.join(message.split())}"), style="bold red"), soft_wrap=True)
    raise typer.Exit(code)


def printable(text: str) -> str:
    """A model's words, or a file's name, without control characters, which a terminal would obey, and without what no
    encoding holds."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in text)


def default_device(device: str | None) -> str:
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if device is None else device
