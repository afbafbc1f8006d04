"""Reference back end: plain LoRA by the PyTorch composition of `ops.reference`, on every device, in every dtype."""

from fused_lora.ops import reference
from fused_lora.ops.reference import Gradients

forward = reference.forward


def backward(dy, x, weight, lora_A, lora_B, h, scaling, dropout_p, seed, needs):
    """[dx, dA, dB, dbias], None where `needs` says so; see `reference.backward`."""
    need_x, need_A, need_B, need_bias = needs
    wanted = Gradients(x=need_x, lora_A=need_A, lora_B=need_B, bias=need_bias)
    grads = reference.backward(dy, None, x, weight, lora_A, lora_B, h, scaling, dropout_p, seed, wanted)
    return [grads.x, grads.lora_A, grads.lora_B, grads.bias]
