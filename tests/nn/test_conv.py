"""LoRAConv with a kernel of one point: a linear layer, in the memory order of its input."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fused_lora.nn import LoRAConv

CONVOLUTIONS = {3: (nn.Conv1d, F.conv1d), 4: (nn.Conv2d, F.conv2d), 5: (nn.Conv3d, F.conv3d)}
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def layer_over(conv: nn.Module, dtype=torch.float32) -> LoRAConv:
    torch.manual_seed(1)
    layer = LoRAConv.over(conv.to(dtype), r=3, lora_alpha=6)
    nn.init.normal_(layer.lora_B["default"], std=0.3)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dims", CONVOLUTIONS)
def test_pointwise(dims, last, dtype):
    kind, function = CONVOLUTIONS[dims]
    layer = layer_over(kind(4, 6, 1), dtype)
    x = torch.randn(2, 4, *range(5, 2 + dims + 1), dtype=dtype)
    order = CHANNELS_LAST.get(dims, torch.contiguous_format) if last else torch.contiguous_format
    x = x.contiguous(memory_format=order).requires_grad_()
    base, A, B = layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]
    want = base(x).float() + 2.0 * function(function(x.float(), A), B)
    y = layer(x)
    near = {"atol": 1e-5, "rtol": 1e-4} if dtype is torch.float32 else {"atol": 0.05, "rtol": 0.05}
    torch.testing.assert_close(y.float(), want, **near)
    assert y.dtype == dtype and y.is_contiguous(memory_format=order)
    dy = torch.randn(y.shape)
    for got, exact in zip(
        torch.autograd.grad(y, (x, A, B), dy.to(dtype)), torch.autograd.grad(want, (x, A, B), dy), strict=True
    ):
        scale = exact.abs().max().item()
        torch.testing.assert_close(got.float() / scale, exact.float() / scale, **near)
    assert layer(x[0]).shape == y[0].shape


def test_what_is_attached_runs():
    conv = nn.Conv2d(4, 6, 1)
    layer = layer_over(conv)
    x = torch.randn(2, 4, 3, 3)
    before = layer(x)
    handle = conv.register_forward_hook(lambda module, args, y: y + 1)
    torch.testing.assert_close(layer(x), before + 1)
    handle.remove()
    layer.add_adapter("other", r=2)
    nn.init.normal_(layer.lora_B["other"])
    layer.set_adapter(["default", "other"])
    both = layer(x)
    layer.set_adapter("other")
    torch.testing.assert_close(both, before + layer(x) - conv(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
