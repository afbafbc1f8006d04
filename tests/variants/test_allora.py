"""ALLoRA: the forward and dx of LoRA, and gradients of A and B from rows of dL/d(BA) that are scaled."""

import pytest
import torch
from torch import nn

from fused_lora import LoraConfig, LoRALinear, lora_linear
from fused_lora.backends import pick
from fused_lora.ops.reference import Variant
from fused_lora.ops.schema import request_of
from fused_lora.variants.allora import row_scale

K, N, R, ETA = 24, 40, 4, 2.0**0.5


def twins(dtype=torch.float64, zero=False):
    """A layer with ALLoRA and one with LoRA of the same values."""
    torch.manual_seed(0)
    linear = nn.Linear(K, N, dtype=dtype)
    layers = LoRALinear.from_linear(linear, R, allora_eta=ETA), LoRALinear.from_linear(linear, R, R)
    with torch.no_grad():
        if not zero:
            nn.init.normal_(layers[0].lora_B["default"], std=0.3)
        for mine, theirs in zip(*(layer.own_tensors("default") for layer in layers), strict=True):
            theirs.copy_(mine)
    return layers


def outcome(layer, x):
    x = x.clone().requires_grad_()
    y = layer(x)
    dy = torch.cos(y.detach())
    return y, dy, *torch.autograd.grad(y, [x, *layer.own_tensors("default")], dy)


def test_gradients_from_the_scaled_gradient_of_the_product():
    x = torch.randn(9, K, dtype=torch.float64)
    allora, lora = twins()
    (y, dy, dx, dA, dB), (y_lora, _, dx_lora, dA_lora, _) = outcome(allora, x), outcome(lora, x)
    torch.testing.assert_close(y, y_lora, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(dx, dx_lora, rtol=1e-13, atol=1e-13)
    A, B = (t.detach() for t in allora.own_tensors("default"))
    c = (torch.linalg.vector_norm(B @ A, dim=1) + 1 / ETA**2) ** -0.5
    G = c[:, None] * (dy.T @ x)
    torch.testing.assert_close(dA, B.T @ G, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dB, G @ A.T, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(dA, dA_lora * c.mean())


def test_on_each_back_end(backend):
    allora, _ = twins(torch.float32)
    allora.to(backend.device)
    A, B = allora.own_tensors("default")
    x = torch.randn(33, K, device=backend.device, requires_grad=True)
    c = row_scale(A, B, ETA)
    try:
        pick(backend.name, request_of(x, allora.weight, A, Variant(grad_row_scale=c)))
    except ValueError as refused:
        pytest.skip(str(refused))
    y = lora_linear(x, allora.weight, A, B, 1.0, bias=allora.bias, grad_row_scale=c, backend=backend.name)
    dy = torch.randn_like(y)
    dx, dA, dB = torch.autograd.grad(y, [x, A, B], dy)
    x, dy, W, A, B = (t.detach().double() for t in (x, dy, allora.weight, A, B))
    G = c.double()[:, None] * (dy.T @ x)
    for got, want in ((dx, dy @ (W + B @ A)), (dA, B.T @ G), (dB, G @ A.T)):
        assert (got - want).abs().max() <= 2e-5 * want.abs().max()


def test_starts_with_eta_times_the_gradients_of_lora():
    x = torch.randn(9, K, dtype=torch.float64)
    allora, lora = twins(zero=True)
    (*_, dB), (*_, dB_lora) = outcome(allora, x), outcome(lora, x)
    torch.testing.assert_close(dB, ETA * dB_lora, rtol=1e-12, atol=1e-12)


def test_the_scale_follows_the_optimizer():
    x = torch.randn(9, K, dtype=torch.float64)
    allora, lora = twins(zero=True)
    for layer in (allora, lora):
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.5 / (ETA if layer is allora else 1))
        layer(x).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(allora.lora_B["default"], lora.lora_B["default"])
    (*_, dB), (*_, dB_lora) = outcome(allora, x), outcome(lora, x)
    c = row_scale(*allora.own_tensors("default"), ETA)
    torch.testing.assert_close(dB, c[:, None] * dB_lora, rtol=1e-6, atol=1e-9)
    assert (c < 0.9 * ETA).any()


def test_the_scaling_is_one():
    assert LoRALinear(K, N, 16, allora_eta=1.0).scaling == {"default": 1.0}
    config = LoraConfig(r=16, allora_eta=1.0, rank_pattern={"q": 4})
    assert config.lora_alpha == 16 and config.layer("q").scaling == config.layer("k").scaling == 1.0


REFUSED = {
    r"lora_alpha must be r, 4, for a scaling of 1 with allora_eta=1.5; got 16": dict(lora_alpha=16),
    r"lora_dropout must be 0 with allora_eta=1.5; got 0.1": dict(lora_dropout=0.1),
    r"use_rslora must be False with allora_eta=1.5; got True": dict(use_rslora=True),
    r"allora_eta must be a finite number > 0 or None; got 0": dict(allora_eta=0),
    r"allora_eta must be a finite number > 0 or None; got '1'": dict(allora_eta="1"),
}


@pytest.mark.parametrize("make", [lambda **given: LoRALinear(K, N, **given), LoraConfig])
@pytest.mark.parametrize("message", REFUSED)
def test_what_is_refused(message, make):
    with pytest.raises(ValueError, match=message):
        make(**dict(r=4, allora_eta=1.5) | REFUSED[message])


def test_several_adapters_are_refused_together():
    layer, _ = twins()
    layer.add_adapter("other")
    with pytest.raises(ValueError, match=r"ALLoRA adapter 'default' must act alone; got \['default', 'other'\]"):
        layer.set_adapter(["default", "other"])


def test_a_layer_that_is_called_is_refused():
    linear = nn.Linear(K, N)
    linear.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match="allora_eta must be None over a layer that is called, kept whole; got one on"):
        LoRALinear.from_linear(linear, allora_eta=1.0)
