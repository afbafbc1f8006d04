"""The command line: fused-lora info | finetune | merge | analyze | bench | tune, a file each.

Bad input is one red line on stderr: exit code 2 for the input, 1 for the machine, 128 + its number for a signal.
"""

from typing import Annotated

import typer

from fused_lora import __version__
from fused_lora.cli.analyze import analyze
from fused_lora.cli.bench import bench
from fused_lora.cli.finetune import finetune
from fused_lora.cli.info import info
from fused_lora.cli.merge import merge
from fused_lora.cli.tune import tune

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help="LoRA at the price of the frozen layer.",
)
for command in (info, finetune, merge, analyze, bench, tune):
    app.command()(command)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"fused-lora {__version__}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """What stands before a command."""
