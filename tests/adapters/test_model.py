"""Adapters of whole models against Hugging Face PEFT on a small Llama, both ways through its files; switching and
merging models."""

import copy
import io
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_llama import llama, randomise
from torch import nn

from fused_lora.adapters import apply_lora, load_adapter, print_trainable_parameters, save_adapter, set_adapter
from fused_lora.nn import LoRALinear
from fused_lora.nn.modules_to_save import ModuleToSave
from fused_lora.testing import WHOLE_MODEL, assert_close

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
IDS = torch.arange(48).reshape(2, 24) * 7 % 128
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def peft_llama(dtype=torch.float32, tie=False, **config) -> PeftModel:
    return randomise(
        get_peft_model(llama(dtype, tie), LoraConfig(**{"target_modules": "all-linear", "r": 4, **config}))
    ).eval()


def outcome(model: nn.Module) -> dict[str, torch.Tensor]:
    """Logits and every gradient of one step, by PEFT's file keys."""
    model.zero_grad()
    logits = model(IDS).logits
    nn.functional.cross_entropy(
        logits.float().flatten(0, 1) if logits.dtype != torch.float64 else logits.flatten(0, 1), IDS.flatten()
    ).backward()
    out = {"logits": logits.detach()}
    for name, p in model.named_parameters():
        if p.grad is not None:
            name = name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
            out[name.replace(".default", "").removesuffix(".weight")] = p.grad.clone()
    return out


CASES = {
    "all-linear": {},
    "suffixes": {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 32},
    "regex": {"target_modules": r".*layers\.1\..*(gate|up|down)_proj"},
    "whole name": {"target_modules": ["model.layers.0.mlp.up_proj"]},
    "rslora": {"use_rslora": True, "r": 16},
    "patterns": {
        "rank_pattern": {"q_proj": 6, r"layers\.1\.mlp\..*": 3},
        "alpha_pattern": {"layers.0.self_attn.k_proj": 3},
    },
    "patterns, rslora": {
        "use_rslora": True,
        "rank_pattern": {"^model.layers.0.mlp.up_proj": 9},
        "alpha_pattern": {"mlp.up_proj": 5},
    },
    "exclude": {"exclude_modules": ["k_proj", "model.layers.0.mlp.up_proj"]},
    "modules_to_save": {"modules_to_save": ["lm_head", "model.norm"]},
}


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_are_peft_s(case, tmp_path):
    # Relative to each tensor's largest element, and over three random adapters: the worst of a few thousand roundings
    # is then a steady figure.
    theirs, errors = peft_llama(**CASES[case]), []
    for seed in range(3):
        randomise(theirs, seed).save_pretrained(tmp_path)
        ours = load_adapter(llama(), tmp_path)
        got, peer, exact = outcome(ours), outcome(theirs), outcome(copy.deepcopy(theirs).double())
        assert got.keys() == peer.keys() == exact.keys() and len(got) >= 3
        largest = {name: t.abs().max().item() for name, t in exact.items()}
        errors.append(
            [torch.cat([(out[name] / largest[name]).flatten() for name in largest]) for out in (got, peer, exact)]
        )
    got, peer, exact = (torch.cat(parts) for parts in zip(*errors, strict=True))
    assert_close({"all": got}, {"all": peer}, {"all": exact}, WHOLE_MODEL)


@pytest.mark.parametrize("case", CASES)
def test_files_go_both_ways(case, tmp_path):
    theirs = peft_llama(**CASES[case])
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_adapter(llama(), tmp_path / "theirs")
    save_adapter(ours, tmp_path / "ours")
    want, got = load_file(tmp_path / "theirs" / WEIGHTS), load_file(tmp_path / "ours" / WEIGHTS)
    with safe_open(tmp_path / "ours" / WEIGHTS, "pt") as file:
        assert got.keys() == want.keys() and file.metadata() == {"format": "pt"}
    assert all(got[key].dtype == want[key].dtype and torch.equal(got[key], want[key]) for key in want)
    again = PeftModel.from_pretrained(llama(), tmp_path / "ours").eval()
    assert torch.equal(again(IDS).logits, theirs(IDS).logits)
    assert torch.equal(load_adapter(llama(), tmp_path / "ours")(IDS).logits, ours(IDS).logits)


