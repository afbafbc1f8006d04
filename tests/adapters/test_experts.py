"""The rank of a mixture's experts, factors that they share, and experts that are linear layers of their own."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import nn

from fused_lora import apply_lora, expert_rank_pattern, load_adapter, save_adapter, share_outer
from fused_lora.nn.experts import LoRAParameter

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
TOKENS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(1))


def mixture():
    torch.manual_seed(0)
    config = dict(vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    config |= dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8, num_key_value_heads=2)
    return hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**config, decoder_sparse_step=2)).eval()  # the first MLP is dense


class Separate(nn.Module):
    """A mixture whose experts are linear layers, of which the router takes one for a token, the last one never."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(8, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(4))

    def forward(self, x):
        chosen, y = self.gate(x).argmax(-1), torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            rows = (chosen == e).nonzero()[:, 0]
            if rows.numel():
                y = y.index_add(0, rows, expert(x[rows]))
        return y


def fill(model):
    g = torch.Generator().manual_seed(3)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = torch.randn(p.shape, generator=g) / 8
    return model


def layers(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRAParameter)}


def test_the_rank_is_divided_among_the_experts_of_a_token():
    model = mixture()
    pattern = expert_rank_pattern(model, 8)
    assert pattern == {r"experts\.gate_up_proj": 4, r"experts\.down_proj": 4}
    apply_lora(model, r=8, target_modules=["q_proj", "mlp.up_proj"], target_parameters=EXPERTS, rank_pattern=pattern)
    assert {layer.r["default"] for layer in layers(model).values()} == {4}
    attention, dense = model.model.layers[0].self_attn.q_proj, model.model.layers[0].mlp.up_proj
    assert attention.r["default"] == dense.r["default"] == 8 and len(layers(model)) == 2
    assert expert_rank_pattern(model, 8, n_active=8)[r"experts\.down_proj"] == 1  # of a model with adapters, too
    separate = Separate()
    apply_lora(separate, r=6, rank_pattern=expert_rank_pattern(separate, 6, n_active=3))
    assert separate.experts[3][2].r["default"] == 2 and separate.gate.r["default"] == 6


@pytest.mark.parametrize(
    "model, r, n_active, message",
    [
        (mixture(), 1, None, "r must be an int of at least n_active, .* got 1 and 2"),
        (mixture(), 8, 0, "r must be an int of at least n_active, .* got 8 and 0"),
        (Separate(), 8, None, "n_active must be given for a model whose configuration has none of"),
        (nn.Sequential(nn.Linear(4, 4)), 8, 2, "model must have modules or parameters in one called experts"),
    ],
)
def test_ranks_that_cannot_be_divided(model, r, n_active, message):
    with pytest.raises(ValueError, match=message):
        expert_rank_pattern(model, r, n_active)


def test_shared_factors_train_as_the_sum_of_the_experts_and_are_saved_for_each(tmp_path):
    model = apply_lora(mixture(), r=3, target_modules=["q_proj"], target_parameters=EXPERTS)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    fill(share_outer(model))
    down, up = layers(model).values()
    assert up.lora_A["default"].shape == (3, 32) and up.lora_B["default"].shape == (32, 3 * 4)
    assert down.lora_A["default"].shape == (3 * 4, 16) and down.lora_B["default"].shape == (32, 3)
    shared = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count - shared == 3 * 3 * 32 + 3 * 3 * 32
    save_adapter(model, tmp_path)
    apart = load_adapter(mixture(), tmp_path)
    want, got = apart(input_ids=TOKENS, labels=TOKENS), model(input_ids=TOKENS, labels=TOKENS)
    torch.testing.assert_close(got.logits, want.logits)
    want.loss.backward(), got.loss.backward()
    theirs = list(layers(apart).values())
    torch.testing.assert_close(up.lora_A["default"].grad, theirs[1].lora_A["default"].grad.view(4, 3, 32).sum(0))
    torch.testing.assert_close(down.lora_B["default"].grad, theirs[0].lora_B["default"].grad.view(32, 3, 4).sum(2))
    torch.testing.assert_close(up.lora_B["default"].grad, theirs[1].lora_B["default"].grad)
    with pytest.raises(ValueError, match="exists with factors that the experts of .* share"):
        load_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="adapter 'default' must be saved by save_adapter"):
        model.save_pretrained(tmp_path / "folder")
    up.merge()
    torch.testing.assert_close(model(TOKENS).logits, want.logits)
    up.unmerge()
    again = share_outer(apart)  # equal factors may be shared at any time
    torch.testing.assert_close(again(TOKENS).logits, want.logits)


def test_shared_factors_where_the_weights_are_copied():
    model = fill(share_outer(apply_lora(mixture(), r=3, target_modules=[], target_parameters=EXPERTS)))
    want = model(TOKENS).logits
    next(iter(layers(model).values())).module.register_forward_hook(lambda *_: None)
    assert all(layer.why_copied() for layer in layers(model).values())
    torch.testing.assert_close(model(TOKENS).logits, want)


def test_what_cannot_be_shared():
    model = fill(apply_lora(mixture(), r=3, target_modules=[], target_parameters=EXPERTS))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match="must be alike for all experts, or the adapter fresh"):
        share_outer(model)
    with pytest.raises(ValueError, match="adapter 'other' must be on parameters of experts"):
        share_outer(model, "other")
    layer = next(iter(layers(model).values()))
    layer.merge()
    with pytest.raises(ValueError, match="must be unmerged before factors are shared"):
        share_outer(model)
    layer.unmerge()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_linear_layers_for_experts_and_one_without_tokens():
    model, x = fill(apply_lora(Separate(), r=2, exclude_modules=["gate"])), torch.randn(32, 8)
    y, plain = model(x), Separate()
    for expert, adapted in zip(plain.experts, model.experts, strict=True):
        for i in (0, 2):
            layer = adapted[i]
            expert[i].weight.data += layer.scaling["default"] * layer.lora_B["default"] @ layer.lora_A["default"]
    torch.testing.assert_close(y, plain(x))
    y.square().sum().backward()
    chosen = set(model.gate(x).argmax(-1).tolist())
    for e, expert in enumerate(model.experts):  # a layer that is not called has no gradient, as PyTorch has it
        assert (expert[0].lora_B["default"].grad is not None) == (e in chosen)
    assert 3 not in chosen and copy.deepcopy(model)(x).equal(y)
    layer = model.experts[3][0]
    layer(x[:0]).sum().backward()
    assert not layer.lora_A["default"].grad.any() and F.linear(x[:0], layer.weight).shape == (0, 16)
