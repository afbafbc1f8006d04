"""Tensor parallelism for layers with adapters."""

from fused_lora.distributed.tensor_parallel import ColwiseLoRA, RowwiseLoRA, tensor_parallel_plan

__all__ = ["ColwiseLoRA", "RowwiseLoRA", "tensor_parallel_plan"]
