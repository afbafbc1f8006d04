"""LoRAParameter: LoRA on one parameter of a module that reads it itself, such as the fused experts of a mixture."""

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fused_lora.deepspeed_zero import is_split, whole_shape
from fused_lora.layer_config import LayerConfig
from fused_lora.nn.expert_layouts import Factor, shared, stacked, unstacked
from fused_lora.nn.layer import LoRALayer
from fused_lora.nn.merged_weight import check_values
from fused_lora.nn.routed import ExpertUpdate, routed, unrouted
from fused_lora.ops.internals import bare


def parameter_shape(module: nn.Module, parameter_name: str) -> tuple[int, int, int]:
    """E, out and in of a parameter [E, out, in], [E, in, out] or [out, in]. Raises: ValueError if it is none of these,
    or in no dtype that a product exists in."""
    weight = getattr(module, parameter_name)
    whole = whole_shape(weight)
    kind = f"{type(weight).__module__}.{type(weight).__qualname__}"
    if type(weight) is not nn.Parameter or len(whole) not in (2, 3) or not weight.is_floating_point():
        raise ValueError(
            f"{parameter_name} must be a plain floating point Parameter of two or three dimensions; got a {kind} of "
            f"shape {list(whole)} in {weight.dtype}"
        )
    experts, *shape = whole if len(whole) == 3 else (1, *whole)
    out_features, in_features = reversed(shape) if _is_transposed(module, weight) else shape
    return experts, out_features, in_features


def module_name(name: str) -> str:
    """The name in the plain model of the module in the LoRAParameter of this name."""
    return re.sub(r"(\.base_layer)+$", "", name)


def pattern_name(name: str, layer: Any) -> str:
    """The name by which rank_pattern and alpha_pattern know the layer of this name: a parameter's is its own."""
    parameter_name = getattr(layer, "parameter_name", None)
    return name if parameter_name is None else f"{module_name(name)}.{parameter_name}"


def _is_transposed(module: nn.Module, weight: Tensor) -> bool:
    return len(whole_shape(weight)) == 3 and bool(getattr(module, "is_transposed", False))


def _check_no_dropout(config: LayerConfig) -> None:
    if config.lora_dropout:
        raise ValueError(f"lora_dropout must be 0 with target_parameters; got {config.lora_dropout}")


