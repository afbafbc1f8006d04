"""What hides a model or its tensors: wrappers of torch.compile, data parallelism, DeepSpeed, checkpointing and
averaging, shards of FSDP and ZeRO-3, accelerate's offloading, PEFT. Names are those of the plain model, tensors are
whole."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from fused_lora.deepspeed_zero import gathered, is_copied, is_split

_INNER = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")  # torch.compile, checkpointing, FSDP1
_AROUND = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)  # all hold `module`


def inner_attribute(module: nn.Module) -> str | None:
    """The attribute in which a wrapper holds the module that it stands for, or None if it is no wrapper."""
    if isinstance(module, _AROUND) or _is_engine(module):
        return "module"
    children = [name for name, _ in module.named_children() if name in _INNER]
    return children[0] if children else None


def _is_engine(module: nn.Module) -> bool:
    """Whether a module is what deepspeed.initialize returns; without its import there is none."""
    deepspeed = sys.modules.get("deepspeed")
    return isinstance(module, getattr(deepspeed, "DeepSpeedEngine", ()))


def unwrapped(model: nn.Module) -> nn.Module:
    """The model under its wrappers. Raises: ValueError for what is no module."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module; got a {type(model).__name__}")
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
    """Whether FSDP1 or FSDP2 holds parameters of the model, or tensor parallelism or ZeRO-3 has split some."""
    if _of_fsdp(model, "FSDPModule") or _of_fsdp(model, "FullyShardedDataParallel"):
        return True
    return any(hasattr(parameter, "full_tensor") or is_split(parameter) for parameter in model.parameters())


def is_replicated(model: nn.Module) -> bool:
    """Whether DistributedDataParallel has taken stock of what trains in the model."""
    return any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules())


def is_of_deepspeed(model: nn.Module) -> bool:
    """Whether deepspeed.initialize has taken stock of the model's parameters, as far as that shows: its engine is
    around the model, ZeRO has copies of what trains, ZeRO-3 has numbered the modules."""
    known = any(_is_engine(module) or hasattr(module, "ds_id") for module in model.modules())
    return known or any(is_copied(parameter) for parameter in model.parameters())


def check_open(model: nn.Module) -> None:
    """Raises ValueError unless adapters can be put on the model now: a wrapper that has taken stock of the parameters
    would never see new ones. ZeRO-3 splits a model as it is loaded, and has not taken stock of it then."""
    if is_of_deepspeed(model):
        raise ValueError(
            "model must not be deepspeed.initialize's yet when adapters are added, it would not train them; got one "
            "that is"
        )
    split = any(is_split(parameter) for parameter in model.parameters())
    if not split and is_sharded(model):
        raise ValueError(
            "model must not be sharded when adapters are added, apply_lora before FSDP and tensor parallelism; got a "
            "sharded one"
        )
    if is_replicated(model):
        raise ValueError(
            "model must be wrapped in DistributedDataParallel after adapters are added, it would not synchronise their "
            "gradients; got a wrapped one"
        )


def check_readable_again(model: nn.Module) -> None:
    """Raises ValueError where an adapter's new values would be lost: DeepSpeed steps copies of its own, and puts them
    in the parameters' place."""
    if is_of_deepspeed(model):
        raise ValueError(
            "model must not be deepspeed.initialize's yet when an adapter is read: load_adapter before it, or the "
            "engine's load_checkpoint; got one that is"
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
def fetched(modules: Iterable[nn.Module], parameters: Iterable[Tensor]) -> Iterator[None]:
    """Inside, tensors of the modules that accelerate has offloaded are on the CPU, and parameters that ZeRO-3 has split
    are whole, for reading. Every process must come here."""
    with gathered(parameters), ExitStack() as stack:
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
