"""LoRAParameter against the formula, its gradients, merging, several parameters of one module."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fused_lora.nn.experts import LoRAParameter
from fused_lora.testing import assert_close

E, K, N, R = 3, 8, 12, 2


class Experts(nn.Module):
    """E linear layers in one parameter, [E, out, in] or [E, in, out], and a matrix behind them."""

    def __init__(self, is_transposed=False, dtype=torch.float32):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.is_transposed = is_transposed
        shape = (E, K, N) if is_transposed else (E, N, K)
        self.up = nn.Parameter(torch.randn(shape, generator=g).to(dtype))
        self.down = nn.Parameter(torch.randn(K, N, generator=g).to(dtype))
        self.register_buffer("shift", torch.ones(1, dtype=dtype))

    def forward(self, x, scale=1.0):
        up = self.up if self.is_transposed else self.up.mT
        return F.linear((x @ up * scale).sum(0), self.down) + self.shift


def adapted(**kind):
    """Both parameters with adapters that act."""
    layer = LoRAParameter(LoRAParameter(Experts(**kind), "up"), "down")
    g = torch.Generator().manual_seed(1)
    for holder, r in ((layer.base_layer, R), (layer, 3)):
        holder.add_adapter("default", r=r, lora_alpha=3)
        for tensor in (holder.lora_A["default"], holder.lora_B["default"]):
            tensor.data = torch.randn(tensor.shape, generator=g).to(tensor.dtype)
    return layer


def by_formula(layer, x, scale=1.0):
    """The module with every expert's weight written out, and the module it is in."""
    inner, module = layer.base_layer, copy.deepcopy(layer.module)
    tensors = [
        t.detach().double().requires_grad_() for h in (inner, layer) for t in (h.lora_A["default"], h.lora_B["default"])
    ]
    A, B, A2, B2 = tensors
    deltas = torch.stack([B[:, e::E] @ A[e * R : (e + 1) * R] for e in range(E)]) * 3 / R
    up = module.up.double() + (deltas.mT if module.is_transposed else deltas)
    down = module.down.double() + B2 @ A2
    y = F.linear((x.double() @ (up if module.is_transposed else up.mT) * scale).sum(0), down) + module.shift
    return y, tensors


@pytest.mark.parametrize("is_transposed", [False, True])
def test_forward_and_gradients_are_the_formula_s(is_transposed):
    layer, x = adapted(is_transposed=is_transposed, dtype=torch.float64), torch.randn(5, K, dtype=torch.float64)
    assert layer.base_layer.lora_A["default"].shape == (R * E, K) and layer.base_layer.lora_B["default"].shape == (
        N,
        R * E,
    )
    assert layer.lora_A["default"].shape == (3, N) and layer.lora_B["default"].shape == (K, 3)
    y, (want, tensors) = layer(x, scale=0.5), by_formula(layer, x, 0.5)
    torch.testing.assert_close(y, want)
    grads = torch.autograd.grad(y.square().sum(), [p for p in layer.parameters() if p.requires_grad])
    wanted = torch.autograd.grad(want.square().sum(), [tensors[2], tensors[3], tensors[0], tensors[1]])
    named = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    order = ["base_layer.lora_A.default", "base_layer.lora_B.default", "lora_A.default", "lora_B.default"]
    wanted = dict(zip([order[2], order[3], order[0], order[1]], wanted))
    for name, grad in zip(named, grads, strict=True):
        torch.testing.assert_close(grad, wanted[name])


def test_half_precision_rounds_as_the_composition():
    layer = adapted(dtype=torch.bfloat16)
    assert layer.lora_A["default"].dtype == torch.float32
    x = torch.randn(5, K, dtype=torch.bfloat16)
    exact, _ = by_formula(layer, x)
    module, inner = copy.deepcopy(layer.module), layer.base_layer
    A, B = inner.lora_A["default"].bfloat16(), inner.lora_B["default"].bfloat16()
    deltas = torch.stack([B[:, e::E] @ A[e * R : (e + 1) * R] for e in range(E)]) * 3 / R
    module.up = nn.Parameter(module.up + deltas)
    module.down = nn.Parameter(module.down + layer.lora_B["default"].bfloat16() @ layer.lora_A["default"].bfloat16())
    assert_close({"y": layer(x)}, {"y": module(x)}, {"y": exact})


def test_merged_is_the_adapted_module_and_unmerge_restores_it():
    layer, x = adapted(), torch.randn(5, K)
    want, before = layer(x), {name: t.clone() for name, t in layer.state_dict().items()}
    inner = layer.base_layer
    layer.merge(), inner.merge()
    assert layer.merged and set(layer.state_dict()) == {"up", "down", "shift"}
    torch.testing.assert_close(layer(x), want)
    with pytest.raises(ValueError, match="not merged yet; got 'default'"):
        layer.merge()
    layer.unmerge(), inner.unmerge()
    assert {name: t.tolist() for name, t in layer.state_dict().items()} == {n: t.tolist() for n, t in before.items()}
    layer.lora_B["default"].data.fill_(float("inf"))
    with pytest.raises(ValueError, match="must be finite"):
        layer.merge()
    assert not layer.merged


def test_without_an_adapter_it_is_the_module():
    layer, x, plain = adapted(), torch.randn(5, K), Experts()
    layer.set_adapter(None), layer.base_layer.set_adapter(None)
    assert torch.equal(layer(x), plain(x)) and layer.is_transposed is False and torch.equal(layer.shift, plain.shift)
    with pytest.raises(AttributeError, match="nothing"):
        _ = layer.nothing


def test_it_compiles_without_graph_breaks():
    layer, x = adapted(), torch.randn(5, K)
    want, got = layer(x, scale=0.5), torch.compile(layer, backend="aot_eager", fullgraph=True)(x, scale=0.5)
    torch.testing.assert_close(got, want)
    trained = [p for p in layer.parameters() if p.requires_grad]
    grads, wanted = (torch.autograd.grad(y.square().sum(), trained) for y in (got, want))
    torch.testing.assert_close(grads, wanted)


def test_copies_and_checkpoints_are_whole():
    layer, x = adapted(), torch.randn(5, K)
    fresh = LoRAParameter(LoRAParameter(Experts(), "up"), "down")
    fresh.base_layer.add_adapter("default", r=R, lora_alpha=3), fresh.add_adapter("default", r=3, lora_alpha=3)
    fresh.load_state_dict(layer.state_dict())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh):
        assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: LoRAParameter(nn.LayerNorm(4), "weight"), r"weight must be .* two or three dimensions; got .* \[4\]"),
        (lambda: LoRAParameter(Experts(), "shift"), r"shift must be a plain floating point Parameter"),
        (lambda: adapted().add_adapter("other", lora_dropout=0.1), r"lora_dropout must be 0 with target_parameters"),
        (lambda: adapted().add_adapter("default"), r"adapter_name must be new to the layer"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()
