"""Calls of one fused layer beside PEFT's: dtypes, dropout, gradients, shapes, compiled."""

import copy
from types import MethodType

import pytest
import torch
from peft.helpers import disable_input_dtype_casting
from peft_twins import K, assert_like_peft, layer_of, outcome, peft_layer
from torch import nn
from torch.nn.utils import parametrize

from fused_lora.peft import fuse


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


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("layout", ["sparse", "csr", "mkldnn", "nested"])
def test_layouts_that_the_op_refuses_are_peft_s_matter(calls, layout, use_dora):
    stock = peft_layer(use_dora=use_dora)
    twin = copy.deepcopy(stock)
    fuse(twin)
    x = torch.randn(3, K)
    makes = {"sparse": x.to_sparse, "csr": x.to_sparse_csr, "mkldnn": x.to_mkldnn}
    given = torch.nested.nested_tensor([x]) if layout == "nested" else makes[layout]()

    def outcome(model):
        try:
            y = model(given)
        except Exception as error:
            return str(error)
        return y.unbind()[0] if layout == "nested" else y.to_dense() if layout == "mkldnn" else y

    for autocasts in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocasts):
            want, got = outcome(stock), outcome(twin)
        assert got == want if isinstance(want, str) else torch.equal(got, want)
    assert not calls


def test_a_jagged_x_is_fused(calls):
    stock = peft_layer()
    twin = copy.deepcopy(stock)
    fuse(twin)
    x = torch.nested.nested_tensor([torch.randn(2, K), torch.randn(3, K)], layout=torch.jagged)
    torch.testing.assert_close(twin(x).values(), stock(x).values())
    assert [call["op"] for call in calls] == ["lora_linear"]


def test_a_sparse_base_weight_is_peft_s_matter(calls):
    stock, twin = peft_layer(), peft_layer()
    twin.load_state_dict(stock.state_dict())
    for model in (stock, twin):
        base = layer_of(model).base_layer
        base.weight = nn.Parameter(base.weight.detach().to_sparse_csr(), requires_grad=False)
    ways = fuse(twin)
    x = torch.randn(3, K)
    torch.testing.assert_close(twin(x), stock(x))
    assert [call["op"] for call in calls] == ["lora_around"] and "in layout torch.sparse_csr" in str(ways)


def test_a_forward_that_only_moves_x_is_no_other(calls):
    """ms-swift gives one to every A and B."""

    def keep_device_forward(self, x):
        return self.forward_origin(x.to(self.weight.device))

    keep_device_forward.__module__ = "swift.tuners.peft"
    stock = peft_layer()
    twin = copy.deepcopy(stock)
    layer = layer_of(twin)
    for module in (layer.lora_A["default"], layer.lora_B["default"]):
        module.forward_origin, module.forward = module.forward, MethodType(keep_device_forward, module)
    fuse(twin, strict=True)
    x = torch.randn(3, K)
    torch.testing.assert_close(twin(x), stock(x))
    assert [call["op"] for call in calls] == ["lora_linear"]
    module = layer.lora_A["default"]
    hook = module.register_forward_hook(lambda module, given, y: None)
    twin(x)
    hook.remove()
    plain, module.forward_origin = module.forward_origin, lambda x: 2 * plain(x)
    assert not torch.equal(twin(x), stock(x))
    assert len(calls) == 1


def test_a_parametrization_runs_as_often_as_in_peft():
    """Spectral normalization steps its power iteration each time that the weight is read."""
    reads = [0]

    class Counted(nn.Module):
        def forward(self, weight):
            reads[-1] += 1
            return 2 * weight

    stock = peft_layer()
    parametrize.register_parametrization(layer_of(stock).base_layer, "weight", Counted())
    twin = copy.deepcopy(stock)
    fuse(twin)
    x = torch.randn(3, K)
    ys = []
    for model in (stock, twin):
        reads.append(0)
        ys.append(model(x))
    torch.testing.assert_close(*ys)
    assert reads[1] == reads[2] > 0


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
        layer_of(model).lora_B["default"].register_forward_hook(lambda module, args, y: 2 * y)
    torch.testing.assert_close(compiled(x), layer_of(stock)(x))
