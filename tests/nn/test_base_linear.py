"""What a LoRALinear refuses to stand for: tensors that are no plain memory, and attachments that would be lost."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm

from fused_lora.adapters import apply_lora
from fused_lora.nn import LoRALinear


class Quantised(torch.Tensor):
    """A stand-in for the subclasses that hold packed weights."""


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
    "subclass": (weight_of(lambda w: w.as_subclass(Quantised)), r"weight must be a plain .*; got .*Quantised"),
    "jagged": (
        weight_of(lambda w: torch.nested.nested_tensor([w[:1], w], layout=torch.jagged)),
        r"weight must be a plain torch\.nn\.Parameter.*; got .*NestedTensor",
    ),
    "parametrised": (lambda linear: parametrizations.weight_norm(linear), r"got .*ParametrizedLinear"),
    "spectral norm": (lambda linear: spectral_norm(linear), r"must carry no hooks|plain torch\.nn\.Parameter"),
    "pruned": (lambda linear: prune.l1_unstructured(linear, "weight", 0.5), r"no hooks|plain torch\.nn\.Parameter"),
    "buffer": (lambda linear: linear.register_buffer("scale", torch.ones(4)), r"nothing else, .*; got scale"),
    "parameter": (lambda linear: linear.register_parameter("gain", nn.Parameter(torch.ones(4))), r"; got gain"),
    "child": (lambda linear: linear.add_module("observer", nn.Identity()), r"; got observer"),
    "hook": (lambda linear: linear.register_forward_pre_hook(lambda *_: None), r"; got _forward_pre_hooks"),
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


def test_all_linear_passes_by_what_is_no_plain_linear():
    model = nn.Sequential(nn.Linear(8, 8), parametrizations.weight_norm(nn.Linear(8, 4)))
    apply_lora(model, r=2)
    assert isinstance(model[0], LoRALinear) and not isinstance(model[1], LoRALinear)


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
