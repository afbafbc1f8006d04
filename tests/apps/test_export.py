"""Merging into a model directory: plain transformers loads it and computes what the adapter model computes."""

import copy
import errno
import json
import os
import shutil

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from fused_lora import LoRALinear, apply_lora, save_adapter
from fused_lora.finetune.export import merge
from fused_lora.models import load_model, packaged_model

TOKENS = torch.arange(40).view(2, 20)


@pytest.fixture
def base(tiny_model, tmp_path):
    """Makes the directory of a tiny model, its head tied to the embedding or not."""

    def make(tied=True):
        directory = shutil.copytree(tiny_model, tmp_path / "base")
        torch.manual_seed(0)
        LlamaForCausalLM(AutoConfig.from_pretrained(directory, tie_word_embeddings=tied)).save_pretrained(directory)
        return directory

    return make


def adapted(directory, adapter, dtype=torch.float32, **lora):
    """The model with an adapter that is far from nothing, saved in `adapter`; returns its logits."""
    model, _ = load_model(directory, dtype, "cpu")
    apply_lora(model, 4, 8, **lora)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    save_adapter(model, adapter)
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def logits_of(directory, dtype=torch.float32):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    assert not [module for module in model.modules() if isinstance(module, LoRALinear)]
    with torch.no_grad():
        return model.eval()(TOKENS).logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"target_modules": ["q_proj", "lm_head"]},
        *({"modules_to_save": [name]} for name in ("norm", "embed_tokens", "lm_head")),
    ],
    ids=str,
)
def test_round_trip(base, tmp_path, tied, lora):
    directory = base(tied)
    want = adapted(directory, tmp_path / "adapter", **lora)
    merge(directory, tmp_path / "adapter", tmp_path / "out/merged", torch.float32)
    got = logits_of(tmp_path / "out/merged")
    assert (got - want).abs().max() < 1e-5 * want.abs().max() < (logits_of(directory) - want).abs().max()
    assert os.listdir(tmp_path / "out") == ["merged"]
    texts = [AutoTokenizer.from_pretrained(path)("a ü").input_ids for path in (directory, tmp_path / "out/merged")]
    assert texts[0] == texts[1]
    with safe_open(tmp_path / "out/merged/model.safetensors", "pt") as file:
        assert not [
            key
            for key in file.keys()  # noqa: SIM118  safe_open has no __iter__
            if "lora" in key or "modules_to_save" in key
        ]


def test_bf16_base(base, tmp_path):
    directory = base()
    want = adapted(directory, tmp_path / "adapter", torch.bfloat16).float()
    merge(directory, tmp_path / "adapter", tmp_path / "merged", torch.bfloat16)
    assert json.loads((tmp_path / "merged/config.json").read_text())["dtype"] == "bfloat16"
    got = logits_of(tmp_path / "merged", torch.bfloat16).float()
    assert (got - want).abs().max() < 0.05 * want.abs().max() < (logits_of(directory) - want).abs().max()


def test_no_file_is_overwritten(base, tmp_path):
    directory = base()
    adapted(directory, tmp_path / "adapter")
    with pytest.raises(ValueError, match="--output must be a new or an empty directory; got .*/base with"):
        merge(directory, tmp_path / "adapter", directory, torch.float32)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="--output must be a directory; got the file"):
        merge(directory, tmp_path / "adapter", tmp_path / "file", torch.float32)
    (tmp_path / "empty").mkdir()
    merge(directory, tmp_path / "adapter", tmp_path / "empty", torch.float32)
    assert (tmp_path / "empty/model.safetensors").exists()


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_merge_that_fails_leaves_nothing(base, tmp_path, monkeypatch, call):
    directory = base()
    adapted(directory, tmp_path / "adapter")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(OSError, match="No space left"):
            merge(directory, tmp_path / "adapter", tmp_path / "merged", torch.float32)
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base"]


def test_an_adapter_of_another_model_is_named(base, tmp_path):
    directory = base()
    adapted(directory, tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="adapter_model.safetensors must be a whole safetensors file"):
        merge(directory, tmp_path / "adapter", tmp_path / "merged", torch.float32)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        merge(directory, tmp_path / "nowhere", tmp_path / "merged", torch.float32)
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base"]


def test_smollm2_merges_out_of_its_gguf_file(tmp_path, monkeypatch):
    """The packaged model comes quantised; what is merged is a plain fp32 directory of the same numbers."""
    model, tokenizer = load_model(packaged_model(), torch.float32, "cpu")
    again = copy.deepcopy(model)  # reading the GGUF file takes ten seconds
    monkeypatch.setattr("fused_lora.finetune.export.load_model", lambda *arguments: (again, tokenizer))
    apply_lora(model, 4, 8, target_modules=["q_proj", "down_proj"])
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(1))
    save_adapter(model, tmp_path / "adapter")
    with torch.no_grad():
        want = model(TOKENS).logits
    merge(packaged_model(), tmp_path / "adapter", tmp_path / "merged", torch.float32)
    assert (logits_of(tmp_path / "merged") - want).abs().max() < 1e-4 * want.abs().max()
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
