"""Figures of an adapter, or of a tuned model beside the one before, layer by layer."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from fused_lora.adapters.peft_config import read_config
from fused_lora.adapters.peft_format import WEIGHTS_NAME, base_name
from fused_lora.analysis.intruders import intruder_dimensions
from fused_lora.analysis.spectra import Factors, effective_rank_of, energy_rank_of, singular_values

Update = Tensor | Factors  # the tuned weight, or what was added to the weight before


@dataclass(frozen=True)
class Row:
    """The figures of one weight's update."""

    name: str
    shape: tuple[int, int]
    norm: float  # Frobenius norm
    rank: int  # perturbation rank
    effective_rank: float
    intruders: int | None  # None without the weight before
    spectrum: Tensor  # singular values, largest first


def read_adapter(directory: Path, weights: Mapping[str, Tensor] | None = None) -> dict[str, Update]:
    """The updates of an adapter in PEFT's format by the names of the weights that they change, as factors; where the
    adapter scales rows as DoRA does, or has trained a copy in full, the tuned weight, if the weights are given.

    Args: weights: the base model's by name.
    Raises: FileNotFoundError or ValueError naming the file for what is no adapter, or one without a matrix.
    """
    config, path = read_config(directory), directory / WEIGHTS_NAME
    if not path.exists():
        raise FileNotFoundError(2, "No such file", str(path))
    with safe_open(path, framework="pt", device="cpu") as file:
        stored = {base_name(key): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  it has no __iter__
    found: dict[str, Update] = {}
    for key, tensor in stored.items():
        name, _, end = key.partition(".lora_")
        if end in ("A.weight", "embedding_A"):
            lora_B = stored[f"{name}.lora_{end.replace('A', 'B', 1)}"]
            r = config.layer(name).r
            if len(tensor) != r:  # of experts, whose matrices lie one behind the other
                continue
            update = Factors(lora_B.flatten(1), tensor.flatten(1), config.layer(name).scaling)
            found[f"{name}.weight"] = _turned(update, weights, f"{name}.weight")
        elif not end and tensor.dim() == 2 and weights is not None and key in weights:
            found[key] = tensor
    for key, magnitude in stored.items():
        name = f"{key.partition('.lora_magnitude_vector')[0]}.weight"
        if "lora_magnitude_vector" in key and weights is not None and name in weights and name in found:
            V = weights[name].float() + dense(found[name]).float()
            found[name] = V * (magnitude.float() / V.norm(dim=1)).unsqueeze(1)
    if not found:
        raise ValueError(f"{path} must hold a matrix B A; got {len(stored)} tensors of another kind")
    return found


def dense(update: Update) -> Tensor:
    """Factors multiplied out; a matrix as it is."""
    return update if isinstance(update, Tensor) else update.scaling * update.lora_B @ update.lora_A


def _turned(update: Factors, weights: Mapping[str, Tensor] | None, name: str) -> Factors:
    """The factors as the weight lies: embeddings and Conv1D store the transpose of B A."""
    shape = tuple(weights[name].flatten(1).shape) if weights is not None and name in weights else None
    own = (update.lora_B.shape[0], update.lora_A.shape[1])
    if shape == own[::-1] != own:
        return Factors(update.lora_A.T, update.lora_B.T, update.scaling)
    if shape not in (None, own):
        raise ValueError(f"--model must be the adapter's base: {name} must have shape {list(own)}; got {list(shape)}")
    return update


def changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Update]:
    """The matrices of a tuned model that differ from those before.

    Raises: ValueError if the two have not the same weights, or none differ.
    """
    shapes = [{name: tuple(t.shape) for name, t in weights.items()} for weights in (before, after)]
    if shapes[0] != shapes[1]:
        differ = sorted(set(shapes[0].items()) ^ set(shapes[1].items()))[:3]
        raise ValueError(f"the two models must have the same weights; got such that differ in {differ}")
    found: dict[str, Update] = {
        name: t for name, t in after.items() if t.dim() == 2 and not torch.equal(t, before[name])
    }
    if not found:
        raise ValueError("the two models must differ in a matrix; got equal ones")
    return found


def rows(
    updates: Mapping[str, Update],
    weights: Mapping[str, Tensor] | None = None,
    energy: float = 0.9,
    k: int = 10,
    eps: float = 0.5,
) -> Iterator[Row]:
    """The figures of each update, one after the other.

    Args:
        updates: `read_adapter`'s or `changed`'s.
        weights: those before, by name; without them there are no intruders.
        energy, k, eps: as in `perturbation_rank` and `intruder_dimensions`.
    """
    for name, update in updates.items():
        before = None if weights is None or name not in weights else weights[name].flatten(1)
        delta = update if before is None or not isinstance(update, Tensor) else update.float() - before.float()
        spectrum = singular_values(delta)
        intruders = None if before is None else len(intruder_dimensions(before, update, k, eps))
        N, K = delta.shape if isinstance(delta, Tensor) else (len(delta.lora_B), delta.lora_A.shape[1])
        ranks = energy_rank_of(spectrum, energy), effective_rank_of(spectrum)
        yield Row(name.removesuffix(".weight"), (N, K), float(spectrum.norm()), *ranks, intruders, spectrum)
