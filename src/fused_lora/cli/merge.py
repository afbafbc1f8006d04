"""fused-lora merge: an adapter folded into its base model."""

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from fused_lora.cli.console import Dtype, Model, errors, out
from fused_lora.models import DTYPES


def merge(
    adapter: Annotated[Path, typer.Argument(help="Directory of an adapter, from fused-lora or PEFT.")],
    model: Model = "",
    output: Annotated[Path, typer.Option(help="The new model directory.")] = Path("fused-lora-merged"),
    dtype: Dtype = "fp32",
) -> None:
    """Fold an adapter into its base model: a directory that plain transformers loads."""
    with errors():
        from fused_lora.finetune import export as job
        from fused_lora.models import packaged_model

        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
        job.merge(model or packaged_model(), adapter, output, DTYPES[dtype])
        out.print(Text(f"wrote {output}"), soft_wrap=True)
