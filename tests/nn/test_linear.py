"""LoRALinear: a stand-in for nn.Linear, adapters by name, and every argument error."""

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from fused_lora.nn import LoRALinear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def trained(layer: LoRALinear, name: str = "default", seed: int = 0) -> LoRALinear:
    """The layer with an adapter whose B is not zero any more."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for t in (layer.lora_A[name], layer.lora_B[name]):
            t.copy_(torch.randn(t.shape, generator=g) * 0.2)
    return layer


def formula(layer: LoRALinear, x: torch.Tensor, name: str = "default") -> torch.Tensor:
    """The layer's contract in fp64, from its attributes."""
    W, A, B = (t.detach().double() for t in (layer.weight, layer.lora_A[name], layer.lora_B[name]))
    bias = None if layer.bias is None else layer.bias.double()
    return F.linear(x.double(), W, bias) + layer.lora_alpha[name] / layer.r[name] * (x.double() @ A.T @ B.T)


def bits(t: torch.Tensor) -> bytes:
    return t.detach().contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("bias", [True, False])
def test_stands_for_a_linear(bias):
    linear = nn.Linear(24, 40, bias=bias).eval()
    layer = LoRALinear.from_linear(linear, r=3)
    assert layer.weight is linear.weight and layer.bias is linear.bias
    assert (layer.in_features, layer.out_features, layer.training) == (24, 40, False)
    assert not layer.weight.requires_grad and (layer.bias is None or not layer.bias.requires_grad)
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"lora_A.default", "lora_B.default"}
    assert layer.lora_A["default"].shape == (3, 24) and layer.lora_B["default"].shape == (40, 3)


def test_constructor_matches_linears():
    torch.manual_seed(0)
    linear = nn.Linear(24, 40, dtype=torch.bfloat16)
    torch.manual_seed(0)
    layer = LoRALinear(24, 40, r=4, dtype=torch.bfloat16)
    assert torch.equal(layer.weight, linear.weight) and torch.equal(layer.bias, linear.bias)
    assert LoRALinear(24, 40, bias=False, device="meta").lora_A["default"].device.type == "meta"


@pytest.mark.parametrize(
    "dtype, adapter_dtype, expected",
    [
        (torch.bfloat16, None, torch.float32),
        (torch.float16, None, torch.float32),
        (torch.float32, None, torch.float32),
        (torch.float64, None, torch.float64),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    ],
)
def test_adapter_dtype(dtype, adapter_dtype, expected):
    layer = LoRALinear(16, 8, dtype=dtype, adapter_dtype=adapter_dtype)
    assert layer.weight.dtype == dtype and layer.lora_A["default"].dtype == layer.lora_B["default"].dtype == expected


def test_initialisation():
    layer = LoRALinear(64, 32, r=16)
    A = layer.lora_A["default"]
    assert A.abs().max() <= 1 / math.sqrt(64) and A.std() > 0.5 / math.sqrt(64)  # U(-a, a) has deviation 0.58 a
    assert torch.count_nonzero(layer.lora_B["default"]) == 0
    trained(layer).reset_lora_parameters("default")
    assert torch.count_nonzero(layer.lora_B["default"]) == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_a_fresh_adapter_changes_no_bit(dtype, bias):
    linear = nn.Linear(40, 24, bias=bias, dtype=dtype)
    x = torch.randn(3, 9, 40, dtype=dtype)
    want = linear(x)
    layer = LoRALinear.from_linear(linear, r=4)
    assert torch.equal(layer(x), want)


def test_forward_and_gradients_follow_the_formula():
    layer = trained(LoRALinear(40, 24, r=4, lora_alpha=6, dtype=torch.float64))
    x = torch.randn(3, 5, 40, dtype=torch.float64, requires_grad=True)
    assert torch.allclose(layer(x), formula(layer, x), rtol=1e-12, atol=1e-12)
    dy = torch.randn(3, 5, 24, dtype=torch.float64)
    layer(x).backward(dy)
    A, B, s = layer.lora_A["default"], layer.lora_B["default"], 6 / 4
    rows_x, rows_dy = x.detach().flatten(0, 1), dy.flatten(0, 1)
    assert torch.allclose(A.grad, s * (rows_dy @ B).T @ rows_x, rtol=1e-12, atol=1e-12)
    assert torch.allclose(B.grad, s * rows_dy.T @ (rows_x @ A.T), rtol=1e-12, atol=1e-12)
    assert torch.allclose(x.grad, dy @ (layer.weight + s * B @ A), rtol=1e-12, atol=1e-12)
    assert layer.weight.grad is None


