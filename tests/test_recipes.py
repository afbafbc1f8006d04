"""The presets of papers."""

import pytest
import torch
from tiny_llama import llama

from fused_lora import apply_lora
from fused_lora.recipes import biderman, lora_capacity, lora_without_regret, recommended_lr


def test_learning_rates():
    assert recommended_lr(2000, "llama") == pytest.approx(5e-4) == pytest.approx(recommended_lr(2000, "qwen"))
    assert recommended_lr(4096, "llama") == pytest.approx(5e-4 * (2000 / 4096) ** 0.781)
    assert recommended_lr(4096, "qwen") == pytest.approx(5e-4 * (2000 / 4096) ** 0.0775)
    assert recommended_lr(4096, "gemma", full_ft_lr=2e-5) == pytest.approx(2e-4)
    assert recommended_lr(4096, "gemma", full_ft_lr=2e-5, steps=99) == pytest.approx(3e-4)
    assert recommended_lr(4096, "gemma", full_ft_lr=2e-5, steps=100) == pytest.approx(2e-4)
    with pytest.raises(ValueError, match=r"family must be one of \['llama', 'qwen'\]; got 'lama' \(did you mean"):
        recommended_lr(4096, "lama")
    with pytest.raises(ValueError, match="hidden_size must be a finite number > 0; got 0"):
        recommended_lr(0, "llama")


def test_capacity():
    assert lora_capacity(3_000_000, episodes=320_000) == pytest.approx(18.75)
    assert lora_capacity(100, tokens=400) == 0.5
    with pytest.raises(ValueError, match="with data"):
        lora_capacity(5)


def test_recipes_make_adapters_that_train():
    for recipe, alpha in ((lora_without_regret(llama(), r=8), 32), (biderman(llama(), r=8), 16)):
        model = apply_lora(llama(), recipe.config)
        layer = model.model.layers[0].mlp.up_proj
        assert layer.r["default"] == 8 and layer.lora_alpha["default"] == alpha
        assert model.model.layers[1].self_attn.o_proj.lora_A["default"].requires_grad and recipe.lr > 0
    assert lora_without_regret(llama(), r=8).lr == recommended_lr(64, "llama")
    assert biderman(llama()).config.lora_alpha == 512 and biderman(llama()).lr == 1e-4
    assert biderman(llama(), full_ft_lr=1e-5).lr == pytest.approx(1e-4)
    with pytest.raises(ValueError, match="model must be a model of transformers"):
        biderman(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("word", ["num_experts_per_tok", "moe_topk", "experts_per_token", "top_k_experts"])
def test_models_name_the_experts_of_a_token_in_their_own_words(word):
    from transformers import PretrainedConfig

    model = torch.nn.Module()
    model.config = PretrainedConfig(model_type="mixture", hidden_size=8, **{word: 4})
    model.mlp = torch.nn.Module()
    model.mlp.experts = torch.nn.Module()
    model.mlp.experts.down_proj = torch.nn.Parameter(torch.zeros(4, 8, 8))
    assert lora_without_regret(model, r=32).config.rank_pattern == {r".*experts\.down_proj": 8}


def test_experts_share_the_rank():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    shape = dict(hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=1, vocab_size=40)
    shape |= dict(num_attention_heads=2, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, head_dim=16)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape))
    recipe = lora_without_regret(model, r=8)
    apply_lora(model, recipe.config)
    ranks = {name: p.shape for name, p in model.named_parameters() if "lora_A" in name}
    experts = {name: shape for name, shape in ranks.items() if "experts" in name}
    assert len(experts) == 2 and all(shape[0] == 4 * 4 for shape in experts.values()), ranks
    assert all(shape[0] == 8 for name, shape in ranks.items() if name not in experts)
    alphas = {m.lora_alpha["default"] for m in model.modules() if hasattr(m, "lora_alpha")}
    assert alphas == {32}
    assert recipe.lr == recommended_lr(32, "qwen")
