"""DoRA and ALLoRA adapters of whole models: PEFT's files both ways, switching, merging, checkpoints, refusals."""

import json
import warnings

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_llama import TOKENS, llama, randomise

import fused_lora
from fused_lora import LoraConfig, LoRALinear, apply_lora, load_adapter, save_adapter, set_adapter
from fused_lora.variants.allora import ScaledSteps

TARGETS = ["q_proj", "down_proj"]


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def gradients(model) -> dict[str, torch.Tensor]:
    """By PEFT's keys in a file."""
    model.zero_grad()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    return {
        name.removeprefix("base_model.model.").replace(".default", "").removesuffix(".weight"): p.grad
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def peft_dora(**lora):
    config = PeftConfig(**dict(r=4, lora_alpha=8, target_modules=TARGETS, use_dora=True) | lora)
    return randomise(get_peft_model(llama(), config)).eval()


@pytest.fixture(scope="module")
def from_peft(tmp_path_factory):
    """PEFT's model with a DoRA adapter, and its files."""
    model, directory = peft_dora(), tmp_path_factory.mktemp("dora")
    model.save_pretrained(directory)
    return model, directory


def ours(**given):
    return randomise(apply_lora(llama(), 4, 8, TARGETS, use_dora=True, **given)).eval()


def test_peft_s_files(from_peft):
    theirs, directory = from_peft
    model = load_adapter(llama(), directory)
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-4, atol=1e-5)
    mine, peer = gradients(model), gradients(theirs)
    assert mine.keys() == peer.keys()
    for key, grad in mine.items():
        assert (grad - peer[key]).abs().max() <= 1e-5 * peer[key].abs().max() + 1e-7, key


def test_files_for_peft(from_peft, tmp_path):
    _, directory = from_peft
    model = ours()
    save_adapter(model, tmp_path)
    keys = [load_file(where / "adapter_model.safetensors").keys() for where in (tmp_path, directory)]
    assert keys[0] == keys[1]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["use_dora"] is True
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        theirs = PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-4, atol=1e-5)
    again = load_adapter(llama(), tmp_path, "again")
    assert torch.equal(logits(again), logits(model))


def test_as_many_parameters_as_peft(capsys):
    fused_lora.print_trainable_parameters(apply_lora(llama(), 4, 8, TARGETS, use_dora=True))
    peft_dora().print_trainable_parameters()
    mine, peer = capsys.readouterr().out.splitlines()
    assert mine == peer


def test_peft_s_configuration():
    model = apply_lora(llama(), PeftConfig(r=4, lora_alpha=8, target_modules=TARGETS, use_dora=True))
    layers = [m for m in model.modules() if isinstance(m, LoRALinear)]
    assert len(layers) == 4 and all("default" in layer.lora_magnitude_vector for layer in layers)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_several_adapters_of_which_some_are_dora(p):
    """As PEFT has it: one after the other."""
    theirs = peft_dora(lora_dropout=p)
    theirs.add_adapter("plain", PeftConfig(r=2, lora_alpha=6, target_modules=TARGETS))
    theirs.add_adapter("last", PeftConfig(r=3, lora_alpha=6, target_modules=TARGETS, use_dora=True))
    names = ["default", "plain", "last"]
    theirs.base_model.set_adapter(names)
    randomise(theirs, 2).train(p > 0.0)
    model = ours(lora_dropout=p)
    apply_lora(model, 2, 6, TARGETS, adapter_name="plain")
    apply_lora(model, 3, 6, TARGETS, adapter_name="last", use_dora=True)
    set_adapter(model, names)
    values = {name.removeprefix("base_model.model."): t for name, t in theirs.named_parameters() if "lora_" in name}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(values[f"{name}.weight"])
    model.train(p > 0.0)
    outcomes = []
    for each in (model, theirs):
        torch.manual_seed(3)
        outcomes.append(logits(each))
    torch.testing.assert_close(*outcomes, rtol=1e-4, atol=1e-4)
    if p == 0.0:
        with fused_lora.merged(model):
            torch.testing.assert_close(logits(model), outcomes[0], rtol=1e-4, atol=1e-4)


def test_switch_merge_and_delete():
    model, base = ours(), logits(llama())
    trained = logits(model)
    apply_lora(model, 2, 4, TARGETS, adapter_name="plain")
    assert torch.equal(logits(model), base)
    assert not [n for n, p in model.named_parameters() if "default" in n and p.requires_grad]
    set_adapter(model, "default")
    assert torch.equal(logits(model), trained)
    plain_keys = llama().state_dict().keys()
    with fused_lora.merged(model, "default"):
        assert model.state_dict().keys() == plain_keys
        torch.testing.assert_close(logits(model), trained, rtol=1e-4, atol=1e-5)
    fused_lora.delete_adapter(model, "plain")
    assert torch.equal(logits(model), trained)
    torch.testing.assert_close(logits(fused_lora.reference_model(model)), trained, rtol=0, atol=0)
    fused_lora.merge_and_unload(model)
    torch.testing.assert_close(logits(model), trained, rtol=1e-4, atol=1e-5)
    assert model.state_dict().keys() == plain_keys


