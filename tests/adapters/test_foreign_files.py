"""Adapter files that others wrote: PEFT with an output head or a resized vocabulary, older versions, raw state dicts,
and JSON that is none."""

import json
import warnings

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_llama import randomise
from transformers import LlamaConfig, LlamaForCausalLM

from fused_lora.adapters import apply_lora, load_adapter, save_adapter, set_adapter
from fused_lora.nn import LoRALinear

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
IDS = torch.arange(12)[None]
HEAD = "base_model.model.lm_head."


def llama(dtype=torch.float32, tie=False, vocab=40) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    config = LlamaConfig(vocab_size=vocab, max_position_embeddings=32, tie_word_embeddings=tie, **shape)
    return LlamaForCausalLM(config).to(dtype).eval()


def peft_saved(directory, model=None, targets=("q_proj", "lm_head"), **options) -> PeftModel:
    theirs = get_peft_model(model or llama(), PeftConfig(r=2, target_modules=list(targets), **options))
    randomise(theirs).eval().save_pretrained(directory)
    return theirs


def edit(directory, change):
    tensors = load_file(directory / WEIGHTS)
    save_file(change(tensors) or tensors, directory / WEIGHTS, metadata={"format": "pt"})


def refused(model, directory, message):
    before = [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]
    values = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_adapter(model, directory)
    assert [(name, id(p), p.requires_grad) for name, p in model.named_parameters()] == before
    assert all(torch.equal(t, values[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_targeted_head_that_peft_repeats(tie, wrapped, tmp_path):
    theirs = peft_saved(tmp_path, llama(tie=tie))
    assert HEAD + "base_layer.weight" in load_file(tmp_path / WEIGHTS)
    model = llama(tie=tie)
    load_adapter(torch.compile(model, backend="eager") if wrapped else model, tmp_path)
    torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits)
    load_adapter(model, tmp_path)  # again, over the adapter that it has now
    save_adapter(model, tmp_path / "ours")
    again = PeftModel.from_pretrained(llama(tie=tie), tmp_path / "ours").eval()
    torch.testing.assert_close(again(IDS).logits, theirs(IDS).logits)
    set_adapter(model, None)
    assert torch.equal(model(IDS).logits, llama(tie=tie)(IDS).logits)


@pytest.mark.parametrize("written, read", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_a_repeated_head_in_another_dtype(written, read, tmp_path):
    base = llama().to(torch.bfloat16).to(written)  # values that both dtypes hold
    peft_saved(tmp_path, base)
    model = llama().to(torch.bfloat16).to(read)
    load_adapter(model, tmp_path)
    assert isinstance(model.lm_head, LoRALinear)


def test_a_head_of_other_values_is_refused(tmp_path):
    peft_saved(tmp_path)
    edit(tmp_path, lambda t: t.update({HEAD + "base_layer.weight": t[HEAD + "base_layer.weight"] * 2}))
    refused(llama(), tmp_path, r"lm_head\.base_layer\.weight, a tensor of the base model, must be the model's own; got")


def test_a_resized_vocabulary_is_named(tmp_path):
    base = llama()
    base.resize_token_embeddings(48)
    theirs = get_peft_model(base, PeftConfig(r=2, target_modules=["q_proj"]))
    randomise(theirs).eval().save_pretrained(tmp_path, save_embedding_layers=True)
    assert "base_model.model.model.embed_tokens.weight" in load_file(tmp_path / WEIGHTS)
    refused(
        llama(),
        tmp_path,
        r"(embed_tokens|lm_head)\.weight, .* must be the model's own of shape \[40, 16\]; got \[48, 16\] \(was the "
        r"vocabulary resized\?",
    )
    resized = llama()
    torch.manual_seed(1)  # new rows of other values
    resized.resize_token_embeddings(48)
    refused(resized, tmp_path, r"must be the model's own; got other values \(PEFT would write them into the base model")
    for name in ("model.embed_tokens", "lm_head"):  # as the message says
        resized.get_submodule(name).load_state_dict(theirs.base_model.model.get_submodule(name).state_dict())
    torch.testing.assert_close(load_adapter(resized, tmp_path)(IDS).logits, theirs(IDS).logits)


@pytest.mark.parametrize(
    "options, message", [({"velora_config": {"rank": 2}}, r"velora_config is not supported and must be off; got")]
)
def test_each_refusal_names_the_field(options, message, tmp_path):
    peft_saved(tmp_path, **options)
    refused(llama(), tmp_path, message)


def named(name):
    return lambda key: key.replace(".weight", f".{name}.weight") if ".lora_" in key else key


KEYS = {
    "adapter name": named("default"),
    "another adapter name": named("mine"),
    "modules_to_save": lambda key: key.replace("lm_head.weight", "lm_head.modules_to_save.default.weight"),
    "no prefix": lambda key: key.removeprefix("base_model.model."),
    "compiled": lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
    "compiled block": lambda key: key.replace("layers.0.", "layers.0._orig_mod."),
    "FSDP": lambda key: key.replace("layers.0.", "layers.0._fsdp_wrapped_module."),
    "DistributedDataParallel": lambda key: f"module.{key}",
}


@pytest.mark.parametrize("rename", KEYS.values(), ids=KEYS)
def test_keys_that_others_write(rename, tmp_path):
    theirs = peft_saved(tmp_path, targets=["q_proj"], modules_to_save=["lm_head"])
    edit(tmp_path, lambda tensors: {rename(key): t for key, t in tensors.items()})
    torch.testing.assert_close(load_adapter(llama(), tmp_path)(IDS).logits, theirs(IDS).logits)


def test_two_adapters_in_one_file_are_refused(tmp_path):
    peft_saved(tmp_path, targets=["q_proj"])
    edit(tmp_path, lambda t: {named(name)(key): x.clone() for key, x in t.items() for name in ("one", "two")})
    refused(llama(), tmp_path, r"must hold one adapter; got .*q_proj\.lora_A\.one\.weight and .*lora_A\.two\.weight")


def test_a_copied_head_and_its_original(tmp_path):
    """A raw state dict holds the original beside the copy."""
    theirs = peft_saved(tmp_path, targets=["q_proj"], modules_to_save=["lm_head"])
    original = llama().lm_head.weight.detach().clone()
    edit(tmp_path, lambda t: t.update({HEAD + "original_module.weight": original}))
    model = load_adapter(llama(), tmp_path)
    torch.testing.assert_close(load_adapter(model, tmp_path)(IDS).logits, theirs(IDS).logits)


def test_an_older_version_s_configuration(tmp_path):
    theirs = peft_saved(tmp_path, targets=["q_proj", "v_proj"])
    old = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj", "v_proj"], "lora_alpha": 8, "lora_dropout": 0.0}
    old |= {"bias": "none", "enable_lora": None, "fan_in_fan_out": False, "merge_weights": False, "task_type": None}
    (tmp_path / CONFIG).write_text(json.dumps(old))
    torch.testing.assert_close(load_adapter(llama(), tmp_path)(IDS).logits, theirs(IDS).logits)


BAD_JSON = {
    "deep": ("[" * 100000 + "]" * 100000, "nested too deep"),
    "deep objects": ('{"a":' * 50000 + "1" + "}" * 50000, "nested too deep"),
    "many digits": ('{"peft_type": "LORA", "r": 1' + "0" * 5000 + "}", "must be JSON; got Exceeds the limit"),
    "large rank": ('{"peft_type": "LORA", "target_modules": ["q_proj"], "r": 1' + "0" * 50 + "}", "r must be at most"),
    "large alpha": (
        '{"peft_type": "LORA", "target_modules": ["q_proj"], "lora_alpha": 1' + "0" * 400 + "}",
        "lora_alpha must be a finite number; got a number of 1329 bits",
    ),
    "infinite alpha": (
        '{"peft_type": "LORA", "target_modules": ["q_proj"], "lora_alpha": 1e999}',
        "lora_alpha must be a finite number; got inf",
    ),
    "NaN": ('{"peft_type": "LORA", "lora_alpha": NaN}', "must be JSON; got the number NaN"),
    "Infinity": ('{"peft_type": "LORA", "revision": -Infinity}', "must be JSON; got the number -Infinity"),
    "lone surrogate": (r'{"peft_type": "LORA", "target_modules": ["q\ud800"]}', "must be JSON; got .*surrogates"),
    "lone surrogate in a key": (r'{"peft_type": "LORA", "\udfff": 1}', "must be JSON; got .*surrogates"),
    "key twice": ('{"r": 4, "peft_type": "LORA", "r": 8}', "must be JSON; got the key 'r' 2 times in one object"),
    "empty": ("", "must be JSON"),
    "cut": ('{"peft_type": "LO', "must be JSON"),
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_json_that_is_none_is_one_error_with_the_file_s_name(case, tmp_path):
    text, message = BAD_JSON[case]
    save_adapter(apply_lora(llama(), 2, target_modules=["q_proj"]), tmp_path)
    (tmp_path / CONFIG).write_text(text)
    model = llama()
    with pytest.raises(ValueError, match=rf"{CONFIG}.*{message}") as raised:
        load_adapter(model, tmp_path)
    assert len(str(raised.value).encode()) < 500
    assert not any(isinstance(module, LoRALinear) for module in model.modules())


def test_json_with_a_byte_order_mark_is_read(tmp_path):
    save_adapter(apply_lora(llama(), 2, target_modules=["q_proj"]), tmp_path)
    (tmp_path / CONFIG).write_bytes(b"\xef\xbb\xbf" + (tmp_path / CONFIG).read_bytes())
    load_adapter(llama(), tmp_path)


def test_saving_imports_no_peft(tmp_path):
    import subprocess
    import sys

    program = """
import sys
from torch import nn
from fused_lora import LoraConfig, apply_lora, load_adapter, save_adapter
save_adapter(apply_lora(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2)), sys.argv[1])
load_adapter(nn.Sequential(nn.Linear(4, 4)), sys.argv[1])
assert not {"peft", "transformers", "accelerate"} & set(sys.modules), sorted(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = PeftConfig.from_pretrained(tmp_path)
    assert config.r == 2 and config.target_modules == {"0"} and config.inference_mode