@pytest.mark.parametrize("case", [case for case in CASES if case != "exclude"])
def test_apply_chooses_what_peft_chooses(case, capsys):
    theirs, ours = peft_llama(**CASES[case]), apply_lora(llama(), **{"r": 4, **CASES[case]})
    want = {name.removeprefix("base_model.model."): p.shape for name, p in theirs.named_parameters() if p.requires_grad}
    got = {name: p.shape for name, p in ours.named_parameters() if p.requires_grad}
    assert {name.removesuffix(".weight"): shape for name, shape in want.items()} == {
        name.removesuffix(".weight"): s for name, s in got.items()
    }
    layers = {
        name.removeprefix("base_model.model."): m for name, m in theirs.named_modules() if isinstance(m, LoraLayer)
    }
    scaling = {name: m.scaling["default"] for name, m in layers.items()}
    assert scaling == {name: m.scaling["default"] for name, m in ours.named_modules() if isinstance(m, LoRALinear)}
    theirs.print_trainable_parameters()
    print_trainable_parameters(ours)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0] == lines[1] and lines[0].startswith("trainable params: ")


@pytest.mark.parametrize("tie", [False, True])
def test_half_precision_base(tie, tmp_path):
    theirs = peft_llama(torch.bfloat16, tie, modules_to_save=["lm_head"] if tie else None)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_adapter(llama(torch.bfloat16, tie), tmp_path / "theirs")
    exact = copy.deepcopy(theirs).double()(IDS).logits
    assert_close({"logits": ours(IDS).logits}, {"logits": theirs(IDS).logits}, {"logits": exact}, WHOLE_MODEL)
    save_adapter(ours, tmp_path / "ours")
    want, got = load_file(tmp_path / "theirs" / WEIGHTS), load_file(tmp_path / "ours" / WEIGHTS)
    assert {key: t.dtype for key, t in got.items()} == {key: t.dtype for key, t in want.items()}
    assert {t.dtype for key, t in got.items() if "lora_" in key} == {torch.float32}


def test_adapter_keeps_its_dtype_on_disk(tmp_path):
    ours = apply_lora(llama(torch.bfloat16), target_modules=["q_proj"]).to(torch.bfloat16)
    save_adapter(ours, tmp_path)
    assert {t.dtype for t in load_file(tmp_path / WEIGHTS).values()} == {torch.bfloat16}