def test_rslora_scaling():
    assert LoRALinear(8, 8, r=16, lora_alpha=8).scaling["default"] == 0.5
    assert LoRALinear(8, 8, r=16, lora_alpha=8, use_rslora=True).scaling["default"] == 2.0


def test_dropout_acts_in_training_only():
    layer = trained(LoRALinear(64, 32, r=4, lora_dropout=0.5))
    x = torch.randn(16, 64)
    plain = formula(layer, x).float()
    assert (layer(x) - plain).abs().max() > 1e-2
    assert torch.allclose(layer.eval()(x), plain, atol=1e-5)


def test_adapters_by_name():
    layer = trained(LoRALinear(16, 8, r=2))
    layer.add_adapter("other", r=5, lora_alpha=10, lora_dropout=0.1)
    trained(layer, "other", seed=1).eval()
    x = torch.randn(4, 16)
    assert layer.active_adapter == "default" and not layer.lora_A["other"].requires_grad
    for name in ("other", "default"):
        layer.set_adapter(name)
        assert torch.allclose(layer(x).double(), formula(layer, x, name), atol=1e-5)
        assert {n for n, p in layer.named_parameters() if p.requires_grad} == {f"lora_A.{name}", f"lora_B.{name}"}
    layer.set_adapter(None)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias)) and not any(
        p.requires_grad for p in layer.parameters()
    )
    layer.delete_adapter("other")
    assert list(layer.lora_A) == list(layer.r) == list(layer.scaling) == ["default"]
    layer.set_adapter("default")
    layer.delete_adapter("default")
    assert layer.active_adapter is None and len(list(layer.parameters())) == 2


@pytest.mark.parametrize("merged", [False, True])
def test_deepcopy_and_pickle(merged):
    layer = trained(LoRALinear(16, 8, r=2))
    x, before = torch.randn(4, 16), bits(layer.weight)
    if merged:
        layer.merge()
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(x), layer(x)) and twin.merged == merged
        if merged:
            twin.unmerge()
        assert bits(twin.weight) == before
        with torch.no_grad():
            twin.weight.add_(1)
            twin.lora_B["default"].add_(1)
    if merged:
        layer.unmerge()
    assert bits(layer.weight) == before


def test_state_dict_round_trip():
    layer = trained(LoRALinear(16, 8, r=2))
    layer.add_adapter("other")
    other = LoRALinear(16, 8, r=2)
    other.add_adapter("other")
    assert set(layer.state_dict()) == {
        "weight",
        "bias",
        "lora_A.default",
        "lora_A.other",
        "lora_B.default",
        "lora_B.other",
    }
    other.load_state_dict(layer.state_dict())
    x = torch.randn(4, 16)
    assert torch.equal(layer(x), other(x))


def test_compiles_as_one_graph():
    layer = trained(LoRALinear(16, 8, r=2))
    twin = copy.deepcopy(layer)
    x, dy = torch.randn(4, 16, requires_grad=True), torch.randn(4, 8)
    x_twin = x.detach().clone().requires_grad_()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y, want = compiled(x), twin(x_twin)
    y.backward(dy)
    want.backward(dy)
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(x.grad, x_twin.grad)
    for name in ("lora_A", "lora_B"):
        torch.testing.assert_close(getattr(layer, name)["default"].grad, getattr(twin, name)["default"].grad)
    with torch.no_grad():
        layer.lora_B["default"].zero_()
    layer.merge()
    torch.testing.assert_close(
        compiled(x), F.linear(x, layer.weight, layer.bias)
    )  # the guard on the merged state recompiles
    torch.compiler.reset()


def test_autocast_as_linear():
    layer = trained(LoRALinear(16, 8, r=2))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(4, 16)).dtype == torch.bfloat16


