"""A LoRALinear around a linear layer that stays itself: forwards of its own, hooks and other weights act as ever."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm
from transformers.pytorch_utils import Conv1D

from fused_lora.adapters import apply_lora, load_adapter, merged, save_adapter
from fused_lora.backends import cpu, cpu_product
from fused_lora.nn import LoRALinear
from fused_lora.nn.around import LoRALinearAround
from fused_lora.ops.reference import PLAIN
from fused_lora.ops.schema import request_of

SIZES = 24, 40  # K, N


class Shifted(nn.Linear):
    """nn.Linear with a forward of its own, and one more argument."""

    def forward(self, x, shift=0.5):
        return super().forward(x) + shift


class Quantised(torch.Tensor):
    """A stand-in for the subclasses that hold packed weights: int8 values of which only their own product knows."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            x, weight, *bias = args
            return F.linear(x, weight.as_subclass(torch.Tensor).float() / 100, *bias)
        return super().__torch_function__(function, types, args, kwargs or {})


def quantised(linear):
    codes = (linear.weight.detach() * 100).round().to(torch.int8).as_subclass(Quantised)
    linear.weight = nn.Parameter(codes, requires_grad=False)


def hooked(linear):
    linear.register_forward_hook(lambda module, args, y: y * 2)


def owned(linear):
    linear.forward = lambda x: F.linear(x, linear.weight) - 1


BASES = {
    "subclass": lambda linear: setattr(linear, "__class__", Shifted),
    "quantised": quantised,
    "forward hook": hooked,
    "pre-hook": lambda linear: linear.register_forward_pre_hook(lambda module, args: (args[0] + 1,)),
    "forward of its own": owned,
    "weight norm": lambda linear: parametrizations.weight_norm(linear),
    "spectral norm": lambda linear: spectral_norm(linear).eval(),
    "pruned": lambda linear: prune.l1_unstructured(linear, "weight", 0.5),
    "buffer": lambda linear: linear.register_buffer("scale", torch.ones(4)),
    "child": lambda linear: linear.add_module("observer", nn.Identity()),
}


def base(case: str) -> nn.Linear:
    torch.manual_seed(0)
    linear = nn.Linear(*SIZES)
    BASES[case](linear)
    return linear


