"""How `torch.distributed.tensor.parallel.parallelize_module` splits layers with adapters."""

from functools import partial
from typing import Any

from torch import nn
from torch.distributed.tensor import DeviceMesh, DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel
from torch.distributed.tensor.placement_types import Placement

from fused_lora.nn.linear import LoRALinear
from fused_lora.nn.modules_to_save import ModuleToSave
from fused_lora.nn.trained_rows import TrainedRows


class ColwiseLoRA(ColwiseParallel):
    """torch's ColwiseParallel for a LoRALinear: each process has some of the outputs.

    weight [N, K], bias [N] and lora_B [N, R] are split over N, lora_A [R, K] is whole in each process; y_p = x W_pt +
    s x At B_pt needs no communication, and dx and dA are summed over the processes in the backward. Every other module
    is handed to ColwiseParallel, so that one plan serves layers with adapters and layers without. The processes must
    draw the same random numbers for dropout, as torch's own layers need it.

    Args: input_layouts, output_layouts, use_local_output: as in ColwiseParallel.
    Raises: ValueError for a layer that is merged or split already, or that is built around another (quantised, hooked).
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
    Raises: ValueError for a layer that is merged or split already, or that is built around another (quantised, hooked).
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        places = {"weight": Shard(1), "bias": Replicate(), "lora_A": Shard(1), "lora_B": Replicate()}
        return _apply(self, super()._apply, module, device_mesh, places, Shard(-1))


def _apply(
    style: Any, torch_apply: Any, module: nn.Module, mesh: DeviceMesh, places: dict[str, Any], x: Placement
) -> nn.Module:
    """Split a module and have it called with x and return y as the style says.

    Raises: ValueError as the styles, and for a module of which an adapter trains rows.
    """
    if isinstance(module, ModuleToSave):  # its copies are plain modules
        if any(isinstance(copied, TrainedRows) for copied in module.modules_to_save.values()):
            raise ValueError("a module must not be trained by rows to be split; got one with trainable_token_indices")
        for inner in (module.original_module, *module.modules_to_save.values()):
            torch_apply(inner, mesh)
        return module
    if not isinstance(module, LoRALinear):
        return torch_apply(module, mesh)
    if "base_layer" in module._modules:
        kind = type(module.base_layer).__name__
        raise ValueError(f"a layer must have its weight itself to be split; got one around a {kind}")
    if module.variants:
        raise ValueError(f"a layer must have plain LoRA to be split; got {module.extra_repr()}")
    if module.merged:
        raise ValueError(f"a layer must be unmerged to be split; got adapter {module.active_adapter!r} merged")
    if isinstance(module.weight, DTensor):
        raise ValueError(f"a layer must be whole to be split; got a weight placed {module.weight.placements}")
    if module.fan_in_fan_out:  # the weight lies as [K, N]
        places = places | {"weight": Shard(1 - places["weight"].dim)}
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


def tensor_parallel_plan(model: Any) -> dict[str, ParallelStyle]:
    """The plan that a transformers model has for tensor parallelism, for `parallelize_module` and with adapters.

    The model is loaded whole (without `tp_plan=`), gets its adapters, then is split::

        parallelize_module(apply_lora(model), mesh, tensor_parallel_plan(model))

    Embeddings and norms stay whole in each process.

    Args:
        model: a transformers model whose class has a tp_plan.
    Returns: styles by module name, `*` for any layer.
    Raises: ValueError for a model without a plan, or one that needs another style than column- and row-parallel linear
        layers (packed projections, experts).
    """
    whole = Replicate()
    styles: dict[str, ParallelStyle | None] = {
        "colwise": ColwiseLoRA(),
        "colwise_gather_output": ColwiseLoRA(output_layouts=whole),
        "rowwise": RowwiseLoRA(),
        "rowwise_split_input": RowwiseLoRA(input_layouts=whole),
    }
    styles |= dict.fromkeys(("embedding_rowwise", "embedding_colwise", "replicated_with_grad_allreduce"))
    named = getattr(model, "tp_plan", None)
    if not named:
        raise ValueError(f"model must have a tp_plan, as transformers' models do; got a {type(model).__name__} without")
    for name, style in named.items():
        if style not in styles:
            raise ValueError(f"model must be split by linear layers alone; got {style!r} for {name}")
    return {name: found for name, style in named.items() if (found := styles[style]) is not None}
