"""fused-lora merge: an adapter folded into its base model."""

from pathlib import Path
from typing import Annotated

import typer

from fused_lora.cli.console import Dtype, errors, given, say
from fused_lora.models import DTYPES


def merge(
    adapter: Annotated[str, typer.Argument(help="Directory of an adapter, from fused-lora or PEFT.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="Base model: directory, GGUF file, hub id or 'packaged'; default: the one that the adapter names."
        ),
    ] = None,
    output: Annotated[str, typer.Option(help="The new model directory.")] = "fused-lora-merged",
    dtype: Dtype = "fp32",
) -> None:
    """Fold an adapter into its base model: a directory that plain transformers loads."""
    with errors():
        given(ADAPTER=adapter, model=model, output=output)
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
        from fused_lora.finetune.export import export_merged

        export_merged(model, Path(adapter), Path(output), DTYPES[dtype], say)
        say(f"wrote {output}")