class LoRAParameter(LoRALayer):
    """A module with LoRA adapters by name on one of its parameters, which the module's own forward reads.

    Equivalent to running `base_layer` with, for each of the E matrices of the parameter, e,::

        parameter[e] + scaling * lora_B[:, e::E] @ lora_A[e * R:(e + 1) * R]

    in the parameter's place; transposed for a module whose `is_transposed` says that it stores [in, out]. The experts
    of transformers' mixtures get the update on each expert's own tokens, unless `why_copied` says why not; for any
    other module that sum, a whole copy of the parameter, is made in every forward. Several parameters of one module
    are adapted by a LoRAParameter in another, in the order in which the module registers them, so that the tensors have
    the keys of PEFT's file. Unknown attributes are the module's. There is no dropout.

    Args:
        base_layer: the module, or a LoRAParameter of another parameter of it.
        parameter_name: the parameter, [E, out, in], [E, in, out] or [out, in].
    Raises: ValueError for a parameter that is not there, not two- or three-dimensional, or no plain floating point
        Parameter.
    Source: shapes and keys as in Hugging Face PEFT's target_parameters.
    """

    base_layer: nn.Module

    def __init__(self, base_layer: nn.Module, parameter_name: str):
        super().__init__()
        self.base_layer, self.parameter_name = base_layer, parameter_name
        module = self.module
        self.num_experts, self.out_features, self.in_features = parameter_shape(module, parameter_name)
        module.requires_grad_(False)
        self._start_empty()
        self.training = module.training

    @property
    def module(self) -> Any:
        """The module that holds the parameter."""
        module = self.base_layer
        while isinstance(module, LoRAParameter):
            module = module.base_layer
        return module

    @property
    def weight(self) -> Tensor:
        """The adapted parameter, as the module stores it."""
        return getattr(self.module, self.parameter_name)

    def plain(self) -> nn.Module:
        return self.module

    def adapter_shapes(self, r: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """The shapes of A [E R, in] and B [out, R E]."""
        rows = r * self.num_experts
        return (rows, self.in_features), (self.out_features, rows)

    def forward(self, *args, **kwargs):
        updates = None if kwargs else self._routed_updates()
        if updates:
            return routed(self.module, updates, *args)
        if not self._acts():
            return self.base_layer(*args, **kwargs)
        if is_split(self.weight):  # also where it is gathered, or so small that it stays
            raise ValueError(
                "target_parameters must leave out what ZeRO-3 splits, but for experts of transformers: it gathers the "
                f"parameter, not what stands for it in a forward; got {self.parameter_name}"
            )
        return functional_call(self.base_layer, {self._path(): self._adapted()}, args, kwargs)

    def _acts(self) -> bool:
        return self.active_adapter is not None and not self.merged

    def why_copied(self) -> str | None:
        """Why a forward computes the adapted parameters whole instead of the update on each expert's tokens; None if it
        doesn't."""
        holders = self._holders()
        if not all(bare(holder) for holder in holders[1:]):
            return "a LoRAParameter in it has hooks"
        return unrouted(self.module, [holder.parameter_name for holder in holders if holder._acts()])

    def _holders(self) -> list["LoRAParameter"]:
        """This one and those in it."""
        inner = self.base_layer
        return [self, *(inner._holders() if isinstance(inner, LoRAParameter) else ())]

    def _routed_updates(self) -> dict[str, list[ExpertUpdate]]:
        """What the active adapters add to the experts' weights, if it can be computed on their tokens."""
        holders = [holder for holder in self._holders() if holder._acts()]
        if not holders or self.why_copied() is not None:
            return {}
        return {holder.parameter_name: holder._expert_updates() for holder in holders}

    def _expert_updates(self) -> list[ExpertUpdate]:
        """Of the active adapters."""
        updates = []
        for name in self.active_adapters:
            lora_A, lora_B = self._stacked(name)
            updates.append(ExpertUpdate(lora_A, lora_B, self.scaling[name]))
        return updates

    def _path(self) -> str:
        """The parameter's name in the base layer."""
        path, inner = self.parameter_name, self.base_layer
        while isinstance(inner, LoRAParameter):
            path, inner = f"base_layer.{path}", inner.base_layer
        return path

    def _adapted(self) -> Tensor:
        """The parameter with the active adapters in it, in its own dtype."""
        weight = self.weight
        adapted = weight if weight.dim() == 3 else weight[None]
        for name in self.active_adapters:
            left, right = self._factors(name)
            adapted = adapted + left.to(weight.dtype) @ right.to(weight.dtype) * self.scaling[name]
        return adapted.view(weight.shape)

    def _stacked(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """A [E, R, in] and B [E, out, R], with 1 for E where all experts share one."""
        lora_A, lora_B = self.lora_A(adapter_name), self.lora_B(adapter_name)
        return stacked(lora_A, lora_B, self.r[adapter_name])

    def _factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """Batches of E matrices whose products the adapter adds, but for the scaling."""
        lora_A, lora_B = self._stacked(adapter_name)
        return (lora_A.mT, lora_B.mT) if _is_transposed(self.module, self.weight) else (lora_B, lora_A)

    def check_shareable(self, adapter_name: str, factor: Factor) -> None:
        """Raises ValueError if `share` would refuse."""
        self._check_resettable(adapter_name)
        shared(*self._stacked(adapter_name), factor)

    def share(self, adapter_name: str, factor: Factor) -> None:
        """Let all experts have one A, [R, in], or one B, [out, R], in an adapter, the first expert's.

        Raises: ValueError if the adapter is unknown or merged, or the update would change: its factors differ between
            experts, and it is not fresh.
        """
        self.check_shareable(adapter_name, factor)
        lora_A, lora_B = shared(*self._stacked(adapter_name), factor)
        held, one = (self.lora_A, lora_A) if factor == "lora_A" else (self.lora_B, lora_B)
        trains = held[adapter_name].requires_grad
        held[adapter_name] = nn.Parameter(one[0].detach().clone(), requires_grad=trains)

    def shares(self, adapter_name: str) -> bool:
        """Whether all experts have one A or one B in this adapter."""
        given = self.lora_A[adapter_name].shape, self.lora_B[adapter_name].shape
        return given != self.adapter_shapes(self.r[adapter_name])

    def file_tensors(self, adapter_name: str) -> dict[str, Tensor]:
        tensors = super().file_tensors(adapter_name)
        if not self.shares(adapter_name):
            return tensors
        lora_A, lora_B = tensors.values()
        return dict(zip(tensors, unstacked(*stacked(lora_A, lora_B, self.r[adapter_name]))))

    def _add(self, adapter_name: str, config: LayerConfig, adapter_dtype: torch.dtype | None) -> None:
        _check_no_dropout(config)
        super()._add(adapter_name, config, adapter_dtype)

    def _check_addable(self) -> None:
        parameter_shape(self.module, self.parameter_name)

    def _set_config(self, adapter_name: str, config: LayerConfig) -> None:
        _check_no_dropout(config)
        super()._set_config(adapter_name, config)

    def check_mergeable(self, adapter_names: list[str]) -> None:
        for name in adapter_names:
            check_values(self.parameter_name, self.weight)
            check_values("lora_A", self.lora_A[name])
            check_values("lora_B", self.lora_B[name])

    @torch.no_grad()
    def _merged_and_pristine(self) -> tuple[nn.Parameter, nn.Parameter]:
        """The sum is computed in the parameter's own dtype, as PEFT does it."""
        merged = self._adapted()
        if not torch.isfinite(merged).all():
            names = ", ".join(map(repr, self.active_adapters))
            raise ValueError(f"the weight merged with adapter {names} must be finite; got others")
        return nn.Parameter(merged, requires_grad=False), self.module.get_parameter(self.parameter_name)

    def _put(self, weight: nn.Parameter) -> None:
        setattr(self.module, self.parameter_name, weight)

    def extra_repr(self) -> str:
        return f"parameter_name={self.parameter_name!r}, {self._adapters_repr()}"
