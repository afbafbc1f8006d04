"""Which Parameters of modules that read them themselves an adapter sits in."""

from dataclasses import dataclass

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fused_lora.adapters.places import Place, is_linear_layer, parameter_names
from fused_lora.config import LoraConfig
from fused_lora.nn.experts import LoRAParameter, parameter_shape
from fused_lora.nn.layer import LoRALayer


@dataclass(frozen=True)
class PlainParameter:
    """A parameter without adapters."""

    module: nn.Module
    parameter_name: str

    def adapter_shapes(self, r: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """The shapes of A and B, see LoRAParameter."""
        experts, out_features, in_features = parameter_shape(self.module, self.parameter_name)
        return (r * experts, in_features), (out_features, r * experts)


def find_parameters(
    config: LoraConfig, places: list[Place], first: dict[int, str]
) -> dict[str, LoRAParameter | PlainParameter]:
    """The parameters that target_parameters names, by the names of their LoRAParameters, a module's innermost first.
    The weight of a linear layer is that layer's affair.

    Raises: ValueError for a parameter that can hold no adapter, for dropout, and for a module of which other parameters
        hold adapters already, which PEFT's format cannot tell apart.
    """
    wrapped: dict[int, dict[str, LoRAParameter]] = {}
    for place in places:
        if isinstance(place.module, LoRAParameter):
            wrapped.setdefault(id(place.module.module), {})[place.module.parameter_name] = place.module
    found: dict[str, LoRAParameter | PlainParameter] = {}
    for place in places:
        module, name = place.module, first[id(place.module)]
        if place.inside or name != place.name or isinstance(module, LoRALayer) or is_linear_layer(module):
            continue
        wanted = [key.rpartition(".")[2] for key in parameter_names(place) if config.targets_parameter(key)]
        have = wrapped.get(id(module), {})
        if wanted and have and set(wanted) != set(have):
            raise ValueError(
                f"target_parameters must name the same parameters of {name} as the adapters that are there, "
                f"{sorted(have)}; got {wanted}"
            )
        for depth, parameter in zip(reversed(range(len(wanted))), wanted):
            _check(module, parameter, name, config)
            found[name + ".base_layer" * depth] = have.get(parameter) or PlainParameter(module, parameter)
    return found


def _check(module: nn.Module, parameter: str, name: str, config: LoraConfig) -> None:
    if not name:
        raise ValueError(f"target_parameters must name parameters of modules in the model; got its own {parameter}")
    if config.lora_dropout:
        raise ValueError(
            f"lora_dropout must be 0 with target_parameters, a parameter such as {name}.{parameter} has no input to "
            f"drop from; got {config.lora_dropout}"
        )
    if isinstance(module, NonDynamicallyQuantizableLinear):
        raise ValueError(
            f"target_parameters must leave out {name}.{parameter}, which nn.MultiheadAttention reads past the adapter"
        )
    try:
        parameter_shape(module, parameter)
    except ValueError as error:
        raise ValueError(f"target_parameters: {name}: {error}") from None
