"""A LoRALinear over a quantised layer: PEFT's outputs and gradients, merging, saving, no dense weight kept."""

import copy
import warnings

import pytest
import torch

pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")

from quantised_layers import KINDS, K, N, quantised
from torch import nn

from fused_lora import apply_lora, bases, load_adapter, merged, save_adapter
from fused_lora.nn import LoRALinear

M, R, ALPHA = 40, 8, 12


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def trained(layer):
    """The layer with every adapter away from zero."""
    g = torch.Generator().manual_seed(1)
    for name in layer.lora_B:
        layer.lora_B[name].data.normal_(std=0.1, generator=g)
        layer.lora_A[name].data.normal_(std=0.1, generator=g)
    return layer


def over(kind):
    return trained(LoRALinear.from_linear(quantised(kind), r=R, lora_alpha=ALPHA))


def by_peft(kind, lora_A, lora_B):
    """PEFT's layer over the same base with this adapter."""
    from peft import LoraConfig, get_peft_model

    model = nn.Sequential(quantised(kind))
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = kind in KINDS[:3], kind == "bnb int8"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = get_peft_model(model, LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["0"])).base_model.model[0]
    layer.lora_A.default.weight.data, layer.lora_B.default.weight.data = lora_A.data.clone(), lora_B.data.clone()
    return layer


def run(layer, x):
    x = x.detach().requires_grad_()
    y = layer(x)
    y.float().square().mean().backward()
    return y.detach(), x.grad


def near(mine, theirs, rounding=0.02):
    assert mine.dtype is theirs.dtype and mine.shape == theirs.shape
    assert (mine.float() - theirs.float()).abs().max() <= rounding * theirs.float().abs().max()


def test_outputs_and_gradients_are_those_of_peft(kind):
    ours, x = over(kind), torch.randn(2, 20, K).bfloat16()
    theirs = by_peft(kind, ours.lora_A["default"], ours.lora_B["default"])
    for mine, other in zip(run(ours, x), run(theirs, x)):
        near(mine, other)
    near(ours.lora_A["default"].grad, theirs.lora_A.default.weight.grad)
    near(ours.lora_B["default"].grad, theirs.lora_B.default.weight.grad)
    with torch.no_grad():
        for rows in (1, 700):
            x = torch.randn(rows, K).bfloat16()
            near(ours.eval()(x), theirs.eval()(x), 0.04)


def test_merge_and_back(kind):
    layer, x = over(kind), torch.randn(M, K).bfloat16()
    unmerged, before = layer(x).detach(), bases.of(layer.base_layer).dense(torch.float32)
    if kind == "int4":
        with pytest.raises(ValueError, match="must be torchao's int8 or float8 to be merged"):
            layer.merge()
        assert not layer.merged and torch.equal(layer(x), unmerged)
        return
    layer.merge()
    assert layer.merged and bases.of(layer.base_layer) is not None
    near(layer(x), unmerged, 0.3 if "4" in kind else 0.05)  # quantised anew
    layer.unmerge()
    assert torch.equal(bases.of(layer.base_layer).dense(torch.float32), before)
    assert torch.equal(layer(x), unmerged)


def test_several_adapters_and_none(kind):
    layer, x = over(kind), torch.randn(M, K).bfloat16()
    layer.add_adapter("other", r=4, lora_dropout=0.5)
    trained(layer).eval()
    W = bases.of(layer.base_layer).dense(torch.float32)
    layer.set_adapter(None)
    base = x.float() @ W.t() + layer.bias.float()
    near(layer(x.requires_grad_()).float(), base)
    want = base
    for name in ("default", "other"):
        want = want + layer.scaling[name] * (x.float() @ layer.lora_A[name].t() @ layer.lora_B[name].t())
    layer.set_adapter(["default", "other"])
    near(layer(x).float(), want)
    layer.train()
    assert layer(x).isfinite().all()


class Model(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.up, self.relu, self.down = quantised(kind), nn.ReLU(), nn.Linear(N, K)

    def forward(self, x):
        return self.down(self.relu(self.up(x)).float())


def test_a_model_saves_its_adapter_and_merges_for_a_while(kind, tmp_path):
    model, x = Model(kind), torch.randn(M, K).bfloat16()
    fresh = copy.deepcopy(model)
    apply_lora(model, R, ALPHA, target_modules=["up"])
    trained(model.up)
    y = model(x).detach()
    save_adapter(model, tmp_path)
    load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(x), y)
    if kind != "int4":
        with merged(model):
            assert model.up.merged
            near(model(x), y, 0.3)
        assert torch.equal(model(x), y)