def trained(layer: LoRALinear, name: str = "default", seed: int = 0) -> LoRALinear:
    """The layer with an adapter whose B is not zero any more."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for t in (layer.lora_A[name], layer.lora_B[name]):
            t.copy_(torch.randn(t.shape, generator=g) * 0.2)
    return layer


@pytest.mark.parametrize("case", BASES)
def test_the_base_is_called_and_the_update_added(case):
    linear = base(case)
    x = torch.randn(3, 5, SIZES[0])
    want, leaf = linear(x), x.clone().requires_grad_()
    layer = LoRALinear.from_linear(linear, r=4, lora_alpha=6)
    assert type(layer) is LoRALinearAround and layer.base_layer is linear and isinstance(layer, LoRALinear)
    assert torch.equal(layer(x), want)
    trained(layer)
    A, B = layer.lora_A["default"], layer.lora_B["default"]
    assert torch.allclose(layer(x), want + 1.5 * x @ A.T @ B.T, atol=1e-5)
    dy = torch.randn(3, 5, SIZES[1])
    layer(leaf).backward(dy)
    rows_x, rows_dy, into_base = x.flatten(0, 1), dy.flatten(0, 1), x.clone().requires_grad_()
    linear(into_base).backward(dy)
    assert torch.allclose(A.grad, 1.5 * (rows_dy @ B).T @ rows_x, atol=1e-4)
    assert torch.allclose(B.grad, 1.5 * rows_dy.T @ (rows_x @ A.T), atol=1e-4)
    assert torch.allclose(leaf.grad, into_base.grad + 1.5 * dy @ B @ A, atol=1e-5)
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"lora_A.default", "lora_B.default"}
    layer.set_adapter(None)
    assert torch.equal(layer(x), want)


def test_a_subclass_that_changes_no_forward_is_taken_over():
    kind = type("Named", (nn.Linear,), {})
    linear = kind(*SIZES)
    assert type(LoRALinear.from_linear(linear)) is LoRALinear


def test_further_arguments_reach_the_base():
    layer = trained(LoRALinear.from_linear(base("subclass"), r=4))
    x = torch.randn(3, SIZES[0])
    assert torch.allclose(layer(x, shift=2.0), layer(x) + 1.5, atol=1e-5)


def test_the_base_is_seen_from_outside():
    linear = base("subclass")
    layer = LoRALinear.from_linear(linear, r=4)
    assert layer.weight is linear.weight and layer.bias is linear.bias
    assert (layer.in_features, layer.out_features) == SIZES
    assert set(layer.state_dict()) == {"base_layer.weight", "base_layer.bias", "lora_A.default", "lora_B.default"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_and_back(dtype):
    linear = base("subclass").to(dtype)
    layer, plain = trained(LoRALinear.from_linear(linear, r=4)), Shifted(*SIZES).to(dtype)
    weight, x = linear.weight, torch.randn(3, SIZES[0], dtype=dtype)
    want = layer(x)
    layer.merge()
    assert torch.allclose(layer(x), want, atol=2e-2 if dtype is torch.bfloat16 else 1e-5)
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(plain(x), layer(x))
    layer.unmerge()
    assert linear.weight is weight and torch.equal(layer(x), want) and layer.plain() is linear


def test_a_quantised_weight_is_merged_by_nobody_here():
    layer = trained(LoRALinear.from_linear(base("quantised"), r=4))
    assert layer.lora_A["default"].dtype == torch.float32
    with pytest.raises(ValueError, match=r"weight must be a plain .*; got .*Quantised"):
        layer.merge()
    assert not layer.merged


@pytest.mark.parametrize("case", ["subclass", "buffer", "child"])
def test_copies_and_pickles(case):
    layer = trained(LoRALinear.from_linear(base(case), r=4))
    x = torch.randn(3, SIZES[0])
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x)) and twin.base_layer is not layer.base_layer
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), layer(x))


def test_conversion_and_autocast_reach_base_and_adapters():
    layer = trained(LoRALinear.from_linear(base("subclass"), r=4))
    x = torch.randn(3, SIZES[0])
    want = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = layer(x)
    assert half.dtype == torch.bfloat16 and torch.allclose(half.float(), want, atol=0.1)
    layer.to(torch.bfloat16)
    assert torch.allclose(layer(x.bfloat16()).float(), want, atol=0.1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conv1d_is_taken_over_as_it_lies(bias, dtype):
    torch.manual_seed(0)
    conv = Conv1D(SIZES[1], SIZES[0]).to(dtype)
    nn.init.normal_(conv.bias)
    if not bias:
        conv.bias = None
    x = torch.randn(3, 5, SIZES[0], dtype=dtype)
    plain = F.linear(x, conv.weight.t(), conv.bias)
    layer = LoRALinear.from_linear(conv, r=4, lora_alpha=6)
    assert layer.weight is conv.weight and (layer.in_features, layer.out_features) == SIZES
    assert torch.equal(layer(x), plain)
    trained(layer)
    A, B, leaf = layer.lora_A["default"], layer.lora_B["default"], x.clone().requires_grad_()
    near = {"atol": 2e-5} if dtype is torch.float32 else {"atol": 0.05, "rtol": 0.02}
    assert torch.allclose(layer(leaf).float(), plain.float() + 1.5 * x.float() @ A.T @ B.T, **near)
    dy = torch.randn(3, 5, SIZES[1], dtype=dtype)
    layer(leaf).backward(dy)
    want = dy.float() @ (conv.weight.float().t() + 1.5 * B @ A)
    assert torch.allclose(leaf.grad.float(), want, **near)
    want = layer(x)
    layer.merge()
    assert torch.allclose(layer(x).float(), want.float(), **near)
    other = Conv1D(SIZES[1], SIZES[0]).to(dtype)
    other.load_state_dict(layer.state_dict(), strict=bias)
    layer.unmerge()
    assert layer.weight is conv.weight and torch.equal(layer(x), want)
    again = layer.plain()
    assert type(again) is Conv1D and again.weight is conv.weight and again.bias is conv.bias and again.nf == SIZES[1]


def test_a_transposed_weight_is_multiplied_as_it_lies(monkeypatch):
    weight, x, A = torch.randn(SIZES), torch.randn(64, SIZES[0]), torch.randn(4, SIZES[0])
    assert not request_of(x, weight.t(), A, PLAIN).aligned and request_of(x, weight.t().contiguous(), A, PLAIN).aligned
    usual = cpu.plans(request_of(x, weight.t().contiguous(), A, PLAIN))
    assert cpu.plans(request_of(x, weight.t(), A, PLAIN)) == usual and "inside" in usual
    copies, contiguous = [], torch.Tensor.contiguous
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda t: copies.append(t) or contiguous(t))
    cpu_product.product(x, weight.t())
    assert copies == []
    cpu_product.product(x, torch.randn(SIZES[1], 2 * SIZES[0])[:, ::2])
    assert len(copies) == 1


def test_conv1d_with_a_hook_stays_itself():
    conv = Conv1D(SIZES[1], SIZES[0])
    hooked(conv)
    layer = trained(LoRALinear.from_linear(conv, r=4))
    x = torch.randn(3, SIZES[0])
    A, B, weight = layer.lora_A["default"], layer.lora_B["default"], conv.weight
    want = conv(x) + 2 * x @ A.T @ B.T
    assert type(layer) is LoRALinearAround and torch.allclose(layer(x), want, atol=1e-5)
    layer.merge()
    assert torch.allclose(conv.weight, weight + 2 * (B @ A).T, atol=1e-6)


def test_a_model_of_all_kinds_is_saved_loaded_and_merged(tmp_path):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 8), Shifted(8, 8), Conv1D(8, 8), parametrizations.weight_norm(nn.Linear(8, 8)))
    model, x = apply_lora(copy.deepcopy(plain), r=2), torch.randn(3, 8)
    assert all(isinstance(layer, LoRALinear) for layer in model)
    for layer in model:
        trained(layer)
    save_adapter(model, tmp_path)
    again = load_adapter(copy.deepcopy(plain), tmp_path)
    assert torch.equal(again(x), model(x))
    with pytest.raises(ValueError, match=r"3: weight must be a plain"), merged(model):
        pass
    del model[3], plain[3]
    want = model(x)
    with merged(model):
        assert torch.allclose(model(x), want, atol=1e-5)
        plain.load_state_dict(model.state_dict())
        assert torch.equal(plain(x), model(x))
    assert torch.equal(model(x), want)


def test_a_model_without_linear_layers_is_named():
    with pytest.raises(ValueError, match="model must have linear layers beside its output head"):
        apply_lora(nn.Sequential(nn.ReLU(), nn.Embedding(4, 4)))
