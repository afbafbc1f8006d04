"""adapter_model.safetensors as PEFT has it: keys, checked reading, atomic writing."""

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from fused_lora.adapters.peft_config import CONFIG_NAME
from fused_lora.adapters.wrappers import plain_key, whole_tensor
from fused_lora.files import write_whole

WEIGHTS_NAME, PICKLE_NAME = "adapter_model.safetensors", "adapter_model.bin"
_PREFIX = "base_model.model."


def file_key(name: str, key: str) -> str:
    """The key of a tensor of a layer, or of an entry in the state dict of a modules_to_save module, of this name."""
    return f"{_PREFIX}{name}.{key}"


def _plain(key: str) -> str:
    """A file's key as PEFT writes it today: others write the adapter's name, the names of wrappers, or no prefix."""
    key = plain_key(key.removeprefix("module.").removeprefix(_PREFIX))
    key = re.sub(r"\.(lora_[AB])\.[^.]+\.(weight|bias)$", r".\1.\2", key)
    key = re.sub(r"\.lora_magnitude_vector\..*$", ".lora_magnitude_vector", key)
    return _PREFIX + re.sub(r"(^|\.)modules_to_save\.[^.]+\.", r"\1", key)


def base_name(key: str) -> str:
    """The name that a key has in the base model: PEFT calls a layer with an adapter on it base_layer."""
    return re.sub(r"(^|\.)((token_adapter\.)?(base_layer|original_module)\.)+", r"\1", key.removeprefix(_PREFIX))


def stored_names(directory: Path) -> set[str]:
    """The names, in the base model, of what adapter_model.safetensors holds; none where there is no such file."""
    path = directory / WEIGHTS_NAME
    if not path.exists():
        return set()
    with _open(path) as file:
        return {base_name(_plain(key)) for key in file.keys()}  # noqa: SIM118  it has no __iter__


def find_tensors(
    directory: Path,
    expected: Mapping[str, tuple[int, ...]],
    base: Callable[[], Mapping[str, Tensor]],
    repeated: Collection[str] = (),
) -> dict[str, str]:
    """Compare the header of adapter_model.safetensors with the keys and shapes that the model needs.

    Only tensors of the base model, which PEFT writes where target_modules names the output head or the vocabulary was
    resized, are read: PEFT would write them into the base model, here they must be equal to it.

    Args:
        directory: of the adapter.
        expected: shapes by key.
        base: gives the base model's tensors by name, if any are needed.
        repeated: keys at which PEFT may write an expected tensor again.
    Returns: the key in the file for each expected key.
    Raises: FileNotFoundError naming the file; ValueError for a pickle, a file that is not safetensors, and missing,
        unexpected, wrongly shaped or non-floating tensors.
    """
    path = directory / WEIGHTS_NAME
    if not path.exists():
        if (directory / PICKLE_NAME).exists():
            raise ValueError(
                f"{directory} must hold {WEIGHTS_NAME}, safetensors only; got {PICKLE_NAME}, a pickle, which can run "
                "code when read"
            )
        raise FileNotFoundError(2, "No such file", str(path))
    with _open(path) as file:
        stored: list[str] = list(file.keys())
        found, others = _sort_keys(path, [key for key in stored if _plain(key) not in repeated], expected)
        missing = sorted(set(expected) - set(found))
        if missing:
            raise _wrong_keys(path, len(expected), len(found) + len(others), "missing", missing)
        tensors = base() if others else {}
        unexpected = [key for key, name in others.items() if name not in tensors]
        if unexpected:
            raise _wrong_keys(path, len(expected), len(found) + len(others), "unexpected", sorted(unexpected))
        for key, shape in expected.items():
            _check_header(path, key, file.get_slice(found[key]), tuple(shape))
        for key, name in others.items():
            _check_same(path, key, file, tensors[name])
    return found


def _sort_keys(path: Path, stored: list[str], expected: Mapping) -> tuple[dict[str, str], dict[str, str]]:
    """The keys of a file by what they are: an expected tensor's, by its plain key; others, with their name in the base
    model."""
    found: dict[str, str] = {}
    others: dict[str, str] = {}
    for key in stored:
        plain, once = _plain(key), key.replace(".modules_to_save", "")
        if once != key and once in stored:
            continue  # which PEFT writes twice with bias="all"
        if plain not in expected:
            others[key] = base_name(plain)
        elif plain in found:
            raise ValueError(f"{path} must hold one adapter; got {found[plain]} and {key}")
        else:
            found[plain] = key
    return found, others


def _wrong_keys(path: Path, expected: int, got: int, what: str, wrong: list[str]) -> ValueError:
    return ValueError(
        f"{path} must hold the {expected} tensors that {CONFIG_NAME} asks for in this model; got {got}, {len(wrong)} "
        f"{what}: {', '.join(wrong[:3])}{', …' if len(wrong) > 3 else ''} (an adapter for another base model?)"
    )


def _check_header(path: Path, key: str, got, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless a tensor of the file, unread, has this shape and is floating point."""
    if tuple(got.get_shape()) != shape:
        raise ValueError(
            f"{path} is an adapter for another base model: {key.removeprefix(_PREFIX)} must have shape {list(shape)}; "
            f"got {got.get_shape()}"
        )
    if got.get_dtype() not in ("F64", "F32", "F16", "BF16") and (".lora_" in key or ".token_adapter." in key):
        raise ValueError(f"{path}: {key} must be floating point; got {got.get_dtype()}")


def _check_same(path: Path, key: str, file, tensor: Tensor) -> None:
    """Raises ValueError unless a tensor of the base model that the file repeats is the model's own, up to rounding to
    the narrower of the two dtypes."""
    what = f"{path}: {key}, a tensor of the base model, must be the model's own"
    shape = tuple(file.get_slice(key).get_shape())
    if shape != tuple(tensor.shape):
        raise ValueError(
            f"{what} of shape {list(tensor.shape)}; got {list(shape)} (was the vocabulary resized? then resize the "
            "model's and fill it alike before load_adapter)"
        )
    theirs, ours = file.get_tensor(key), whole_tensor(tensor).detach()
    if ours.is_meta:
        raise ValueError(f"{what}, which is not here to compare with; got a model on the meta device")
    ours = ours.cpu()
    if not torch.equal(theirs.to(ours.dtype), ours) and not torch.equal(theirs, ours.to(theirs.dtype)):
        raise ValueError(
            f"{what}; got other values (PEFT would write them into the base model: copy them there before load_adapter "
            "if that is meant)"
        )


def read_tensors(directory: Path, found: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors that `find_tensors` found, on the CPU."""
    with _open(directory / WEIGHTS_NAME) as file:
        return {key: file.get_tensor(stored) for key, stored in found.items()}


def _open(path: Path):
    """safe_open with errors that name the file."""
    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise ValueError(f"{path} must be a whole safetensors file; got {error}") from None


def write_files(directory: Path, tensors: Mapping[str, Tensor], config: bytes) -> None:
    """Write both files, the tensors being on the CPU, see `files.write_whole`. Raises: OSError naming the file."""
    contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
    weights = to_bytes(contiguous, metadata={"format": "pt"})
    write_whole({directory / WEIGHTS_NAME: weights, directory / CONFIG_NAME: config})