def test_transformers_save_and_checkpoint(tmp_path):
    model = ours()
    model.save_pretrained(tmp_path / "checkpoint-1")
    assert torch.equal(logits(load_adapter(llama(), tmp_path / "checkpoint-1")), logits(model))
    resumed = apply_lora(llama(), 4, 8, TARGETS, use_dora=True)
    outcome = resumed.load_state_dict(load_file(tmp_path / "checkpoint-1" / "model.safetensors"), strict=False)
    assert not outcome.missing_keys and not outcome.unexpected_keys
    assert torch.equal(logits(resumed), logits(model))


@pytest.mark.parametrize("init", [True, False, "gaussian", "pissa"])
def test_a_start_scales_nothing(init):
    """m is the norms of the rows of W + s B A as it starts."""
    model = apply_lora(llama(), 4, 8, ["q_proj"], init_lora_weights=init, use_dora=True)
    layer = model.model.layers[0].self_attn.q_proj
    want = layer.weight + 2.0 * layer.lora_B["default"] @ layer.lora_A["default"]
    torch.testing.assert_close(layer.lora_magnitude_vector["default"], want.norm(dim=1))


def test_checkpointing_trains_as_without():
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = apply_lora(llama(), 4, 8, use_dora=True).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        losses = []
        for _ in range(6):
            loss = model(input_ids=TOKENS, labels=TOKENS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        found.append(torch.stack(losses))
    torch.testing.assert_close(*found)
    assert found[0][-1] < found[0][0] - 0.05


def test_allora_s_files(tmp_path):
    """PEFT loads them as the plain LoRA that they are, and we with eta."""
    model = randomise(apply_lora(llama(), 4, target_modules=TARGETS, rank_pattern={"q_proj": 2}, allora_eta=1.5)).eval()
    save_adapter(model, tmp_path)
    again = load_adapter(llama(), tmp_path)
    layer = again.model.layers[0].self_attn.q_proj
    assert layer.allora_eta == {"default": 1.5} and layer.scaling == {"default": 1.0} and layer.r == {"default": 2}
    with pytest.warns(UserWarning, match="allora_eta"):
        theirs = PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-5)
    with fused_lora.merged(model):
        torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-5)
    assert "allora_mode" not in json.loads((tmp_path / "adapter_config.json").read_text())
    save_adapter(apply_lora(llama(), 4, target_modules=["q_proj"], allora_eta=1.5, allora_mode="update"), tmp_path)
    layer = load_adapter(llama(), tmp_path).model.layers[0].self_attn.q_proj
    assert layer.allora_mode == {"default": "update"} and isinstance(layer.variants["default"], ScaledSteps)


def test_a_file_says_dora_exact(tmp_path):
    save_adapter(ours(dora_exact=True), tmp_path)
    layer = load_adapter(llama(), tmp_path).model.layers[0].self_attn.q_proj
    assert layer.dora_exact == {"default": True} and layer.variants["default"].exact
    save_adapter(ours(), tmp_path)
    assert "dora_exact" not in json.loads((tmp_path / "adapter_config.json").read_text())


def test_files_of_modules_that_train_magnitudes_alone(tmp_path):
    """They hold m alone, come back, into a model that has the adapter, too, and PEFT refuses a rank of 0."""
    model = randomise(ours(rank_pattern={"q_proj": 0})).eval()
    save_adapter(model, tmp_path)
    keys = {
        key.removeprefix("base_model.model.model.layers.1.")
        for key in load_file(tmp_path / "adapter_model.safetensors")
    }
    assert {key for key in keys if "q_proj" in key} >= {"self_attn.q_proj.lora_magnitude_vector"}
    assert not any("q_proj.lora_A" in key or "q_proj.lora_B" in key for key in keys)
    again = load_adapter(llama(), tmp_path).eval()
    assert torch.equal(logits(again), logits(model))
    torch.nn.init.ones_(again.model.layers[0].self_attn.q_proj.lora_magnitude_vector["default"])
    assert torch.equal(logits(load_adapter(again, tmp_path)), logits(model))
    with pytest.raises(ValueError, match="`r` should be a positive integer"):
        PeftModel.from_pretrained(llama(), tmp_path)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            dict(target_modules=["embed_tokens"], use_dora=True),
            "model.embed_tokens: use_dora needs a linear layer; got",
        ),
        (
            dict(target_modules=["embed_tokens"], r=4, allora_eta=1.0),
            "allora_eta needs a linear layer; got 1.0 for a E",
        ),
        (dict(use_dora="yes"), "use_dora must be a bool; got 'yes'"),
        (dict(config=LoraConfig(), use_dora=True), "config and use_dora exclude each other; got both, use_dora=True"),
    ],
)
def test_what_is_refused(arguments, message, refuses):
    model = llama()
    with refuses(model, message):
        apply_lora(model, **arguments)


def test_sums_of_dora_are_refused(refuses):
    model = ours()
    apply_lora(model, 2, 4, TARGETS, adapter_name="plain")
    with refuses(model, r"adapters must be plain LoRA to be combined, .*; got 'default', DoRA in model"):
        fused_lora.add_weighted_adapter(model, ["default", "plain"], [1.0, 1.0], "sum")


def test_another_kind_under_a_known_name_is_refused(from_peft, refuses):
    model = apply_lora(llama(), 4, 8, TARGETS)
    with refuses(model, "adapter 'default' exists with use_dora=False; got True, load under a new name"):
        load_adapter(model, from_peft[1])
