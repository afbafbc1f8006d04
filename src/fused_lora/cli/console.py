"""What the commands share: the two consoles, options, and expected failures as one red line."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

out, err = Console(highlight=False), Console(stderr=True, highlight=False)

Model = Annotated[
    str,
    typer.Option(help="Model directory, GGUF file or hub id; default: the packaged SmolLM2-135M.", show_default=False),
]
Dtype = Annotated[str, typer.Option(help="Of the base model: fp32, bf16 or fp16.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.", show_default=False)]


@contextmanager
def errors() -> Iterator[None]:
    """Expected failures as one red line and an exit code; anything else is a bug and keeps its traceback."""
    import torch

    try:
        yield
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except torch.OutOfMemoryError as error:
        fail(str(error), 1)
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error), 1)
    except ModuleNotFoundError as error:
        fail(f"{error.name} is not installed: pip install 'fused-lora[finetune,bench]'", 1)
    except ValueError as error:
        fail(str(error), 2)


def fail(message: str, code: int) -> None:
    err.print(Text(f"error: {' '.join(message.split())}", style="bold red"), soft_wrap=True)
    raise typer.Exit(code)


def default_device(device: str | None) -> str:
    import torch

    return device or ("cuda" if torch.cuda.is_available() else "cpu")
