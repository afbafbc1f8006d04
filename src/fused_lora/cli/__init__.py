"""The command line: fused-lora info | finetune | merge | bench, a file each.

Bad input is one red line on stderr: exit code 2 for the input, 1 for the machine.
"""

import typer

from fused_lora.cli.bench import bench
from fused_lora.cli.finetune import finetune
from fused_lora.cli.info import info
from fused_lora.cli.merge import merge

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help="LoRA at the price of the frozen layer.",
)
for command in (info, finetune, merge, bench):
    app.command()(command)
