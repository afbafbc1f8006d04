"""PEFT's layers over quantised weights: fused, equal to PEFT's own, and merged as PEFT merges."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft_twins import assert_like_peft
from torch import nn

from fused_lora.bases import of
from fused_lora.peft import explain, fuse, patched, unfuse

K, N = 64, 48


class Root(nn.Module):
    """A model of one linear layer, `proj`, as transformers marks a quantised one."""

    def __init__(self, proj, **marks):
        super().__init__()
        self.proj = proj
        for name, value in marks.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.proj(x)


def dense():
    torch.manual_seed(0)
    return nn.Linear(K, N)


def nf4():
    bnb = pytest.importorskip("bitsandbytes")
    linear = bnb.nn.Linear4bit(K, N, quant_type="nf4", compute_dtype=torch.float32)
    linear.load_state_dict(dense().state_dict())
    return Root(linear.to("cpu"), is_loaded_in_4bit=True)


def int8():
    bnb = pytest.importorskip("bitsandbytes")
    linear = bnb.nn.Linear8bitLt(K, N, has_fp16_weights=False)
    linear.load_state_dict(dense().state_dict())
    return Root(linear.to("cpu"), is_loaded_in_8bit=True)


def torchao_int8():
    torchao = pytest.importorskip("torchao.quantization")
    root = Root(dense())
    torchao.quantize_(root, torchao.Int8WeightOnlyConfig())
    return root


def adapted(root, **lora):
    config = LoraConfig(**dict(r=4, lora_alpha=6, target_modules=["proj"]) | lora)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(root, config)
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=0.2)
    return model


def outcome(model, x):
    """y, dx and the gradients of a call."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.double().square().sum().backward()
    return dict(y=y.detach(), dx=x.grad) | {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def over_a_dense_base(model):
    """A copy of the model in fp64, its base weight dequantised."""
    model = copy.deepcopy(model)
    layer, plain = model.base_model.model.proj, nn.Linear(K, N)
    plain.weight.data, plain.bias.data = of(layer.base_layer).dense(torch.float32), layer.base_layer.bias.data.float()
    layer.base_layer = plain.requires_grad_(False)
    return model.double()


@pytest.mark.parametrize("kind", [nf4, int8, torchao_int8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_like_peft(kind, dtype, calls):
    if kind is torchao_int8 and dtype is torch.bfloat16:
        pytest.skip("torchao's weight takes x in the dtype that it was made in")
    model = adapted(kind())
    assert not fuse(model).of("peft")
    stock = copy.deepcopy(model)
    unfuse(stock)
    exact = over_a_dense_base(stock)
    for rows in (1, 40):
        x = torch.randn(rows, K).to(dtype)
        assert_like_peft(outcome(model, x), outcome(stock, x), outcome(exact, x.double()), dtype)
    assert [call["op"] for call in calls] == ["lora_around"] * 2
    assert repr(model) == repr(stock)


@pytest.mark.parametrize("kind", [nf4, torchao_int8])  # PEFT's over 8 bits of bitsandbytes on a CPU has lost its scales
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_dora_like_peft(kind, p):
    """The norms are those of the dequantised weight."""
    model, stock = (adapted(kind(), use_dora=True, lora_dropout=p).train() for _ in range(2))
    assert not fuse(model).of("peft")
    for rows in (1, 40):
        x, found = torch.randn(rows, K), []
        for each in (model, stock):
            torch.manual_seed(5)
            found.append(outcome(each, x))
        assert_like_peft(*found)


@pytest.mark.parametrize("kind", [nf4, torchao_int8])
def test_patched_fuses_quantised_layers_and_the_table_names_them(kind):
    with patched():
        model = adapted(kind())
    (row,) = explain(model)
    assert row.way == "fused" and "dequantised" in row.reason
    layer = model.base_model.model.proj
    layer.base_layer.register_forward_hook(lambda *_: None)
    (row,) = explain(model)
    assert row.way == "update" and "its base layer has hooks or a forward of its own" in row.reason
    ours = type(layer)
    unfuse(model)
    assert ours.__mro__[2] is type(layer) and ours.__name__ == type(layer).__name__
