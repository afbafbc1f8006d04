"""Tensor parallelism for layers with adapters."""

from fused_lora.distributed.tensor_parallel import ColwiseLoRA, RowwiseLoRA

__all__ = ["ColwiseLoRA", "RowwiseLoRA"]
