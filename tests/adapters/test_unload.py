"""Adapters off a model again: disable_adapter, delete_adapter, unload, merge_and_unload; and how much trains."""

import weakref

import pytest
import torch
from tiny_llama import llama, randomise
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import fused_lora
from fused_lora import apply_lora, delete_adapter, disable_adapter, merge_and_unload, merged, set_adapter, unload
from fused_lora.nn import LoRALinear

IDS = torch.arange(48).reshape(2, 24) * 7 % 128


def two_adapters(tie=False):
    model = llama(tie=tie)
    randomise(apply_lora(model, adapter_name="a"), 1)
    return randomise(apply_lora(model, target_modules=["q_proj"], modules_to_save=["lm_head"], adapter_name="b"), 2)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def is_plain(model):
    kinds = {type(module).__module__.partition(".")[0] for module in model.modules()}
    return "fused_lora" not in kinds and model.state_dict().keys() == llama().state_dict().keys()


def test_disable_adapter_runs_the_base_model_and_restores(state):
    model = two_adapters()
    before, want = state(model), logits(model)
    with pytest.raises(RuntimeError, match="inside"), disable_adapter(model) as same:
        assert same is model and torch.equal(logits(model), logits(llama()))
        assert {n for n, p in model.named_parameters() if p.requires_grad} == {
            n for n, f in before["flags"].items() if f
        }
        raise RuntimeError("inside")
    assert state(model) == before and torch.equal(logits(model), want)
    with merged(model), pytest.raises(ValueError, match="must be unmerged before adapters are switched off"):
        disable_adapter(model).__enter__()


def test_delete_adapter(refuses):
    model = two_adapters()
    with refuses(model, r"adapter_name must be one of \['a', 'b'\]; got 'c'"):
        delete_adapter(model, "c")
    with pytest.warns(UserWarning, match=r"no adapter of the model is active now, .* set_adapter to one of \['a'\]"):
        delete_adapter(model, "b")
    assert torch.equal(logits(model), logits(llama()))  # it was active
    set_adapter(model, "a")
    assert torch.equal(logits(model), logits(randomise(apply_lora(llama()), 1)))
    delete_adapter(model, "a")
    assert is_plain(model) and torch.equal(logits(model), logits(llama()))
    with pytest.raises(ValueError, match="model must have adapters of this library; got one without"):
        unload(model)


def test_a_list_of_adapters_is_deleted_or_none_of_them(refuses):
    model = two_adapters()
    with refuses(model, r"adapter_name must be one of \['a', 'b'\]; got 'c'"):
        model.delete_adapter(["a", "c"])
    model.delete_adapter(["a", "a"])
    assert model.model.layers[0].self_attn.q_proj.lora_A.keys() == {"b"}
    model.delete_adapter("b")
    assert is_plain(model)


@pytest.mark.parametrize("tie", [False, True])
def test_unload_gives_the_plain_model_back(tie):
    model = llama(tie=tie)
    before = dict(model.named_parameters(remove_duplicate=False))
    apply_lora(model, target_modules=["q_proj", "lm_head"])
    randomise(apply_lora(model, target_modules=["k_proj"], modules_to_save=["embed_tokens"], adapter_name="b"))
    assert unload(model) is model and is_plain(model)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in after)
    assert type(model.lm_head) is nn.Linear and not model.lm_head.training
    assert torch.equal(logits(model), logits(llama(tie=tie)))
    apply_lora(model)  # and it can be adapted again


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("name", ["a", "b", None])
def test_merge_and_unload(tie, name, tmp_path):
    model = two_adapters(tie)
    embedding = model.model.embed_tokens.weight.detach().clone()
    set_adapter(model, name or "b")
    want = logits(model)
    set_adapter(model, "b")
    assert merge_and_unload(model, name) is model and is_plain(model)
    torch.testing.assert_close(logits(model), want, atol=1e-5, rtol=1e-5)
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    tied = tie and name == "a"  # b has a head of its own
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied == model.config.tie_word_embeddings
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(type(model).from_pretrained(tmp_path).eval()), want, atol=1e-5, rtol=1e-5)


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=128, n_positions=64)).eval()


def dispatched():
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    places = dict.fromkeys(("model", "lm_head"), "cpu")
    return accelerate.dispatch_model(llama(), places, main_device="cpu", force_hooks=True)


@pytest.mark.parametrize("make, targets", [(gpt2, ["c_attn", "wte"]), (dispatched, ["q_proj", "up_proj"])])
def test_other_layers_come_back_as_they_were(make, targets):
    model = make()
    before = [(name, type(module), "_hf_hook" in vars(module)) for name, module in model.named_modules()]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    want = logits(randomise(apply_lora(model, target_modules=targets)))
    assert not torch.equal(want, logits(make()))
    with merged(model):
        torch.testing.assert_close(logits(model), want, atol=1e-4, rtol=1e-4)
    unload(model)
    assert [(name, type(module), "_hf_hook" in vars(module)) for name, module in model.named_modules()] == before
    assert all(p is parameters[name] for name, p in model.named_parameters(remove_duplicate=False))
    merge_and_unload(randomise(apply_lora(model, target_modules=targets)))
    torch.testing.assert_close(logits(model), want, atol=1e-4, rtol=1e-4)


