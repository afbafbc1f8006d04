"""One fused layer beside PEFT's: what is read at each call, and what sends it through PEFT's own forward."""

import copy

import pytest
import torch
from peft_twins import K, N, assert_like_peft, layer_of, outcome, peft_layer
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize

from fused_lora.peft import explain, fuse


def parts(layer):
    return dict(
        base=layer.base_layer,
        lora_A=layer.lora_A["default"],
        lora_B=layer.lora_B["default"],
        dropout=layer.lora_dropout["default"],
    )


def double(module, args, output):
    return 2 * output


def halve(module, args):
    return (args[0] / 2,)


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


def own_forward(module):
    forward = module.forward
    module.forward = lambda x: 3 * forward(x)


HOOKS = {
    "forward hook": lambda module: module.register_forward_hook(double),
    "forward pre-hook": lambda module: module.register_forward_pre_hook(halve),
    "backward hook": lambda module: module.register_full_backward_hook(lambda m, dx, dy: (2 * dx[0],)),
    "backward pre-hook": lambda module: module.register_full_backward_pre_hook(lambda m, dy: (2 * dy[0],)),
    "own forward": own_forward,
}


@pytest.mark.parametrize("part", ["base", "lora_A", "lora_B", "dropout"])
@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_set_after_a_fused_call_run(hook, part, calls):
    stock = peft_layer()
    twin = copy.deepcopy(stock)
    fuse(twin, strict=True)
    before = outcome(twin)
    assert [call["op"] for call in calls] == ["lora_linear"]
    for model in (stock, twin):
        HOOKS[hook](parts(layer_of(model))[part])
    got, want = outcome(twin), outcome(stock)
    assert_like_peft(got, want)
    assert any(not torch.allclose(got[name], before[name]) for name in before), "the hook has an effect"
    assert [call["op"] for call in calls[1:]] == (["lora_around"] if part == "base" else [])
    assert [row.way for row in explain(twin)] == ["update" if part == "base" else "peft"]


def base_trains(layer):
    layer.base_layer.weight.requires_grad_()


def base_is_parametrized(layer):
    parametrize.register_parametrization(layer.base_layer, "weight", Halved())


def base_is_a_subclass(layer):
    class Tripled(nn.Linear):
        def forward(self, x):
            return 3 * super().forward(x)

    layer.base_layer.__class__ = Tripled


def new_weight_data(layer):
    layer.base_layer.weight.data = layer.base_layer.weight.data.t().contiguous().t() + 1


def base_without_bias(layer):
    layer.base_layer.bias = None


def in_double(layer):
    layer.double()


def half_adapters(layer):
    layer.lora_A.bfloat16(), layer.lora_B.bfloat16()


def half_base(layer):
    layer.base_layer.bfloat16()


def only_A_in_half(layer):
    layer.lora_A.bfloat16()


def frozen_A(layer):
    layer.lora_A["default"].weight.requires_grad_(False)


def set_scale(layer):
    layer.set_scale("default", 3.0)


def tensor_scale(layer):
    layer.scaling["default"] = torch.tensor(2.5)


def scale_per_output(layer):
    layer.scaling["default"] = torch.arange(float(N))


def other_B(layer):
    layer.lora_B["default"] = nn.Linear(4, N, bias=True)
    for p in layer.lora_B["default"].parameters():
        nn.init.ones_(p)


def bias_in_A(layer):
    layer.lora_A["default"].bias = nn.Parameter(torch.ones(4))


CHANGES = {  # what changes between two calls: the op that serves the second
    base_trains: "lora_linear",
    base_is_parametrized: "lora_around",
    base_is_a_subclass: "lora_around",
    new_weight_data: "lora_linear",
    base_without_bias: "lora_linear",
    in_double: "lora_linear",
    half_adapters: None,
    half_base: None,
    only_A_in_half: None,
    frozen_A: "lora_linear",
    set_scale: "lora_linear",
    tensor_scale: "lora_linear",
    scale_per_output: None,
    other_B: "lora_linear",
    bias_in_A: None,
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_after_a_fused_call_count(change, calls):
    stock = peft_layer()
    twin = copy.deepcopy(stock)
    fuse(twin)
    outcome(twin), calls.clear()
    for model in (stock, twin):
        change(layer_of(model))
    dtype = torch.float64 if change is in_double else torch.float32
    got, want = outcome(twin, dtype), outcome(stock, dtype)
    if isinstance(want, str):
        assert got == want
    else:
        assert_like_peft(got, want)
    assert [call["op"] for call in calls] == ([CHANGES[change]] if CHANGES[change] else [])


def test_a_hook_on_all_modules_sees_each(calls):
    twin = peft_layer()
    fuse(twin)
    seen = []
    handle = register_module_forward_hook(lambda module, args, out: seen.append(module))
    try:
        twin(torch.randn(3, K))
    finally:
        handle.remove()
    assert layer_of(twin).lora_B["default"] in seen and not calls
