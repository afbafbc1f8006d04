"""What a LoRALinear refuses to stand for: weights that nn.Linear itself cannot multiply."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations

from fused_lora.adapters import apply_lora, merge_and_unload
from fused_lora.nn import LoRALinear


def weight_of(change):
    def make(linear):
        linear.weight = nn.Parameter(change(linear.weight.detach()), requires_grad=False)

    return make


WEIGHTS = {
    "fp8": (weight_of(lambda w: w.to(torch.float8_e4m3fn)), r"weight must be bfloat16, .*; got torch\.float8_e4m3fn"),
    "int8": (weight_of(lambda w: w.to(torch.int8)), r"weight must be bfloat16, .*; got torch\.int8"),
    "complex": (weight_of(lambda w: w.to(torch.complex64)), r"weight must be bfloat16, .*; got torch\.complex64"),
    "packed": (
        weight_of(lambda w: w.reshape(-1)),
        r"weight must have shape \[4, 8\], whole and unpacked, .*got \[32\]",
    ),
    "partitioned": (weight_of(lambda w: w.new_empty(0)), r"weight must have shape \[4, 8\], .*got \[0\]"),
    "sparse": (weight_of(lambda w: w.to_sparse()), r"weight must be dense and strided; got torch\.sparse_coo"),
    "jagged": (
        weight_of(lambda w: torch.nested.nested_tensor([w[:1], w], layout=torch.jagged)),
        r"weight must be a plain torch\.nn\.Parameter.*; got .*NestedTensor",
    ),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_refused_by_name_with_the_model_unchanged(case):
    change, message = WEIGHTS[case]
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    change(model[1])
    before = [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]
    with pytest.raises(ValueError, match=rf"target 1: .*({message})"):
        apply_lora(model, r=2, target_modules=["0", "1"])
    with pytest.raises(ValueError, match=message):
        LoRALinear.from_linear(model[1])
    assert [(name, id(p), p.requires_grad) for name, p in model.named_parameters()] == before
    assert type(model[0]) is nn.Linear and not isinstance(model[1], LoRALinear)


def test_an_adapter_is_not_added_over_weights_that_went_elsewhere():
    layer = LoRALinear(8, 4, r=2)
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match=r"weight must be bfloat16"):
        layer.add_adapter("second")
    assert list(layer.lora_A) == ["default"]


@pytest.mark.parametrize("name", ["weight", "lora_A", "lora_B"])
def test_a_merge_without_values_is_refused(name):
    layer = LoRALinear(8, 4, r=2)
    if name == "weight":
        layer.weight = nn.Parameter(layer.weight.to("meta"), requires_grad=False)
    else:
        getattr(layer, name).to("meta")
    with pytest.raises(ValueError, match=rf"{name} must be a plain Parameter with values to be merged; got one on the"):
        layer.merge()
    assert not layer.merged


def test_a_weight_that_is_computed_is_named_so():
    model = nn.ModuleDict({"up": parametrizations.weight_norm(nn.Linear(8, 4))})
    with pytest.raises(ValueError, match="use_dora needs a weight that .* whose weight is computed .by a"):
        apply_lora(model, r=2, target_modules=["up"], use_dora=True)
    apply_lora(model, r=2, target_modules=["up"])
    with pytest.raises(ValueError, match="weight must be a plain Parameter .* got one that is computed .by a parametr"):
        merge_and_unload(model)


def test_the_projection_that_multihead_attention_never_calls_is_refused():
    with pytest.raises(ValueError, match=r"target out_proj: .*MultiheadAttention reads the weight of its projection"):
        apply_lora(nn.MultiheadAttention(8, 2), r=2, target_modules=["out_proj"])


@pytest.mark.parametrize("variant", [{}, {"use_dora": True}, {"allora_eta": 2.0}], ids=str)
def test_a_layer_without_values_is_a_linear_layer(variant):
    """FakeTensorMode, in which nn.Parameter makes another type; the layer is the one that stands for nn.Linear."""
    with FakeTensorMode():
        layer, x = LoRALinear.from_linear(nn.Linear(7, 5), r=2, **variant), torch.randn(3, 7)
        layer.add_adapter("second", r=3)
        layer(x).sum().backward()
        assert type(layer) is LoRALinear and layer.lora_B["default"].grad.shape == (5, 2)
        with pytest.raises(ValueError, match="weight must be a plain Parameter with values to be merged; got .*Fake"):
            layer.merge()


def test_a_called_layer_without_values_can_be_dora():
    with FakeTensorMode():
        linear = nn.Linear(7, 5)
        linear.register_forward_hook(lambda *args: None)
        layer = LoRALinear.from_linear(linear, r=2, use_dora=True)
        layer(torch.randn(3, 7)).sum().backward()
        assert layer.lora_magnitude_vector["default"].grad.shape == (5,)
