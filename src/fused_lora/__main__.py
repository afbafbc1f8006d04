"""python -m fused_lora: the command line."""

from fused_lora.cli import app

app(prog_name="fused-lora")
