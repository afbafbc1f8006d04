"""merged(model): a whole model with an adapter folded in, and what it restores."""

import pytest
import torch
from tiny_llama import llama, randomise
from transformers import LlamaForCausalLM

from fused_lora.adapters import apply_lora, merged, set_adapter
from fused_lora.nn import LoRALinear

IDS = torch.arange(48).reshape(2, 24) * 7 % 128


def test_merged_restores_also_on_exceptions(state):
    model = llama()
    randomise(apply_lora(model, adapter_name="a"), 1)
    randomise(apply_lora(model, target_modules=["q_proj"], modules_to_save=["lm_head"], adapter_name="b"), 2)
    want = {}
    for name in ("a", "b"):
        set_adapter(model, name)
        want[name] = model(IDS).logits
    before = state(model)
    for name in ("a", "b", None):
        with pytest.raises(RuntimeError, match="inside"), merged(model, name) as same:
            assert same is model
            torch.testing.assert_close(model(IDS).logits, want[name or "b"], atol=1e-5, rtol=1e-5)
            assert any(m.merged for m in model.modules() if isinstance(m, LoRALinear))
            raise RuntimeError("inside")
        assert state(model) == before
        assert torch.equal(model(IDS).logits, want["b"])


def test_merged_model_saves_as_a_plain_one(tmp_path):
    model = randomise(apply_lora(llama(), modules_to_save=["lm_head"]))
    with merged(model):
        want = model(IDS).logits
        plain = llama()
        plain.load_state_dict(model.state_dict())
        model.save_pretrained(tmp_path)
    assert torch.equal(plain(IDS).logits, want)
    assert torch.equal(LlamaForCausalLM.from_pretrained(tmp_path).eval()(IDS).logits, want)
    assert any("lora_A" in key for key in model.state_dict())


def test_merged_undoes_all_layers_if_one_cannot_be_merged(refuses):
    model = randomise(apply_lora(llama()))
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.lora_B["default"][0, 0] = torch.inf
    with (
        refuses(model, r"model\.layers\.1\.mlp\.down_proj: the weight merged with adapter 'default' must be finite"),
        merged(model),
    ):
        pass


def test_tied_head_leaves_the_embedding_alone():
    model = llama(tie=True)
    embedding = model.model.embed_tokens.weight
    randomise(apply_lora(model, target_modules=["lm_head", "q_proj"]))
    assert model.lm_head.weight is embedding
    before, logits = embedding.detach().clone(), model(IDS).logits
    with merged(model):
        assert torch.equal(model.model.embed_tokens.weight, before) and not torch.equal(model.lm_head.weight, before)
        torch.testing.assert_close(model(IDS).logits, logits, atol=1e-5, rtol=1e-5)
    assert model.lm_head.weight is embedding and torch.equal(embedding, before)
