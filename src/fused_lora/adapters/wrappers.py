"""What hides a model or its tensors: wrappers of torch.compile, data parallelism, checkpointing and averaging, FSDP's
shards, accelerate's offloading, PEFT. Names are those of the plain model, tensors are whole."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

_INNER = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")  # torch.compile, checkpointing, FSDP1
_AROUND = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)  # all hold `module`


def inner_attribute(module: nn.Module) -> str | None:
    """The attribute in which a wrapper holds the module that it stands for, or None if it is no wrapper."""
    if isinstance(module, _AROUND):
        return "module"
    children = [name for name, _ in module.named_children() if name in _INNER]
    return children[0] if children else None


def unwrapped(model: nn.Module) -> nn.Module:
    """The model under its wrappers."""
    while (attribute := inner_attribute(model)) is not None:
        model = getattr(model, attribute)
    return model


def plain_key(key: str) -> str:
    """A state dict's key without the names of wrappers."""
    return ".".join(part for part in key.split(".") if part not in _INNER)


def plain_class(model: nn.Module) -> type:
    """The model's own class; fully_shard puts one of its own in front."""
    return next(kind for kind in type(model).__mro__ if not kind.__module__.startswith("torch.distributed."))


def _of_fsdp(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules of FSDP's class of this name; without its import there are none."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [module for module in model.modules() if isinstance(module, getattr(fsdp, name))] if fsdp else []


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP1 or FSDP2 holds parameters of the model, or tensor parallelism has split some."""
    if _of_fsdp(model, "FSDPModule") or _of_fsdp(model, "FullyShardedDataParallel"):
        return True
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def is_replicated(model: nn.Module) -> bool:
    """Whether DistributedDataParallel has taken stock of what trains in the model."""
    return any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules())


def check_open(model: nn.Module) -> None:
    """Raises ValueError unless adapters can be put on the model now: a wrapper that has taken stock of the parameters
    would never see new ones, PEFT's layers would get adapters on their adapters."""
    if is_sharded(model):
        raise ValueError(
            "model must not be sharded when adapters are added, apply_lora before FSDP and tensor parallelism; got a "
            "sharded one"
        )
    if is_replicated(model):
        raise ValueError(
            "model must be wrapped in DistributedDataParallel after adapters are added, it would not synchronise their "
            "gradients; got a wrapped one"
        )


def check_no_peft(model: nn.Module) -> None:
    """Raises ValueError if the model or a module in it is PEFT's."""
    if vars(model).get("peft_config"):
        raise ValueError(f"model must be the base model; got a {type(model).__name__} with PEFT adapters")
    for name, module in model.named_modules():
        if any(kind.__module__.partition(".")[0] == "peft" for kind in type(module).__mro__):
            where = f" in {name}" if name else ""
            raise ValueError(
                f"model must be the base model; got a {type(module).__name__} with PEFT adapters{where} (unload() or "
                "merge_and_unload() gives the base model back)"
            )


def reshard(model: nn.Module) -> None:
    """Have FSDP2 put the parameters that it trains in place of the copies that it computes with."""
    for module in _of_fsdp(model, "FSDPModule"):
        module.reshard()  # type: ignore[operator]  # a method that fully_shard gives the module


@contextmanager
def whole(model: nn.Module, writeback: bool = False) -> Iterator[None]:
    """Inside, FSDP's parameters can be read whole: FSDP1's are gathered, FSDP2's are the DTensors that it trains, not
    the copies that it computes with. Every process must come here.

    Args:
        model: sharded or not.
        writeback: whether FSDP1 takes over what was written inside.
    """
    reshard(model)
    with ExitStack() as stack:
        if _of_fsdp(model, "FullyShardedDataParallel"):
            from torch.distributed.fsdp import FullyShardedDataParallel

            stack.enter_context(FullyShardedDataParallel.summon_full_params(model, writeback=writeback))
        yield


@contextmanager
def fetched(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, tensors that accelerate has offloaded are on the CPU, for reading."""
    with ExitStack() as stack:
        for module in modules:
            for inner in module.modules():
                if hasattr(inner, "_hf_hook") and any(t.is_meta for t in inner.parameters(recurse=False)):
                    from accelerate.utils import align_module_device

                    stack.enter_context(align_module_device(inner, torch.device("cpu")))
        yield


def whole_tensor(tensor: Tensor) -> Tensor:
    """A DTensor gathered from all processes; any other tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def fill(tensor: Tensor, values: Tensor) -> None:
    """Write whole values into a tensor, into this process's part if it is a DTensor."""
    if hasattr(tensor, "full_tensor"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(tensor, DTensor)
        values = values.to(device=tensor.device, dtype=tensor.dtype)
        values = distribute_tensor(values, tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(values)
