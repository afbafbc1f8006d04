"""How fresh adapters start: PEFT's words for it, by PEFT's own code where it is more than two lines."""

import sys

import peft
import pytest
import torch
from tiny_llama import TOKENS, llama, randomise
from torch import nn

from fused_lora import LoRALinear, apply_lora, load_adapter, save_adapter, set_adapter
from fused_lora.adapters.starts import _BY_PEFT

GIVEN = dict(r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"])


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def of_peft(init):
    torch.manual_seed(1)
    return peft.get_peft_model(llama(), peft.LoraConfig(**GIVEN, init_lora_weights=init)).eval()


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_comes_out_of_the_weight_is_peft_s(init, tmp_path):
    theirs, ours = of_peft(init), apply_lora(llama(), **GIVEN, init_lora_weights=init)
    for name, layer in layers(ours).items():
        other = theirs.get_submodule(f"base_model.model.{name}")
        assert torch.equal(layer.lora_A["default"], other.lora_A["default"].weight)
        assert torch.equal(layer.lora_B["default"], other.lora_B["default"].weight)
        assert torch.equal(layer.weight, other.weight) and not layer.weight.requires_grad
    torch.testing.assert_close(logits(ours), logits(llama()))
    set_adapter(ours, None)
    assert (logits(ours) - logits(llama())).abs().max() > 1e-2  # the rest of the weights alone is another model
    set_adapter(ours, "default")
    randomise(ours)
    save_adapter(ours, tmp_path)
    again, back = load_adapter(llama(), tmp_path), peft.PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(logits(again), logits(ours))
    torch.testing.assert_close(logits(back), logits(ours))
    load_adapter(ours, tmp_path)
    with pytest.raises(ValueError, match=f"exists with init_lora_weights=True; got '{init}', load into a fresh model"):
        load_adapter(apply_lora(llama(), **GIVEN), tmp_path)
    assert torch.equal(logits(again), logits(ours))


@pytest.mark.parametrize("init", _BY_PEFT)
def test_conv1d_starts_as_a_linear_layer_of_the_same_weight(init, tmp_path):
    """Of a weight that is not square: PEFT's olora takes it the wrong way round and fails there."""
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    conv, linear = nn.Sequential(Conv1D(8, 6)), nn.Sequential(nn.Linear(6, 8))
    linear.load_state_dict({"0.weight": conv[0].weight.T, "0.bias": conv[0].bias})
    weight, x = conv[0].weight.clone(), torch.randn(5, 6)
    want = conv(x)
    for model in (conv, linear):
        torch.manual_seed(1)
        apply_lora(model, r=4, target_modules=["0"], init_lora_weights=init)
    for name in ("lora_A", "lora_B"):
        torch.testing.assert_close(getattr(conv[0], name)["default"], getattr(linear[0], name)["default"])
    torch.testing.assert_close(conv[0].weight, linear[0].weight.T)
    assert torch.equal(conv[0].weight, weight) == (init == "orthogonal") and not conv[0].weight.requires_grad
    torch.testing.assert_close(conv(x), want)
    save_adapter(conv, tmp_path)
    fresh = nn.Sequential(Conv1D(8, 6))
    fresh[0].weight.data, fresh[0].bias.data = weight, conv[0].bias.data
    torch.testing.assert_close(load_adapter(fresh, tmp_path)(x), want)
    for model in (conv, linear):
        torch.manual_seed(2)
        apply_lora(model, r=2, target_modules=["0"], init_lora_weights=init, adapter_name="second")
    torch.testing.assert_close(conv(x), linear(x))


@pytest.mark.parametrize("init", [False, "gaussian", "orthogonal"])
def test_random_starts(init):
    torch.manual_seed(0)
    model = apply_lora(nn.Sequential(nn.Linear(400, 300)), r=8, init_lora_weights=init)
    A, B = model[0].lora_A["default"].data, model[0].lora_B["default"].data
    if init == "gaussian":
        assert not B.any() and A.std() == pytest.approx(1 / 8, rel=0.05) and A.abs().max() > 3 / 8
    elif init is False:
        for tensor, fan in ((A, 400), (B, 8)):
            assert tensor.abs().max() <= fan**-0.5 and tensor.std() == pytest.approx((3 * fan) ** -0.5, rel=0.05)
    else:
        assert A.any() and B.any() and (B @ A).abs().max() < 1e-5


@pytest.mark.parametrize("init", [False, "gaussian"])
def test_random_starts_of_convolutions_and_embeddings_are_peft_s(init):
    """In distribution: PEFT draws in another order."""

    def net():
        return nn.ModuleDict({"conv": nn.Conv2d(64, 64, 3), "tokens": nn.Embedding(400, 32)})

    given = dict(r=8, target_modules=["conv", "tokens"], init_lora_weights=init)
    ours, theirs = apply_lora(net(), **given), peft.LoraModel(net(), peft.LoraConfig(**given), "default").model
    for name, (key_A, key_B) in (("conv", ("lora_A", "lora_B")), ("tokens", ("lora_embedding_A", "lora_embedding_B"))):
        for which, key in (("lora_A", key_A), ("lora_B", key_B)):
            got, want = getattr(ours[name], which)["default"], getattr(theirs[name], key)["default"]
            want = want.weight if name == "conv" else want
            assert got.shape == want.shape
            assert got.std().item() == pytest.approx(want.std().item(), rel=0.1, abs=1e-12), (name, which)


@pytest.mark.parametrize(
    "model, arguments, message",
    [
        (nn.Linear, {"init_lora_weights": "pisa"}, r"init_lora_weights must be a bool or one of .*; got 'pisa'"),
        (nn.Linear, {"init_lora_weights": "orthogonal", "r": 3}, r"r must be even .*; got 3 in 0"),
        (nn.Linear, {"init_lora_weights": "pissa", "r": 2, "lora_alpha": 0}, r"lora_alpha must be > 0 .*; got 0 in 0"),
        (nn.Linear, {"init_lora_weights": "pissa", "r": 7}, r"r up to its smaller side; got .* \[8, 6\] and r=7 in 0"),
        (
            nn.Bilinear,
            {"init_lora_weights": "pissa", "target_parameters": ["0.weight"]},
            r"needs linear layers; got 0.wei",
        ),
    ],
)
def test_refusals(model, arguments, message, refuses):
    model = nn.Sequential(model(6, 8) if model is nn.Linear else model(6, 6, 8), nn.Linear(4, 4))
    with refuses(model, message):
        apply_lora(model, **{"r": 2, "target_modules": ["0"] if "r" in arguments else ["1"], **arguments})


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_weight_that_is_not_finite_is_found_before_others_change(init, tmp_path, refuses):
    def linears():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8))

    given = dict(r=2, target_modules=["0", "1"], init_lora_weights=init)
    save_adapter(apply_lora(linears(), **given), tmp_path)
    model = linears()
    with torch.no_grad():
        model[1].weight[0, 0] = torch.nan
    for put_on in (lambda: apply_lora(model, **given), lambda: load_adapter(model, tmp_path)):
        with refuses(model, f"1: weight must be finite with init_lora_weights='{init}'; got others"):
            put_on()


