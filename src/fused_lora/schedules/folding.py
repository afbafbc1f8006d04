"""One layer's update into its base weight, in place."""

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fused_lora import bases
from fused_lora.deepspeed_zero import is_copied, is_split
from fused_lora.nn.layer import LoRALayer
from fused_lora.variants.allora import ALLoRA, ScaledSteps

Replaced = dict[nn.Parameter, nn.Parameter]  # the new Parameter of each old one


def check_foldable(root: nn.Module, layers: Mapping[str, LoRALayer], adapter_name: str) -> None:
    """Raises ValueError naming the first layer whose base weight must not be changed in place: quantised, tied, not
    plain, merged, no longer the model's, or under an adapter that is no plain LoRA, does not act or is not finite; or
    if ZeRO has A and B."""
    check_stepped(layers, adapter_name)
    _check_acting(root, layers, adapter_name)
    owners = Counter(id(p) for module in root.modules() for p in module._parameters.values() if p is not None)
    for name, layer in layers.items():
        if bases.quantised(layer.base()):
            raise ValueError(
                f"the base weight of {name} must not be quantised: most of an update is smaller than the steps of a "
                f"quantised weight and would be lost; got {type(layer.base().weight).__name__}"
            )
        variant = layer.link or layer.variants.get(adapter_name)
        if variant is not None and not isinstance(variant, ALLoRA | ScaledSteps):  # whose forward is LoRA's
            kind = type(variant).__name__
            raise ValueError(f"the adapter of {name} must be plain LoRA to be folded into the weight; got {kind}")
        try:
            layer.check_mergeable([adapter_name])
            layer._factors(adapter_name)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if owners[id(layer.weight)] > 1:
            raise ValueError(
                f"the base weight of {name} must be of this layer alone, a merge would change its twin; got a weight "
                "that is tied to another module's: untie it, or leave the layer out of target_modules"
            )
        for what, tensors in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            if not torch.isfinite(tensors[adapter_name]).all():
                raise ValueError(f"{what} of {name} must be finite to be merged; got elements that are not")


def _check_acting(root: nn.Module, layers: Mapping[str, LoRALayer], adapter_name: str) -> None:
    """Raises ValueError naming the first layer that was taken off the model, or in which the adapter does not act."""
    modules = {id(module) for module in root.modules()}
    for name, layer in layers.items():
        if id(layer) not in modules:
            raise ValueError(
                f"adapter {adapter_name!r} of {name} must be on the model to be folded into the weight, as it was when "
                "the schedule was made; got one that was taken off"
            )
        if layer.merged:
            raise ValueError(f"{name} must be unmerged before adapter {adapter_name!r} is folded; got a merged layer")
        if layer.active_adapter not in (adapter_name, None):
            raise ValueError(
                f"adapter {adapter_name!r} of {name} must act to be folded into the weight; got adapter "
                f"{layer.active_adapter!r} active"
            )


def check_stepped(layers: Mapping[str, LoRALayer], adapter_name: str) -> None:
    """Raises ValueError naming the first layer that has no such adapter any more, or of which the optimizer steps
    copies."""
    for name, layer in layers.items():
        if adapter_name not in layer.lora_A:
            raise ValueError(f"adapter {adapter_name!r} of {name} must be on the model; got one that was deleted")
        A, B = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
        if is_copied(A) or is_copied(B) or is_split(A) or is_split(B):
            raise ValueError(
                f"A and B of {name} must be the optimizer's own to be folded into the weight: DeepSpeed's ZeRO steps "
                "copies, and would put these back; got ones that ZeRO has"
            )


def master_of(weight: Tensor) -> Tensor | None:
    """An fp32 copy of a bf16 or fp16 weight, which keeps what the weight's own rounding loses; None for others."""
    return weight.detach().float() if weight.dtype.itemsize < 4 else None


@torch.no_grad()
def fold(layer: LoRALayer, adapter_name: str, factor: float, master: Tensor | None) -> None:
    """Add factor * B A to the base weight, in place.

    Equivalent to ``weight.copy_((weight.float() + factor * B.float() @ A.float()).to(weight.dtype))``; with a master
    the sum is taken and kept there, and the weight is its rounding.
    """
    weight: Tensor = layer.weight
    compute = torch.promote_types(weight.dtype, torch.float32)
    left, right = layer._factors(adapter_name)
    update = (left.to(compute) @ right.to(compute)).mul_(factor).view(weight.shape)
    weight.copy_(update.add_(weight) if master is None else master.add_(update))


def set_rank(layer: LoRALayer, adapter_name: str, r: int) -> Replaced:
    """Give an adapter fresh A and B of another rank; its lora_alpha stays. Returns: the new Parameter of each old
    one."""
    replaced: Replaced = {}
    for tensors, shape in zip((layer.lora_A, layer.lora_B), layer.adapter_shapes(r), strict=True):
        old = tensors[adapter_name]
        tensors[adapter_name] = nn.Parameter(old.new_empty(shape), requires_grad=old.requires_grad)
        replaced[old] = tensors[adapter_name]
    layer.r[adapter_name] = r
    eta = getattr(layer.variants.get(adapter_name), "eta", None)  # ALLoRA's, whose scaling is 1
    hyper = layer.lora_dropout[adapter_name], layer.use_rslora[adapter_name]
    alpha = layer.lora_alpha[adapter_name] if eta is None else r
    layer.set_hyperparameters(adapter_name, alpha, *hyper, allora_eta=eta, allora_mode=layer.allora_mode[adapter_name])
    layer.reset_lora_parameters(adapter_name)
    return replaced


def check_exchangeable(optimizer: Optimizer) -> None:
    """Raises ValueError if an optimizer knows more of A and B than its param_groups say, as those of
    `fused_lora.optim` do: new Parameters in the groups would not reach it all."""
    hooks = optimizer._optimizer_step_pre_hooks.values()
    changes = any(getattr(hook, "__module__", None) == "fused_lora.optim.changed_gradients" for hook in hooks)
    if changes or any(group.get("lora_pairs") for group in optimizer.param_groups):
        raise ValueError(
            f"ranks need a rebuild_optimizer with a {type(optimizer).__name__} that holds pairs of A and B; got none"
        )
