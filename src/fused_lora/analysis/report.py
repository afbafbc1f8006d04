"""Figures of an adapter, or of a tuned model beside the one before, layer by layer."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fused_lora.adapters.peft_config import read_config
from fused_lora.adapters.peft_format import WEIGHTS_NAME, base_name
from fused_lora.analysis.intruders import intruder_dimensions
from fused_lora.analysis.spectra import Factors, effective_rank_of, energy_rank_of, singular_values
from fused_lora.config import STARTS_OF_WEIGHTS
from fused_lora.nn.base_linear import is_conv1d

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


class Adapter(NamedTuple):
    """What an adapter changes, and what has no figures."""

    updates: dict[str, Update]  # by the names of the weights that they change
    notes: list[str]  # for people


def read_adapter(directory: Path, weights: Mapping[str, Tensor] | None = None, turned: Collection[str] = ()) -> Adapter:
    """The updates of an adapter in PEFT's format, as factors; where the adapter scales rows as DoRA does, or has
    trained a copy in full, the tuned weight, if the weights are given.

    Args:
        weights: the base model's by name.
        turned: names of those that lie as the transpose of B A, see `lying_turned`.
    Raises: FileNotFoundError or ValueError naming the file for what is no adapter of the base, one without a matrix,
        or, with weights, one that began as a part of them.
    """
    config, path = read_config(directory), directory / WEIGHTS_NAME
    notes = _of_the_start(directory, config.init_lora_weights, weights is not None)
    if not path.exists():
        raise FileNotFoundError(2, "No such file", str(path))
    with safe_open(path, framework="pt", device="cpu") as file:
        stored = {base_name(key): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  it has no __iter__
    found: dict[str, Update] = {}
    experts, copies, magnitudes = [], [], {}
    for key, tensor in stored.items():
        name, _, end = key.partition(".lora_")
        if end in ("A.weight", "embedding_A"):
            lora_B = stored.get(f"{name}.lora_{end.replace('A', 'B', 1)}")
            if lora_B is None:
                raise ValueError(f"{path} must hold lora_B of {name} beside its lora_A; got none")
            if config.target_parameters and len(tensor) != config.layer(name).r:  # one expert's matrix behind another's
                experts.append(name)
                continue
            update = Factors(lora_B.flatten(1), tensor.flatten(1), config.layer(name).scaling)
            if update.lora_B.shape[1] != len(update.lora_A):
                shapes = f"{list(tensor.shape)} and {list(lora_B.shape)}"
                raise ValueError(f"{path} must hold lora_A and lora_B of {name} of one rank; got shapes {shapes}")
            found[f"{name}.weight"] = _placed(update, weights, f"{name}.weight", turned)
        elif "magnitude_vector" in end:
            magnitudes[f"{name}.weight"] = tensor
        elif not end and tensor.dim() == 2 and weights is not None and key in weights:
            _base_weight(weights, key, list(tensor.shape))
            found[key] = tensor
        elif not end and tensor.dim() == 2:
            copies.append(key.removesuffix(".weight"))
    if weights is not None:
        for name, magnitude in magnitudes.items():
            V = _base_weight(weights, name).float()
            if name in found:  # not of rank 0, where the magnitude alone trains
                V = V + dense(found[name]).float()
            over = 0 if name in turned else 1  # the dimension of a row of B A
            if magnitude.numel() != V.shape[1 - over]:
                raise ValueError(
                    f"--model must be the adapter's base: {name} must have {magnitude.numel()} rows, as many as "
                    f"magnitudes; got {V.shape[1 - over]}"
                )
            found[name] = V * (magnitude.float().flatten() / V.norm(dim=over)).unsqueeze(over)
    if not found:
        raise ValueError(f"{path} must hold a matrix B A; got {len(stored)} tensors of another kind")
    alone = [name.removesuffix(".weight") for name in magnitudes if name not in found]
    scaled = len(magnitudes) - len(alone) if weights is None else 0
    return Adapter(found, notes + _notes(experts, copies, alone, scaled))


def _of_the_start(directory: Path, start: bool | str, has_weights: bool) -> list[str]:
    """What is to be said of an adapter that began as a part of the base weights, whose B A is not what it changed.
    Raises: ValueError if the weights are given, whose figures would be of ones that never were."""
    if start not in STARTS_OF_WEIGHTS:
        return []
    if has_weights:
        raise ValueError(
            f"--model must not be given for an adapter with init_lora_weights={start!r}, which changed the weights at "
            "its start; PEFT's save_pretrained with path_initial_model_for_weight_conversion makes a plain one of it; "
            f"got {directory}"
        )
    return [f"init_lora_weights={start!r}: the figures are of the whole B A, of which W gave the start"]


def _notes(experts: list[str], copies: list[str], alone: list[str], magnitudes: int) -> list[str]:
    """What figures are missing, or are not those of the whole update."""
    notes = []
    if experts:
        notes.append(f"without figures: {len(experts)} adapters of fused experts, as {experts[0]}")
    if copies:
        notes.append(
            f"without figures: {len(copies)} layers trained in full, as {copies[0]}; --model needs to have them"
        )
    if alone:
        notes.append(
            f"without figures: {len(alone)} layers whose magnitude alone trains, as {alone[0]}; --model gives them"
        )
    if magnitudes:
        notes.append(f"{magnitudes} layers are DoRA's: without --model the figures are of B A, not of the scaled rows")
    return notes


def lying_turned(model: nn.Module) -> set[str]:
    """The names of the weights that lie as the transpose of an adapter's B A: of embeddings and of Conv1D."""
    return {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Embedding) or is_conv1d(m)}


