"""One fused layer beside PEFT's: what is read at each call, and what sends it through PEFT's own forward."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from peft_twins import assert_like_peft
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize

from fused_lora.peft import explain, fuse

K, N = 32, 24


class Root(nn.Module):
    """A model of one linear layer, `proj`."""

    def __init__(self, proj=None, bias=True):
        super().__init__()
        self.proj = nn.Linear(K, N, bias) if proj is None else proj

    def forward(self, x):
        return self.proj(x)


def peft_layer(root=None, **lora):
    """The root with an adapter that looks trained."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(**dict(r=4, lora_alpha=6, target_modules=["proj"]) | lora)
        model = get_peft_model(Root() if root is None else root, config)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=g) * 0.2)
    return model


def layer_of(model):
    return model.base_model.model.proj


def outcome(model, dtype=torch.float32):
    """y, dx and every gradient of a call, or the error's type and words."""
    x = torch.randn(2, 5, K, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
    model.zero_grad()
    try:
        y = model(x)
    except RuntimeError as error:
        return str(error)
    if y.requires_grad:
        y.float().square().sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach()} | ({} if x.grad is None else {"dx": x.grad}) | grads


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


def test_an_x_of_another_dtype_is_peft_s_matter(calls):
    stock = peft_layer()
    twin = copy.deepcopy(stock)
    fuse(twin)
    assert outcome(twin, torch.bfloat16) == outcome(stock, torch.bfloat16) != {}
    with torch.autocast("cpu", torch.bfloat16):
        twin(torch.randn(3, K, dtype=torch.float16))
    assert [call["op"] for call in calls] == ["lora_linear"]


def test_without_peft_s_casting(calls):
    twin = peft_layer()
    fuse(twin)
    with disable_input_dtype_casting(twin):
        twin(torch.randn(3, K))
    assert not calls


def test_dropout_is_inside_while_its_module_trains(calls):
    twin = peft_layer(lora_dropout=0.4).train()
    fuse(twin, strict=True)
    x = torch.ones(4000, K)
    with torch.no_grad():
        trained = twin(x).mean(0)
        layer_of(twin).lora_dropout.eval()
        evaluated = twin(x)[0]
        layer_of(twin).lora_dropout["default"].p = 1.0
        twin.train()
        nothing = twin(x)[0]
        layer = layer_of(twin)
        torch.testing.assert_close(nothing, layer.base_layer(x)[0])
        # the mean of 4000 draws: the deviation of one is sqrt(p / (1 - p)) |B A|, and 6 of the mean's are allowed
        BA = layer.get_delta_weight("default").square().sum(1).sqrt()
    assert [call["dropout_p"] for call in calls] == [0.4, 0.0]
    assert ((trained - evaluated).abs() <= 6 * (0.4 / 0.6) ** 0.5 * BA / 4000**0.5).all()
    assert not torch.equal(trained, evaluated)


def test_fsdp1_s_attributes_come_before_the_parameters(calls):
    """In a forward of FSDP1 the gathered tensors are attributes; the parameters hold this process's part."""
    stock = peft_layer()
    twin = copy.deepcopy(stock)
    fuse(twin)
    for model in (stock, twin):
        layer = layer_of(model)
        for module in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]):
            module.__dict__["weight"] = module.weight.detach() * 2
    x = torch.randn(3, K)
    torch.testing.assert_close(twin(x), stock(x))
    assert [call["op"] for call in calls] == ["lora_linear"]


def test_gradients_of_a_trained_base_bias(calls):
    stock = peft_layer(bias="lora_only")
    twin = copy.deepcopy(stock)
    fuse(twin)
    got = outcome(twin)
    assert_like_peft(got, outcome(stock))
    assert len(got) == 5 and [call["op"] for call in calls] == ["lora_linear"]


@pytest.mark.parametrize("shape", [(K,), (0, K), (2, 0, K), (1, 2, 3, K)])
def test_leading_dimensions(shape):
    stock = peft_layer()
    twin = copy.deepcopy(stock)
    fuse(twin)
    x = torch.randn(shape)
    torch.testing.assert_close(twin(x), stock(x))


def test_compiled_without_graph_breaks():
    """One graph, which follows a change of what it was made from."""
    stock = peft_layer()
    twin = copy.deepcopy(stock)
    fuse(twin)
    torch._dynamo.reset()
    compiled = torch.compile(layer_of(twin), backend="eager", fullgraph=True)
    x = torch.randn(3, K)
    torch.testing.assert_close(compiled(x), layer_of(stock)(x))
    for model in (stock, twin):
        layer_of(model).set_scale("default", 3.0)
        layer_of(model).lora_B["default"].register_forward_hook(double)
    torch.testing.assert_close(compiled(x), layer_of(stock)(x))
