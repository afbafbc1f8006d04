"""PEFT's LoRA layers on the fused op: `fuse(model)` and its kin; the only package that subclasses PEFT's layers."""

try:
    import peft  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "peft":
        raise
    raise ModuleNotFoundError("fused_lora.peft needs peft: pip install 'fused-lora[peft]'", name="peft") from None

from fused_lora.peft.build import custom_module_mapping, patched
from fused_lora.peft.dora import forget_norms
from fused_lora.peft.fuse import explain, fuse, unfuse
from fused_lora.peft.ways import Row, Ways

__all__ = ["Row", "Ways", "custom_module_mapping", "explain", "forget_norms", "fuse", "patched", "unfuse"]
