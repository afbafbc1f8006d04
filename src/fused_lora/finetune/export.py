"""`fused-lora merge`: a model directory with an adapter folded into its weights, for plain transformers."""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from fused_lora.adapters import load_adapter, merged
from fused_lora.adapters.peft_config import CONFIG_NAME, read_config
from fused_lora.adapters.peft_format import WEIGHTS_NAME
from fused_lora.files import LOCK, check_space, claimed
from fused_lora.models import PACKAGED, base_model, check_name, is_text, load_model, packaged_model

_STAGING, _LAST = ".fused-lora-merge", "config.json"


def export_merged(
    model: str | Path | None,
    adapter: Path,
    output: Path,
    dtype: torch.dtype,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Write the base model with the adapter merged, and its tokenizer, as transformers saves them.

    The files are written into a hidden directory inside `output` and renamed into it when all are whole, config.json
    last: no model can be loaded from a merge that was cut short. `output` itself is never replaced, so it may be a
    mount point, a symbolic link or the working directory. Files have the modes that the umask says.

    Args:
        model: the base, as `models.load_model` takes it; None for the one that the adapter names.
        adapter: directory of an adapter in PEFT's format.
        output: the new directory; it must not exist, or be empty.
        dtype: of the weights written; the product B A is added in fp32.
        say: gets lines of text.
    Raises: ValueError if output holds files, or the adapter is damaged or of another model, or names no base; OSError
        naming the file. Nothing is left of a merge that failed.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output must be a directory; got the file {output}")
    if not is_text(os.path.realpath(output)):
        raise ValueError(f"--output must have a name in UTF-8, which transformers needs; got {os.fsencode(output)!r}")
    _check_adapter(adapter)
    chosen, revision = _choose_base(model, adapter, say)
    with claimed(output, say):
        shutil.rmtree(output / _STAGING, ignore_errors=True)  # of a merge that was killed
        _check_empty(output)
        base, tokenizer = load_model(chosen, dtype, "cpu", revision)
        check_space(output, sum(parameter.numel() * parameter.element_size() for parameter in base.parameters()))
        load_adapter(base, adapter)
        _write(base, tokenizer, output)


def _choose_base(model: str | Path | None, adapter: Path, say: Callable[[str], None]) -> tuple[str | Path, str | None]:
    """The base model and its revision on the hub: the one that is given, else the one that the adapter names.

    Raises: FileNotFoundError or ValueError if there is none, or it cannot be one.
    """
    path = adapter / CONFIG_NAME
    config = json.loads(path.read_bytes())
    named, revision = config.get("base_model_name_or_path"), config.get("revision")
    if model is not None:
        check_name(model)
        if named and os.path.realpath(named) != os.path.realpath(model):
            say(f"base model: {model}; the adapter names {named}")
        return base_model(model), None
    if not named or not isinstance(named, str):
        raise ValueError(f"--model must be given; {path} names no base model, base_model_name_or_path is {named!r}")
    say(f"base model: {named}, which the adapter names")
    if named == PACKAGED or Path(named).name == PACKAGED.replace("-", "_"):  # its folder: so wrote version 0.1
        return packaged_model(), None
    try:
        check_name(named)
    except (ValueError, OSError) as error:
        raise ValueError(f"--model must be given; the base model that {path} names is none: {error}") from None
    return named, revision if isinstance(revision, str) else None


def _check_adapter(adapter: Path) -> None:
    """Raises FileNotFoundError or ValueError for files that are no adapter, whatever the base."""
    read_config(adapter)
    path = adapter / WEIGHTS_NAME
    if not path.exists():
        pickled = path.with_suffix(".bin").exists()
        raise FileNotFoundError(2, f"No such file{', and a pickle is not read' if pickled else ''}", str(path))
    try:
        safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise ValueError(f"{path} must be a whole safetensors file; got {error}") from None


def _check_empty(output: Path) -> None:
    entries = sorted(path.name for path in output.iterdir() if path.name not in (LOCK, "lost+found"))
    if entries:
        raise ValueError(
            f"--output must be a new or an empty directory; got {output} with {len(entries)} entries: "
            f"{', '.join(entries[:3])}"
        )


def _write(base, tokenizer, output: Path) -> None:
    """Raises OSError; no file is left then."""
    staging, written = output / _STAGING, []
    try:
        staging.mkdir()
        probe = staging / "mode"
        probe.touch(0o666)
        mode = probe.stat().st_mode & 0o777  # what the umask and the directory's own rules say
        probe.unlink()
        with merged(base):
            base.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        for path in staging.rglob("*"):
            if path.is_file():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
                with suppress(PermissionError):  # a file system without modes
                    path.chmod(mode)
        for path in sorted(staging.iterdir(), key=lambda path: (path.name == _LAST, path.name)):
            written.append(output / path.name)
            os.replace(path, written[-1])
    except BaseException as error:
        for path in written:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        if isinstance(error, SafetensorError) or type(error) is Exception:  # so do safetensors and tokenizers put it
            raise OSError(f"{output}: {error}") from error
        if isinstance(error, OSError) and error.filename is None:
            raise OSError(error.errno, error.strerror, str(output)) from error
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
