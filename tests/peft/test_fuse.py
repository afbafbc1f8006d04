"""fuse, unfuse, explain, patched and custom_module_mapping: which layers they take, and what they say."""

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.lora.layer import Linear as PeftLinear
from peft_twins import assert_like_peft, gpt2, peft_model, step
from tiny_llama import TOKENS, llama
from torch import nn

from fused_lora.peft import custom_module_mapping, explain, fuse, patched, unfuse
from fused_lora.peft.layer import Linear
from fused_lora.peft.tokens import TrainableTokensLayer


def ways(model):
    return [row.way for row in explain(model)]


def kinds(model):
    return {type(m) for m in model.modules() if isinstance(m, PeftLinear)}


def test_a_fused_layer_is_peft_s_by_name_and_kind():
    model = peft_model()
    fuse(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, PeftLinear) and type(layer).__name__ == "Linear"
    assert repr(layer).startswith("lora.Linear(")


def test_the_table_is_short_and_says_why():
    model = peft_model(target_modules=["q_proj", "v_proj", "embed_tokens"])
    assert set(ways(model)) == {"peft"}
    assert "fuse(model) has not been called" in str(explain(model))
    table = fuse(model)
    assert table == explain(model) and len(table) == 5
    lines = str(table).splitlines()
    assert len(lines) == 4 and lines[0] == "4 of 5 adapted layers are fused"
    assert "2  base_model.model.model.layers.*.self_attn.q_proj  fused  back end cpu" in str(table)
    (embedding,) = table.of("peft")
    assert embedding.layer.endswith("embed_tokens") and "lora.layer.Embedding" in embedding.reason


@pytest.mark.parametrize(
    "state, reason",
    [
        (lambda m: m.base_model.disable_adapter_layers(), "disabled"),
        (lambda m: m.merge_adapter(), "merged"),
        (lambda m: m.base_model.set_adapter([]), "none of its adapters is active"),
        (lambda m: m.base_model.model.model.layers[0].self_attn.q_proj.__dict__.update(forward=None), "of its own"),
    ],
)
def test_states_are_explained(state, reason):
    model = peft_model(target_modules=["q_proj"])
    fuse(model)
    state(model)
    assert reason in explain(model).of("peft")[0].reason


def test_strict_names_the_layers_and_changes_nothing():
    model = peft_model(target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(ValueError, match="(?s)no layer that stays PEFT's; got.*embed_tokens"):
        fuse(model, strict=True)
    assert kinds(model) == {PeftLinear}
    alora = peft_model(target_modules=["q_proj"], alora_invocation_tokens=[1], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="no plain LoRA .ALora"):
        fuse(alora, strict=True)


def test_models_without_lora_layers():
    with pytest.raises(ValueError, match="model must have adapters of PEFT; got a LlamaForCausalLM without"):
        fuse(llama())
    assert str(explain(llama())) == "no adapters of PEFT"
    ia3 = get_peft_model(llama(), IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    assert "ia3.layer.Linear is served by PEFT alone" in fuse(ia3).rows[0].reason


def test_layers_that_come_later_want_another_call():
    model = llama()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), model)
    fuse(model)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj", "v_proj"]), model, "second")
    assert kinds(model) == {PeftLinear, Linear}
    fuse(model)
    assert kinds(model) == {Linear}
    unfuse(model)
    assert kinds(model) == {PeftLinear}


def test_patched_fuses_what_is_built_inside():
    before = peft_model(target_modules=["q_proj"])
    with pytest.raises(KeyError), patched():
        with patched():
            pass
        inside = peft_model(target_modules=["q_proj"])
        conv1d = peft_model(gpt2)
        raise KeyError
    after = peft_model(target_modules=["q_proj"])
    assert [kinds(m) for m in (before, inside, conv1d, after)] == [{PeftLinear}, {Linear}, {Linear}, {PeftLinear}]
    assert set(ways(inside)) == set(ways(conv1d)) == {"fused"}


def test_layers_that_train_tokens():
    """They are fused with the others, and what PEFT computes otherwise stays PEFT's."""
    with patched():
        model = peft_model(lambda dtype: llama(dtype, True), target_modules=["q_proj"], trainable_token_indices=[1, 7])
    rows = [row for row in explain(model) if "token_adapter" in row.layer]
    assert [row.way for row in rows] == ["update", "update"]
    fused = step(model)
    embedding, head = (model.get_submodule(row.layer) for row in rows)
    head.base_layer.bias = nn.Parameter(torch.zeros(128), requires_grad=False)
    assert [row.reason for row in explain(model).of("peft")] == ["PEFT leaves out the bias of its base layer"]
    head.base_layer.bias = None
    with model.disable_adapter():
        assert "disabled or merged" in str(explain(model))
        assert torch.equal(model(TOKENS).logits, llama(tie=True)(TOKENS).logits)
    unfuse(model)
    assert not isinstance(embedding, TrainableTokensLayer)
    assert_like_peft(fused, step(model))


class Odd(nn.Linear):
    pass


@pytest.mark.parametrize("base, targets", [(llama, ["q_proj"]), (gpt2, ["c_attn"])])
def test_a_configuration_that_fuses(base, targets):
    config = LoraConfig(r=2, target_modules=targets)
    config._register_custom_module(custom_module_mapping())
    model = get_peft_model(base(), config)
    assert kinds(model) == {Linear} and set(ways(model)) == {"fused"}
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()


def test_the_mapping_declines_what_is_no_plain_linear():
    for module in (Odd(4, 4), nn.Embedding(4, 4)):
        for make in custom_module_mapping().values():
            assert make(module, "default", config=LoraConfig(), r=2, lora_alpha=2) is None
    config = LoraConfig(r=2, target_parameters=["mlp.gate_proj.weight"], target_modules=[])
    config._register_custom_module(custom_module_mapping())
    model = get_peft_model(llama(), config)
    assert "it is no experts class" in str(explain(model))


def test_dtypes_that_only_autocast_reconciles_are_explained():
    model = peft_model(target_modules=["q_proj"]).bfloat16()
    model.base_model.model.float()
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = p.data.bfloat16()
    fuse(model)
    assert "adapters are bfloat16 over a base weight in float32" in explain(model).of("peft")[0].reason
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=TOKENS)
