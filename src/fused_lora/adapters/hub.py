"""Adapters by their name on the Hugging Face hub."""

import re
from pathlib import Path

from fused_lora.adapters.peft_config import CONFIG_NAME
from fused_lora.adapters.peft_format import WEIGHTS_NAME


def adapter_directory(
    source: str | Path, revision: str | None, subfolder: str | None, local_files_only: bool = False
) -> Path:
    """The local directory of an adapter, downloaded if `source` is no directory but a hub id, "owner/name".

    Args:
        source: directory or hub id.
        revision: branch, tag or commit on the hub.
        subfolder: of the directory or repository.
        local_files_only: whether a hub id must have been downloaded before.
    Raises: FileNotFoundError naming the source if a hub id cannot be read.
    """
    inside = subfolder or "."
    if Path(source).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        return Path(source) / inside
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        words = "No such directory, and without huggingface_hub (pip install huggingface_hub) no hub id"
        raise FileNotFoundError(2, words, str(source)) from None
    files = [(Path(inside) / name).as_posix() for name in (CONFIG_NAME, WEIGHTS_NAME)]
    try:
        folder = snapshot_download(
            str(source), revision=revision, allow_patterns=files, local_files_only=local_files_only
        )
    except (OSError, ValueError) as error:  # not found, gated, offline, no such revision
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FileNotFoundError(
            2, f"No such directory, nor a hub id that can be read ({reason})", str(source)
        ) from None
    return Path(folder) / inside