def dense(update: Update) -> Tensor:
    """Factors multiplied out; a matrix as it is."""
    return update if isinstance(update, Tensor) else update.scaling * update.lora_B @ update.lora_A


def _placed(update: Factors, weights: Mapping[str, Tensor] | None, name: str, turned: Collection[str]) -> Factors:
    """The factors as the weight lies. Raises: ValueError if there is no such weight, or one of another shape."""
    if weights is None:
        return update
    if name in turned:
        update = Factors(update.lora_A.T, update.lora_B.T, update.scaling)
    _base_weight(weights, name, [len(update.lora_B), update.lora_A.shape[1]])
    return update


def _base_weight(weights: Mapping[str, Tensor], name: str, shape: list[int] | None = None) -> Tensor:
    """The base's weight as a matrix. Raises: ValueError if there is none, or one of another shape."""
    if name not in weights:
        raise ValueError(f"--model must be the adapter's base: it must have {name}; got a model without it")
    weight = weights[name].flatten(1)
    if shape is not None and list(weight.shape) != shape:
        raise ValueError(
            f"--model must be the adapter's base: {name} must have shape {shape}; got {list(weight.shape)}"
        )
    return weight


def changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Update]:
    """The matrices of a tuned model that differ from those before, tied ones once.

    Raises: ValueError if the two have not the same weights, or no matrix differs.
    """
    shapes = [{name: tuple(t.shape) for name, t in weights.items()} for weights in (before, after)]
    if shapes[0] != shapes[1]:
        differ = sorted(set(shapes[0].items()) ^ set(shapes[1].items()))[:3]
        raise ValueError(f"the two models must have the same weights; got such that differ in {differ}")
    found: dict[str, Update] = {}
    places: set[int] = set()
    for name, t in after.items():
        if t.dim() == 2 and t.data_ptr() not in places and not torch.equal(t, before[name]):
            found[name] = t
            places.add(t.data_ptr())
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
        weights: those before, by name, of all updates; without them there are no intruders.
        energy, k, eps: as in `perturbation_rank` and `intruder_dimensions`.
    """
    for name, update in updates.items():
        if not all(torch.isfinite(t).all() for t in ([update] if isinstance(update, Tensor) else update[:2])):
            raise ValueError(f"{name} must be finite; got elements that are not")
        before = None if weights is None else weights[name].flatten(1)
        delta = update if before is None or not isinstance(update, Tensor) else update.float() - before.float()
        spectrum = singular_values(delta)
        intruders = None if before is None else len(intruder_dimensions(before, update, k, eps))
        N, K = delta.shape if isinstance(delta, Tensor) else (len(delta.lora_B), delta.lora_A.shape[1])
        ranks = energy_rank_of(spectrum, energy), effective_rank_of(spectrum)
        yield Row(name.removesuffix(".weight"), (N, K), float(spectrum.norm()), *ranks, intruders, spectrum)