def test_repr_tells_the_state():
    layer = LoRALinear(16, 8, r=2, use_rslora=True)
    layer.add_adapter("other", r=3, lora_alpha=6, lora_dropout=0.1)
    text = layer.extra_repr()
    for part in (
        "in_features=16",
        "out_features=8",
        "default(r=2",
        "use_rslora=True",
        "other(r=3, lora_alpha=6, lora_dropout=0.1)",
        "active_adapter='default'",
        "merged=False",
    ):
        assert part in text


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"r": 0}, r"r must be an int >= 1; got 0"),
        ({"r": 2.0}, r"r must be an int >= 1; got 2.0"),
        ({"r": True}, r"r must be an int >= 1; got True"),
        ({"lora_dropout": 1.0}, r"lora_dropout must be a number in \[0, 1\); got 1.0"),
        ({"lora_dropout": -0.1}, r"lora_dropout must be a number in \[0, 1\); got -0.1"),
        ({"lora_alpha": math.nan}, r"lora_alpha must be a finite number; got nan"),
        ({"lora_alpha": "16"}, r"lora_alpha must be a finite number; got '16'"),
        ({"in_features": 0}, r"in_features must be an int >= 1; got 0"),
        ({"out_features": -1}, r"out_features must be an int >= 1; got -1"),
        ({"adapter_name": "a.b"}, r"adapter_name must be .* without dots .*; got 'a.b'"),
        ({"adapter_name": ""}, r"adapter_name must be .*; got ''"),
        ({"adapter_name": "keys"}, r"adapter_name must be .* no attribute .*; got 'keys'"),
        ({"adapter_name": "training"}, r"adapter_name must be .* no attribute .*; got 'training'"),
        ({"adapter_name": None}, r"adapter_name must be .*; got None"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        LoRALinear(**{"in_features": 4, "out_features": 4, **arguments})


def test_unknown_adapter_names_the_nearest():
    layer = LoRALinear(4, 4, adapter_name="german")
    layer.add_adapter("french")
    for call in (layer.set_adapter, layer.delete_adapter, layer.reset_lora_parameters):
        with pytest.raises(
            ValueError, match=r"must be one of \['french', 'german'\]; got 'germn' \(did you mean 'german'\?\)"
        ):
            call("germn")
    with pytest.raises(ValueError, match=r"must be new to the layer.*got 'german'"):
        layer.add_adapter("german")


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, "float32", torch.float8_e4m3fn])
def test_a_dtype_that_no_adapter_has_is_refused_first(dtype):
    message = "adapter_dtype must be one of torch.float32, torch.bfloat16, torch.float16, torch.float64, or None; got"
    layer, linear = LoRALinear(4, 4), nn.Linear(4, 4)
    for call in (
        lambda: layer.add_adapter("b", adapter_dtype=dtype),
        lambda: LoRALinear.from_linear(linear, adapter_dtype=dtype),
        lambda: LoRALinear(4, 4, adapter_dtype=dtype),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert list(layer.lora_A) == ["default"] and linear.weight.requires_grad
    layer.add_adapter("b", adapter_dtype=torch.bfloat16)


def test_what_is_no_linear_layer_is_refused():
    bilinear = nn.Bilinear(4, 4, 4)
    with pytest.raises(ValueError, match="Bilinear"):
        LoRALinear.from_linear(bilinear)
    assert all(p.requires_grad for p in bilinear.parameters())


def test_a_layer_with_adapters_is_no_base():
    layer = LoRALinear(4, 4)
    with pytest.raises(ValueError, match=r"without adapters, add_adapter .* got a LoRALinear with \['default'\]"):
        LoRALinear.from_linear(layer)
    assert layer.lora_A["default"].requires_grad


def test_setting_p_of_every_dropout_sets_that_of_the_adapters():
    layer = LoRALinear(8, 8, lora_dropout=0.5)
    layer.add_adapter("second", lora_dropout=0.25)
    twin = copy.deepcopy(layer)
    for module in twin.modules():
        if isinstance(module, nn.Dropout):
            assert module.p == 0.5
            module.p = 0
    assert twin.lora_dropout == {"default": 0, "second": 0} and layer.lora_dropout == {"default": 0.5, "second": 0.25}


@pytest.mark.parametrize("kind", [{}, {"use_dora": True}])
def test_the_mode_of_the_dropout_decides(kind):
    """Monte-Carlo dropout: nn.Dropout in training mode inside a model in evaluation mode, and the other way round."""
    layer = trained(LoRALinear(24, 20, r=4, lora_dropout=0.5, **kind)).eval()
    x = torch.randn(3, 24)
    (dropout,) = (m for m in layer.modules() if isinstance(m, nn.Dropout))
    assert torch.equal(layer(x), layer(x))
    dropout.train()
    assert not torch.equal(layer(x), layer(x))
    layer.train()
    dropout.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("way", ["pruned", "weight_norm"])
def test_factors_that_a_hook_computes(way):
    """PyTorch computes them before a module's call, which the layer's factors do not have."""
    layer = trained(LoRALinear(24, 20, r=4))
    if way == "pruned":
        prune.l1_unstructured(layer.lora_A, "default", amount=0.5)
    else:
        nn.utils.weight_norm(layer.lora_A, "default")
    x = torch.randn(3, 24)
    changed = layer.lora_A.default_orig if way == "pruned" else layer.lora_A.default_g
    with torch.no_grad():
        before = layer(x) - F.linear(x, layer.weight, layer.bias)
        changed.mul_(10)
        torch.testing.assert_close(layer(x) - F.linear(x, layer.weight, layer.bias), 10 * before, rtol=1e-4, atol=1e-5)
    for _ in range(2):
        layer(x).sum().backward()
    assert changed.grad is not None
