"""Merging into a quantised weight: what PEFT's merge gives, and back to the very weight; a refusal changes nothing."""

import warnings

import pytest
import torch

pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")

from quantised_layers import KINDS, K, N, quantised

from fused_lora import bases

R, SCALING = 8, 0.5
MERGEABLE = [kind for kind in KINDS if kind != "int4"]


def factors():
    g = torch.Generator().manual_seed(1)
    return torch.randn(R, K, generator=g) * K**-0.5, torch.randn(N, R, generator=g) * R**-0.5


def merged_by_peft(kind):
    """The layer as PEFT's own merge leaves it."""
    from peft import LoraConfig, get_peft_model
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, PerTensor

    model = torch.nn.Sequential(quantised(kind))
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = "fp4" in kind or "nf4" in kind, kind == "bnb int8"
    config = LoraConfig(r=R, lora_alpha=R * SCALING, target_modules=["0"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = get_peft_model(model, config).base_model.model[0]
        configs = {
            "int8": Int8WeightOnlyConfig(),
            "int8 one scale": Int8WeightOnlyConfig(granularity=PerTensor()),
            "float8": Float8WeightOnlyConfig(),
        }
        layer.get_apply_tensor_subclass = lambda: configs[kind]
        layer.lora_A.default.weight.data, layer.lora_B.default.weight.data = factors()
        layer.merge()
    return layer.base_layer


@pytest.mark.parametrize("kind", MERGEABLE)
def test_merges_as_peft_does_and_goes_back(kind):
    linear, x = quantised(kind), torch.randn(200, K).bfloat16()
    base = bases.of(linear)
    linear(x)  # moves LLM.int8's scales into the layer's state
    before, aside = base.dense(torch.float32), base.aside()
    update = SCALING * factors()[1] @ factors()[0]
    base.put(base.merged(update))
    after, theirs = base.dense(torch.float32), bases.of(merged_by_peft(kind)).dense(torch.float32)
    torch.testing.assert_close(after, theirs, rtol=0.01, atol=0)
    step = (before + update).abs().max() * (0.3 if "4" in kind else 0.05)
    assert (after - before - update).abs().max() <= step < update.abs().max()
    torch.testing.assert_close(linear(x), x @ after.bfloat16().t() + linear.bias, rtol=0.02, atol=0.02)
    base.put(aside)
    assert torch.equal(base.dense(torch.float32), before)
    torch.testing.assert_close(linear(x), x @ before.bfloat16().t() + linear.bias, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_a_refusal_changes_nothing(kind):
    linear, (A, B) = quantised(kind), factors()
    base, weight = bases.of(linear), linear.weight
    broken = B.clone()
    broken[3, 2] = float("inf")
    before = base.dense(torch.float32)
    with pytest.raises(ValueError, match=rf"the merged weight must be finite; got {K} elements that are not"):
        base.merged(broken @ A)
    if kind == "int4":
        with pytest.raises(ValueError, match="must be torchao's int8 or float8 to be merged; got IntxUnpacked"):
            base.merged(B @ A)
    assert linear.weight is weight and torch.equal(base.dense(torch.float32), before)