def test_merging_holds_one_layer_s_weight_more(monkeypatch):
    model = randomise(apply_lora(llama()))
    alive: set[str] = set()
    largest = 0
    for name, layer in model.named_modules():
        if isinstance(layer, LoRALinear):
            weakref.finalize(layer.weight, alive.discard, name)
            alive.add(name)
    layers, merge = len(alive), LoRALinear.merge
    merged_so_far = 0

    def count(layer):
        nonlocal largest, merged_so_far
        merge(layer)
        merged_so_far += 1
        largest = max(largest, len(alive) + merged_so_far - layers)

    monkeypatch.setattr(LoRALinear, "merge", count)
    del layer
    merge_and_unload(model)
    assert merged_so_far == layers and largest <= 2  # the loop still names the layer before


def test_a_layer_that_cannot_be_merged_leaves_a_model_that_computes_the_same():
    model = randomise(apply_lora(llama()))
    want = logits(model)
    bad = model.model.layers[1].self_attn.q_proj
    kept = bad.lora_B["default"].detach().clone()
    with torch.no_grad():
        bad.lora_B["default"][0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.q_proj: the weight merged .* must be finite"):
        merge_and_unload(model)
    with torch.no_grad():
        bad.lora_B["default"].copy_(kept)
    torch.testing.assert_close(logits(model), want, atol=1e-5, rtol=1e-5)


def test_a_layer_that_has_no_merge_is_named_before_others_are_merged(refuses):
    model = apply_lora(nn.Sequential(nn.Conv1d(4, 4, 3, groups=2), nn.Linear(6, 5)), target_modules=["0", "1"])
    with refuses(model, "0: convolution must have one group and pad with zeros for a merge; got groups=2"):
        merge_and_unload(model)
    apply_lora(model, target_modules=["1"], adapter_name="b")
    with refuses(model, "0: convolution must have one group") as got:
        merge_and_unload(model, "default")
    assert got and model[1].active_adapter == "b"


class Experts(nn.Module):
    """Two parameters that it reads itself."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(2, 6, 4)), nn.Parameter(torch.randn(2, 4, 6))

    def forward(self, x):
        return (x @ self.up.mT @ self.down.mT).sum(0)


@pytest.mark.parametrize("bad", ["0", "0.base_layer"])
def test_experts_of_which_one_parameter_cannot_be_merged_compute_the_same(bad):
    torch.manual_seed(0)
    model, x = nn.Sequential(Experts(), nn.Linear(4, 4)), torch.randn(3, 4)
    randomise(apply_lora(model, target_modules=["1"], target_parameters=["0.up", "0.down"]))
    want, layer = model(x), model.get_submodule(bad)
    kept = layer.lora_B["default"].detach().clone()
    with torch.no_grad():
        layer.lora_B["default"].fill_(torch.inf)
    with pytest.raises(ValueError, match=rf"^{bad}: the weight merged with adapter 'default' must be finite"):
        merge_and_unload(model)
    with torch.no_grad():
        layer.lora_B["default"].copy_(kept)
    torch.testing.assert_close(model(x), want)
    torch.testing.assert_close(merge_and_unload(model)(x), want)
    assert type(model[0]) is Experts


def test_what_cannot_be_taken_off(refuses):
    model = randomise(apply_lora(llama()))
    model.model.layers[0].mlp.up_proj._hf_hook = object()
    with refuses(model, r"up_proj must carry no accelerate hook when adapters are taken off"):
        unload(model)
    del model.model.layers[0].mlp.up_proj._hf_hook
    model.model.layers[1].mlp.up_proj = torch.compile(model.model.layers[1].mlp.up_proj, backend="eager")
    with refuses(model, r"layers\.1\.mlp\.up_proj must not be compiled by itself"):
        unload(model)
    model.model.layers[0].mlp.up_proj.merge()
    with refuses(model, "up_proj must be unmerged before an adapter is taken off"):
        merge_and_unload(model)


def test_how_much_trains(capsys):
    model = apply_lora(llama(tie=True), r=2, target_modules=["q_proj"])
    assert fused_lora.get_nb_trainable_parameters(model) == (
        2 * 2 * (64 + 64),
        sum(p.numel() for p in model.parameters()),
    )
    assert model.get_nb_trainable_parameters() == fused_lora.get_nb_trainable_parameters(model)
    model.print_trainable_parameters()
    assert "trainable params: 512 || all params: " in capsys.readouterr().out
