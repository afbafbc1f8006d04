"""Forward-mode derivatives of an adapter over a quantised weight: the library's own kernels for few rows may lose the
base's part, so the dense view serves them."""

import pytest
import torch
from quantised_layers import K, quantised
from torch.autograd import forward_ad

from fused_lora import LoRALinear, apply_lora, bases


@pytest.mark.parametrize("kind", ["nf4", "bnb int8"])
def test_the_base_has_its_part(kind):
    model = apply_lora(torch.nn.Sequential(quantised(kind, torch.float32)), r=4, target_modules=["0"]).eval()
    layer: LoRALinear = model[0]
    torch.nn.init.normal_(layer.lora_B["default"], std=0.1)
    x, along = torch.randn(2, K), torch.randn(2, K)
    with torch.no_grad():
        model(x)
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(model(forward_ad.make_dual(x, along))).tangent
        weight = bases.of(layer.base_layer).dense(torch.float32)
        weight = weight + layer.scaling["default"] * layer.lora_B["default"] @ layer.lora_A["default"]
    torch.testing.assert_close(tangent, along @ weight.T, rtol=1e-3, atol=1e-3)