def test_dropout_is_carried(tmp_path):
    save_adapter(apply_lora(llama(), lora_dropout=0.25), tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["lora_dropout"] == 0.25
    assert load_adapter(llama(), tmp_path).model.layers[0].mlp.up_proj.lora_dropout["default"] == 0.25


def test_a_fresh_adapter_changes_no_bit_of_the_logits():
    model = llama()
    want = model(IDS).logits
    assert torch.equal(apply_lora(model, modules_to_save=["lm_head"])(IDS).logits, want)


def test_config_is_peft_s(tmp_path):
    model = apply_lora(llama(), r=4, target_modules=["q_proj", "v_proj"], lora_alpha=32, use_rslora=True)
    model.name_or_path = "some/base"
    save_adapter(model, tmp_path / "ours")
    get_peft_model(
        llama(), LoraConfig(r=4, lora_alpha=32, use_rslora=True, target_modules=["q_proj", "v_proj"])
    ).save_pretrained(tmp_path / "theirs")
    written = json.loads((tmp_path / "ours" / CONFIG).read_text())
    assert written["target_modules"] == ["q_proj", "v_proj"] and written["peft_type"] == "LORA"
    ours, theirs = (LoraConfig.from_pretrained(tmp_path / who).to_dict() for who in ("ours", "theirs"))
    assert ours.pop("base_model_name_or_path") == "some/base" and theirs.pop("base_model_name_or_path") is None
    assert ours.pop("peft_version") is None or theirs.pop("peft_version")  # PEFT's own version, no field of ours
    assert ours == theirs | {"peft_version": None} if "peft_version" in theirs else ours == theirs


def test_several_adapters(tmp_path):
    model, x = llama(), IDS
    base = model(x).logits
    randomise(apply_lora(model, r=4, adapter_name="a"), 1)
    a = model(x).logits
    randomise(apply_lora(model, r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], adapter_name="b"), 2)
    b = model(x).logits
    assert not torch.equal(a, b) and not torch.equal(a, base)
    for name, want in (("a", a), (None, base), ("b", b), ("a", a)):
        set_adapter(model, name)
        assert torch.equal(model(x).logits, want)
        trains = {n for n, p in model.named_parameters() if p.requires_grad}
        assert all(f".{name}" in n for n in trains) and bool(trains) == (name is not None)
    assert "lm_head.modules_to_save.b.weight" not in trains
    for name, want in (("a", a), ("b", b)):
        save_adapter(model, tmp_path / name, name)
        assert torch.equal(load_adapter(llama(), tmp_path / name)(x).logits, want)
    both = load_adapter(load_adapter(llama(), tmp_path / "a", "first"), tmp_path / "b", "second")
    assert torch.equal(both(x).logits, b)
    set_adapter(both, "first")
    assert torch.equal(both(x).logits, a)
    load_adapter(
        both, tmp_path / "a", "first"
    )  # an existing name with the same shapes: new values in the same Parameters
    assert torch.equal(both(x).logits, a)


def test_loading_over_an_adapter_keeps_its_parameters(tmp_path):
    save_adapter(randomise(apply_lora(llama(), r=4, lora_alpha=16), 3), tmp_path)
    model = apply_lora(llama(), r=4)
    optimizer_sees = {name: p for name, p in model.named_parameters() if p.requires_grad}
    load_adapter(model, tmp_path)
    assert all(dict(model.named_parameters())[name] is p for name, p in optimizer_sees.items())
    assert torch.equal(model(IDS).logits, load_adapter(llama(), tmp_path)(IDS).logits)


def test_modules_to_save_leaves_the_tied_twin_alone(tmp_path):
    model = apply_lora(llama(tie=True), target_modules=["q_proj"], modules_to_save=["lm_head"])
    before = model.model.embed_tokens.weight.detach().clone()
    randomise(model)
    assert isinstance(model.lm_head, ModuleToSave) and model.lm_head.in_features == 64
    assert torch.equal(model.model.embed_tokens.weight, before) and torch.equal(
        model.lm_head.original_module.weight, before
    )
    assert not torch.equal(model.lm_head.weight, before) and not model.model.embed_tokens.weight.requires_grad
    twin = copy.deepcopy(model)
    assert torch.equal(twin(IDS).logits, model(IDS).logits)
    assert not hasattr(ModuleToSave.__new__(ModuleToSave), "weight")  # half-built, as unpickling sees it: no KeyError
    set_adapter(model, None)
    assert torch.equal(model(IDS).logits, llama(tie=True)(IDS).logits)


def test_peft_models_are_refused():
    with pytest.raises(ValueError, match="model must be the base model; got a PeftModel"):
        apply_lora(peft_llama(target_modules=["q_proj"]))


def test_model_with_adapters_survives_pickle_and_state_dict():
    model = randomise(apply_lora(llama(), modules_to_save=["lm_head"]))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    twin = torch.load(buffer, weights_only=False)
    fresh = apply_lora(llama(), modules_to_save=["lm_head"])
    fresh.load_state_dict(model.state_dict())
    want = model(IDS).logits
    assert torch.equal(twin(IDS).logits, want) and torch.equal(fresh(IDS).logits, want)
