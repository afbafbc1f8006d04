"""ALLoRA: the forward and dx of LoRA, and gradients of A and B from rows of dL/d(BA) that are scaled."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fused_lora import LoraConfig, LoRALinear, lora_linear
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
    if backend.name == "cuda":
        pytest.skip("the compiled CUDA kernels take plain LoRA only")
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


def updating(dtype=torch.float32, zero=True):
    """As `twins`, with the mode that scales the steps."""
    _, lora = twins(dtype, zero)
    layer = LoRALinear.from_linear(nn.Linear(K, N, dtype=dtype), R, allora_eta=ETA, allora_mode="update")
    layer.load_state_dict(lora.state_dict())
    return layer, lora


def test_mode_update_scales_the_steps_of_adam(backend):
    """The gradients are LoRA's, and of AdamW's step, which would cancel a factor of the gradient, row n of B gets
    1 / sqrt(1 + eta^2 |(BA)_n|)."""
    layer, lora = (each.to(backend.device) for each in updating())
    (A, B), raw = layer.own_tensors("default"), lora.own_tensors("default")
    optimizers = [torch.optim.AdamW(each, lr=0.2, weight_decay=0.1) for each in ([A, B], raw)]
    for step in range(4):
        x = torch.randn(33, K, device=backend.device, requires_grad=True)
        lora_A, lora_B, scaling, dropout_p, optional, *_ = layer.variants["default"].update(layer, x)
        assert (lora_A is A, lora_B is B, scaling, dropout_p, optional) == (True, True, 1.0, 0.0, {})
        y = lora_linear(x, layer.weight, lora_A, lora_B, scaling, bias=layer.bias, backend=backend.name)
        dy = torch.randn_like(y)
        y.backward(dy)
        x64, dy64, W, A64, B64 = (t.detach().double() for t in (x, dy, layer.weight, A, B))
        G = dy64.T @ x64
        for got, want in ((x.grad, dy64 @ (W + B64 @ A64)), (A.grad, B64.T @ G), (B.grad, G @ A64.T)):
            assert (got - want).abs().max() <= 2e-5 * want.abs().max()
        for mine, theirs in zip((A, B), raw):  # LoRA's step from here, with the moments of all steps so far
            theirs.data.copy_(mine)
            theirs.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert torch.equal(A, raw[0])
        w = (1 + ETA**2 * torch.linalg.vector_norm(B64 @ A64, dim=1, keepdim=True)) ** -0.5
        torch.testing.assert_close(B.double(), B64 + w * (raw[1].double() - B64), rtol=1e-5, atol=1e-7)
        assert torch.equal(B, raw[1]) if step == 0 else (w < 0.9).any()


@pytest.mark.parametrize("how", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_mode_update_in_copies_and_in_nested_optimizers(how):
    """Each layer's steps are scaled, once, whatever steps within what."""
    layer, _ = updating(zero=False)
    twin = how(layer)

    class Outer(torch.optim.Optimizer):
        def __init__(self, inner):
            super().__init__(inner.param_groups, {})
            self.inner = inner

        def step(self):
            self.inner.step()

    (A, B), mine = layer.own_tensors("default"), twin.own_tensors("default")
    w = (1 + ETA**2 * torch.linalg.vector_norm(B @ A, dim=1, keepdim=True)) ** -0.5
    want, untouched = (B - 0.5 * w).detach(), B.detach().clone()
    for p in mine:
        p.grad = torch.ones_like(p)
    Outer(torch.optim.SGD(mine, lr=0.5)).step()
    torch.testing.assert_close(mine[1], want)
    assert torch.equal(B, untouched)
    with torch.no_grad():
        twin.merge()
        x = torch.randn(5, K)
        torch.testing.assert_close(twin(x), x @ (twin._pristine + mine[1] @ mine[0]).T + twin.bias)


def test_mode_update_needs_the_optimizer_to_hold_b():
    layer, _ = updating()
    layer.lora_B["default"] = nn.Parameter(torch.zeros(7))
    with pytest.raises(ValueError, match=r"allora_mode='update'.* exclude each other.* and shape \[7"):
        torch.optim.SGD(layer.parameters(), lr=0.1).step()


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
    r"allora_mode must be one of .'gradient', 'update'.; got 'step'": dict(allora_mode="step"),
    r"allora_mode must be 'gradient' without allora_eta; got 'update'": dict(allora_mode="update", allora_eta=None),
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
    with pytest.raises(ValueError, match="allora_eta must be None over a layer that is called, kept whole, unless"):
        LoRALinear.from_linear(linear, allora_eta=1.0)
    layer = LoRALinear.from_linear(linear, R, allora_eta=1.0, allora_mode="update")
    assert layer.scaling == {"default": 1.0} and "allora_mode='update'" in repr(layer)
