"""`fused-lora merge`: a model directory with an adapter folded into its weights, for plain transformers."""

import os
import secrets
import shutil
from pathlib import Path

import torch

from fused_lora.adapters import load_adapter, merged
from fused_lora.models import load_model


def merge(model: str | Path, adapter: Path, output: Path, dtype: torch.dtype) -> None:
    """Write the base model with the adapter merged, and its tokenizer, as transformers saves them.

    The directory is written under another name beside `output` and renamed when it is whole.

    Args:
        model: the base, as `models.load_model` takes it.
        adapter: directory of an adapter in PEFT's format.
        output: the new directory; it must not exist, or be empty.
        dtype: of the weights written; the product B A is added in fp32.
    Raises: ValueError if output holds files, or the adapter is damaged or of another model; OSError naming the file.
        Nothing is left of a merge that failed.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output must be a directory; got the file {output}")
    if output.is_dir() and any(output.iterdir()):
        raise ValueError(
            f"--output must be a new or an empty directory; got {output} with {len(list(output.iterdir()))} entries"
        )
    base, tokenizer = load_model(model, dtype, "cpu")
    load_adapter(base, adapter)
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = output.with_name(f".{output.name}.{secrets.token_hex(8)}.tmp")
    try:
        staging.mkdir()
        with merged(base):
            base.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        for path in staging.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        os.replace(staging, output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
