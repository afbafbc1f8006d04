"""A fused PEFT model computes what stock PEFT computes, whatever its configuration: logits, gradients, names."""

import pytest
import torch
from accelerate import dispatch_model
from peft_twins import assert_like_peft, assert_trains_like_peft, fused_twin, gpt2, peft_model, step
from tiny_llama import llama

import fused_lora.peft
from fused_lora.peft import explain, fuse


def padded(dtype):
    model = llama(dtype)
    model.model.embed_tokens.padding_idx = 3
    return model


ATTENTION = ["q_proj", "v_proj"]
CONFIGS = {  # name: (base, LoraConfig, the ways that its layers go)
    "plain": (llama, {}, {"fused"}),
    "rslora": (llama, dict(use_rslora=True, r=3), {"fused"}),
    "patterns": (llama, dict(rank_pattern={"q_proj": 7}, alpha_pattern={"v_proj": 5}), {"fused"}),
    "dropout in eval": (llama, dict(lora_dropout=0.3), {"fused"}),
    "modules to save": (llama, dict(target_modules=ATTENTION, modules_to_save=["lm_head"]), {"fused"}),
    "lora_bias without a base bias": (llama, dict(lora_bias=True), {"fused"}),
    "pissa": (llama, dict(init_lora_weights="pissa"), {"fused"}),
    "olora": (llama, dict(init_lora_weights="olora"), {"fused"}),
    "dora": (llama, dict(use_dora=True), {"fused"}),
    "conv1d, dora, all biases": (gpt2, dict(use_dora=True, bias="all"), {"fused"}),
    "embedding": (llama, dict(target_modules=["embed_tokens", "q_proj"]), {"fused", "peft"}),
    "target_parameters": (
        llama,
        dict(target_modules=["q_proj"], target_parameters=["mlp.gate_proj.weight"]),
        {"fused", "peft"},
    ),
    "tokens": (lambda dtype: llama(dtype, True), dict(trainable_token_indices=[9, 0, 3]), {"fused", "update"}),
    "tokens, padding among them": (padded, dict(trainable_token_indices=[9, 0, 3]), {"fused", "update"}),
    "conv1d": (gpt2, {}, {"fused"}),
    "conv1d, all biases": (gpt2, dict(bias="all"), {"fused"}),
    "conv1d, biases of the layers": (gpt2, dict(bias="lora_only"), {"fused"}),
    "conv1d, lora_bias": (gpt2, dict(lora_bias=True), {"fused"}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_gradients_and_names(name):
    base, lora, ways = CONFIGS[name]
    stock = peft_model(base, **lora)
    twin = fused_twin(stock)
    assert {row.way for row in explain(twin)} == ways
    assert_like_peft(step(twin), step(stock))
    assert list(twin.state_dict()) == list(stock.state_dict())
    assert [n for n, _ in twin.named_parameters()] == [n for n, _ in stock.named_parameters()]
    assert repr(twin) == repr(stock)


HALF = {  # name: (model, autocast)
    "fp32 adapters": (dict(dtype=torch.bfloat16), False),
    "bf16 adapters": (dict(dtype=torch.bfloat16, autocast_adapter_dtype=False), False),
    "under autocast": ({}, True),
    "dora, fp32 adapters": (dict(dtype=torch.bfloat16, use_dora=True), False),
    "dora under autocast": (dict(use_dora=True), True),
    "conv1d, lora_bias, fp32 adapters": (dict(base=gpt2, dtype=torch.bfloat16, lora_bias=True, bias="all"), False),
}


@pytest.mark.parametrize("name", HALF)
def test_a_half_precision_base(name):
    model, autocast = HALF[name]
    stock = peft_model(**model)
    twin, exact = fused_twin(stock), step(fused_twin(stock).double())
    assert {row.way for row in explain(twin)} == {"fused"}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert_like_peft(step(twin), step(stock), exact, torch.bfloat16)


@pytest.mark.parametrize("bias", ["none", "all"])
def test_dora_with_dropout(bias):
    """Both draw one mask over an fp32 x."""
    stock = peft_model(gpt2, use_dora=True, lora_dropout=0.3, bias=bias).train()
    twin = fused_twin(stock)
    assert {row.way for row in explain(twin)} == {"fused"}
    found = []
    for model in (twin, stock):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout) and module.p != 0.3:
                module.p = 0.0  # GPT-2's own
        torch.manual_seed(3)
        found.append(step(model))
    assert_like_peft(*found)


def test_dora_follows_the_optimizer():
    stock = peft_model(use_dora=True)
    assert_trains_like_peft(fused_twin(stock), stock)


@pytest.mark.parametrize("name", ["lora_A", "lora_B", "base_layer"])
def test_dora_follows_values_that_are_put_in_place(name):
    """Averages of weights, the steps of sharpness-aware minimization: all of a tensor, past autograd's count."""
    stock = peft_model(use_dora=True).eval()
    twin, x = fused_twin(stock), torch.arange(5)[None]
    twin(x)
    for model in (stock, twin):
        for key, parameter in model.named_parameters():
            if f".{name}." in key:
                parameter.data.mul_(1.5)
    torch.testing.assert_close(twin(x).logits, stock(x).logits)


def test_forget_norms():
    """After a write that nothing shows."""
    stock = peft_model(use_dora=True).eval()
    twin, x = fused_twin(stock), torch.arange(5)[None]
    before = twin(x).logits
    for model in (stock, twin):
        for key, parameter in model.named_parameters():
            if ".lora_B." in key:
                parameter.data[1].mul_(50.0)
    assert not torch.allclose(twin(x).logits, stock(x).logits)
    fused_lora.peft.forget_norms(twin)
    torch.testing.assert_close(twin(x).logits, stock(x).logits)
    assert not torch.allclose(twin(x).logits, before)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    stock = peft_model().train()
    twin = fused_twin(stock)
    twin.enable_input_require_grads()
    twin.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert_like_peft(step(twin), step(stock))


def test_a_model_that_accelerate_has_dispatched(calls):
    """Its base layers have forwards of their own, which are called; the updates are ours."""
    names = ("embed_tokens", "layers.0", "layers.1", "norm", "rotary_emb")
    places = {f"model.{name}": "cpu" for name in names} | {"lm_head": "cpu"}
    dispatched = peft_model(lambda dtype: dispatch_model(llama(dtype), places, main_device="cpu", force_hooks=True))
    assert {row.way for row in fuse(dispatched, strict=True)} == {"update"}
    stock = peft_model()
    stock.load_state_dict(dispatched.state_dict())
    assert_like_peft(step(dispatched), step(stock))
    assert [call["op"] for call in calls] == ["lora_around"] * 14
