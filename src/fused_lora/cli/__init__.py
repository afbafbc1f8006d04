"""The command line: fused-lora info | finetune | merge | bench, a file each.

Bad input is one red line on stderr: exit code 2 for the input, 1 for the machine, 128 + its number for a signal.
"""

import sys

try:
    import rich  # noqa: F401
    import typer  # noqa: F401
except ModuleNotFoundError as error:
    _missing = error.name

    def app(*args, **kwargs) -> None:
        """Say what the command line needs; the library needs neither."""
        sys.exit(f"error: {_missing} is not installed: pip install 'fused-lora[cli]'")

else:
    from fused_lora.cli.commands import app

__all__ = ["app"]
