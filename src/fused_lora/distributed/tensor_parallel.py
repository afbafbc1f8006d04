"""How `torch.distributed.tensor.parallel.parallelize_module` splits layers with adapters."""

from functools import partial
from typing import Any

from torch import nn
from torch.distributed.tensor import DeviceMesh, DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.distributed.tensor.placement_types import Placement

from fused_lora.nn.linear import LoRALinear
from fused_lora.nn.modules_to_save import ModuleToSave


class ColwiseLoRA(ColwiseParallel):
    """torch's ColwiseParallel for a LoRALinear: each process has some of the outputs.

    weight [N, K], bias [N] and lora_B [N, R] are split over N, lora_A [R, K] is whole in each process; y_p = x W_pt +
    s x At B_pt needs no communication, and dx and dA are summed over the processes in the backward. Every other module
    is handed to ColwiseParallel, so that one plan serves layers with adapters and layers without. The processes must
    draw the same random numbers for dropout, as torch's own layers need it.

    Args: input_layouts, output_layouts, use_local_output: as in ColwiseParallel.
    Raises: ValueError for a layer that is merged, or split already.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        places = {"weight": Shard(0), "bias": Shard(0), "lora_A": Replicate(), "lora_B": Shard(0)}
        return _apply(self, super()._apply, module, device_mesh, places, Replicate())


class RowwiseLoRA(RowwiseParallel):
    """torch's RowwiseParallel for a LoRALinear: each process has some of the inputs.

    weight [N, K] and lora_A [R, K] are split over K, bias [N] and lora_B [N, R] are whole in each process; y is the sum
    over the processes of x_p W_pt + s x_p A_pt Bt, formed once, and dB is summed in the backward. Everything else as
    in ColwiseLoRA.

    Args: input_layouts, output_layouts, use_local_output: as in RowwiseParallel.
    Raises: ValueError for a layer that is merged, or split already.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        places = {"weight": Shard(1), "bias": Replicate(), "lora_A": Shard(1), "lora_B": Replicate()}
        return _apply(self, super()._apply, module, device_mesh, places, Shard(-1))


def _apply(style: Any, torch_apply: Any, module: nn.Module, mesh: DeviceMesh, places: dict, x: Placement) -> nn.Module:
    """Split a module and have it called with x and return y as the style says."""
    if isinstance(module, ModuleToSave):  # its copies are plain modules
        for inner in (module.original_module, *module.modules_to_save.values()):
            torch_apply(inner, mesh)
        return module
    if not isinstance(module, LoRALinear):
        return torch_apply(module, mesh)
    if module.merged:
        raise ValueError(f"a layer must be unmerged to be split; got adapter {module.active_adapter!r} merged")
    if isinstance(module.weight, DTensor):
        raise ValueError(f"a layer must be whole to be split; got a weight placed {module.weight.placements}")
    style.desired_input_layouts = (x,)
    return distribute_module(
        module,
        mesh,
        partial(_split, places, style.src_data_rank),
        partial(style._prepare_input_fn, style.input_layouts, style.desired_input_layouts),
        partial(style._prepare_output_fn, style.output_layouts, style.use_local_output),
    )


def _split(places: dict[str, Placement], source: int | None, name: str, module: nn.Module, mesh: DeviceMesh) -> None:
    """Put DTensors in the place of a module's parameters: LoRALinear's own, or those of its lora_A or lora_B."""
    for key, parameter in list(module._parameters.items()):
        if parameter is not None:
            split = distribute_tensor(parameter, mesh, [places[name or key]], src_data_rank=source)
            module.register_parameter(key, nn.Parameter(split, requires_grad=parameter.requires_grad))