@pytest.mark.parametrize("error", [torch.linalg.LinAlgError("no convergence"), MemoryError("no convergence")])
def test_factors_that_cannot_be_found_leave_the_model_as_it_was(error, monkeypatch, refuses):
    model, svd, done = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8)), torch.linalg.svd, []

    def fails(*args, **kwargs):
        if done:
            raise error
        done.append(args)
        return svd(*args, **kwargs)

    monkeypatch.setattr(torch.linalg, "svd", fails)
    named = isinstance(error, torch.linalg.LinAlgError)
    with refuses(
        model, ("1: weight must .*" if named else "") + "no convergence", ValueError if named else MemoryError
    ):
        apply_lora(model, r=2, target_modules=["0", "1"], init_lora_weights="pissa")


@pytest.mark.parametrize("adapted", [[], ["embed_tokens"]])
def test_weights_that_two_layers_share_are_left_alone(adapted, refuses):
    model = llama(tie=True)
    if adapted:
        apply_lora(model, target_modules=adapted)
    for init in ("pissa", "olora"):
        with refuses(
            model, f"init_lora_weights='{init}' changes the weight, which must be .* alone; got lm_head, tied"
        ):
            apply_lora(model, target_modules=["lm_head"], init_lora_weights=init, adapter_name="other")
    apply_lora(model, target_modules=["lm_head"], init_lora_weights="orthogonal", adapter_name="other")


def test_without_peft(monkeypatch, refuses):
    for name in [name for name in sys.modules if name.partition(".")[0] == "peft"]:
        monkeypatch.setitem(sys.modules, name, None)
    for init in _BY_PEFT:
        model = nn.Sequential(nn.Linear(4, 4))
        with refuses(
            model, rf"init_lora_weights='{init}' is PEFT's, which is not installed: pip install 'fused-lora\[peft"
        ):
            apply_lora(model, r=2, init_lora_weights=init)
    apply_lora(model, r=2, init_lora_weights="gaussian")
