"""Models whose tensors have two names: transformers' save_pretrained and Trainer write each once and read it again."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny_llama import randomise
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from fused_lora.adapters import apply_lora, merge_and_unload, merged
from fused_lora.testing import assert_exact

IDS = torch.arange(12)[None]


def llama(tie=True) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=40)
    return LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=32, tie_word_embeddings=tie)).eval()


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    shape = dict(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=40, decoder_start_token_id=0)
    return T5ForConditionalGeneration(T5Config(**shape)).eval()


class Shared(LlamaForCausalLM):
    """One linear layer under two names."""

    def __init__(self, config):
        super().__init__(config)
        self.extra = self.model.layers[0].mlp.up_proj


def shared() -> Shared:
    torch.manual_seed(0)
    shape = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=40)
    return Shared(LlamaConfig(**shape, max_position_embeddings=32)).eval()


CASES = {
    "copied head": (llama, ["q_proj"], ["lm_head"]),
    "copied embedding": (llama, ["q_proj"], ["embed_tokens"]),
    "both copied": (llama, ["q_proj"], ["embed_tokens", "lm_head"]),
    "adapter on the head": (llama, ["q_proj", "lm_head"], []),
    "not tied": (lambda: llama(False), ["q_proj"], ["lm_head"]),
    "one embedding under three names": (t5, ["q"], ["shared"]),
    "one layer under two names": (shared, ["up_proj"], []),
}


@pytest.mark.parametrize("case", CASES)
def test_save_pretrained_writes_all_that_a_state_dict_needs(case, tmp_path):
    make, targets, saved = CASES[case]

    def adapted(seed):
        return randomise(apply_lora(make(), r=2, target_modules=targets, modules_to_save=saved), seed)

    model = adapted(1)
    model.save_pretrained(tmp_path / "checkpoint-1")
    twin = adapted(2)  # what Trainer does with a checkpoint
    outcome = twin.load_state_dict(load_file(tmp_path / "checkpoint-1" / "model.safetensors"), strict=False)
    wrapped = {key for key in make().state_dict() if any(f".{key}".endswith(f".{name}.weight") for name in saved)}
    assert set(outcome.unexpected_keys) <= wrapped  # the base under the plain model's names
    assert_exact(dict(twin.state_dict()), {key: t.double() for key, t in model.state_dict().items()})
    with merged(model):
        model.save_pretrained(tmp_path / "merged")
    keys = load_file(tmp_path / "merged" / "model.safetensors").keys()
    assert not [key for key in keys if "lora_" in key or "modules_to_save" in key or "original_module" in key]


def test_trainer_s_checkpoint_resumes(tmp_path):
    def trainer(steps):
        model = apply_lora(llama(), r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
        arguments = dict(max_steps=steps, save_steps=2, per_device_train_batch_size=1, report_to=[], use_cpu=True)
        arguments |= dict(disable_tqdm=True, lr_scheduler_type="constant", learning_rate=0.01, logging_steps=1)
        data = [{"input_ids": IDS[0] + i, "labels": IDS[0] + i} for i in range(8)]
        return Trainer(model, TrainingArguments(str(tmp_path / "run"), **arguments), train_dataset=data)

    whole = trainer(4)
    whole.train()
    resumed = trainer(4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert torch.count_nonzero(whole.model.model.layers[0].self_attn.q_proj.lora_B["default"])
    for (name, want), got in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(got, want, msg=name)


@pytest.mark.parametrize(
    "targets, saved, tied",
    [
        (["embed_tokens"], [], False),
        (["q_proj"], ["embed_tokens"], False),
        (["q_proj"], ["lm_head"], False),
        (["q_proj"], [], True),
    ],
)
def test_a_merged_model_says_whether_head_and_embedding_are_one(targets, saved, tied, tmp_path):
    model = randomise(apply_lora(llama(), r=2, target_modules=targets, modules_to_save=saved), 1)
    want = model(IDS).logits
    with merged(model):
        assert model.config.tie_word_embeddings == tied
        model.save_pretrained(tmp_path)
    assert model.config.tie_word_embeddings
    torch.testing.assert_close(LlamaForCausalLM.from_pretrained(tmp_path)(IDS).logits, want)
    net = torch.nn.Sequential(torch.nn.Linear(4, 4))
    net.config = SimpleNamespace(tie_word_embeddings=True)  # of no model of transformers
    with merged(apply_lora(net, r=2, target_modules=["0"])):
        assert net.config.tie_word_embeddings


@pytest.mark.parametrize("way", ("merged", "layer by layer"))
def test_a_merged_head_is_saved_as_what_it_is_no_embedding_any_more(way, tmp_path):
    """In what is written, also by hand from state dict and configuration; in the model itself the two are one again."""
    model = randomise(apply_lora(llama(), r=2, target_modules=["q_proj", "lm_head"]), 1)
    want = model(IDS).logits
    if way == "merged":
        with merged(model):
            model.save_pretrained(tmp_path)
            assert not model.config.tie_word_embeddings
    else:
        layers = [module for module in model.modules() if hasattr(module, "lora_A")]
        for layer in layers:
            layer.merge()
        model.save_pretrained(tmp_path)
        for layer in layers:
            layer.unmerge()
    assert model.config.tie_word_embeddings and model.lm_head.weight is model.model.embed_tokens.weight
    plain = LlamaForCausalLM.from_pretrained(tmp_path)
    assert not plain.config.tie_word_embeddings
    torch.testing.assert_close(plain(IDS).logits, want)


def bart() -> BartForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {f"{half}_{what}": n for half in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 24))}
    heads = dict(encoder_attention_heads=2, decoder_attention_heads=2, decoder_start_token_id=2)
    return BartForConditionalGeneration(BartConfig(vocab_size=40, d_model=16, **sizes, **heads)).eval()


@pytest.mark.parametrize("way", ["merged", "merge_and_unload"])
@pytest.mark.parametrize("make, target", [(bart, "lm_head"), (bart, "shared"), (t5, "shared"), (t5, "lm_head")])
def test_an_encoder_decoder_whose_head_or_embedding_is_merged(make, target, way, tmp_path):
    """Encoder and decoder have the embedding, too: nothing ties them again to what the file then says is untied."""
    model = randomise(apply_lora(make(), r=2, target_modules=["q" if make is t5 else "q_proj", target]), 1)
    logits = lambda model: model(input_ids=IDS, decoder_input_ids=IDS).logits
    want = logits(model)
    if way == "merged":
        with merged(model):
            model.save_pretrained(tmp_path)
    else:
        plain = merge_and_unload(model)
        torch.testing.assert_close(logits(plain), want)
        plain.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(type(make()).from_pretrained(tmp_path)), want)
