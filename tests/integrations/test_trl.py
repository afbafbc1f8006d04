"""TRL's trainers with models of apply_lora: losses as with PEFT's, and a reference model that is the right one."""

import contextlib
import math
import os

import pytest
import torch
from tiny_llama import randomise, same_start
from transformers import AutoModelForCausalLM, AutoTokenizer

from fused_lora import LoRALinear, apply_lora, load_adapter, reference_model, save_adapter, set_adapter

peft = pytest.importorskip("peft", reason="needs peft, to compare with")
pytest.importorskip("trl", reason="needs trl")
datasets = pytest.importorskip("datasets", reason="needs datasets, which TRL reads from")
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer  # noqa: E402

LORA = dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
TEXTS = ["one two three", "a b c d e f", "hello, world", "the quick brown fox", "x = y + z", "to be or not"] * 2


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory):
    """A trained-looking adapter of the tiny model."""
    directory = tmp_path_factory.mktemp("adapter")
    save_adapter(randomise(apply_lora(AutoModelForCausalLM.from_pretrained(tiny_model), **LORA)), directory)
    return directory


def base(directory):
    return AutoModelForCausalLM.from_pretrained(directory)


def losses(kind, config, model, directory, data, folder, **more):
    arguments = dict(per_device_train_batch_size=2, max_steps=3, learning_rate=0.01, logging_steps=1, seed=1)
    arguments |= dict(use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", max_length=32)
    arguments |= dict(lr_scheduler_type="constant", bf16=False)
    settings = {key: more.pop(key) for key in ("gradient_checkpointing", "max_steps", "beta") if key in more}
    tokenizer = AutoTokenizer.from_pretrained(directory)
    trainer = kind(
        model,
        args=config(str(folder), **{**arguments, **settings}),
        train_dataset=datasets.Dataset.from_list(data),
        processing_class=tokenizer,
        **more,
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sft_losses_are_peft_s(checkpointing, tiny_model, tmp_path):
    data = [{"text": text} for text in TEXTS]
    run = (tiny_model, data, tmp_path)
    ours = same_start(apply_lora(base(tiny_model), **LORA))
    got, trainer = losses(SFTTrainer, SFTConfig, ours, *run, gradient_checkpointing=checkpointing)
    theirs = same_start(peft.get_peft_model(base(tiny_model), peft.LoraConfig(**LORA)))
    want, _ = losses(SFTTrainer, SFTConfig, theirs, *run, gradient_checkpointing=checkpointing)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
    assert all(torch.count_nonzero(p) for name, p in trainer.model.named_parameters() if "lora_B" in name)
    trainer.save_model(tmp_path / "final")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(os.listdir(tmp_path / "final"))
    assert "model.safetensors" not in os.listdir(tmp_path / "final")


def test_an_adapter_on_the_head_that_trl_passes_by_is_named(tiny_model, tmp_path):
    model = apply_lora(base(tiny_model), r=4, target_modules=["q_proj", "lm_head"])
    data = [{"text": text} for text in TEXTS]
    with pytest.warns(UserWarning, match="lm_head"):  # TRL multiplies with the head's weight itself
        losses(SFTTrainer, SFTConfig, model, tiny_model, data, tmp_path)


def test_peft_config_under_patched_trains_fused_layers(tiny_model, tmp_path):
    fused = pytest.importorskip("fused_lora.peft")
    data, curves = [{"text": text} for text in TEXTS], []
    for context in (contextlib.nullcontext(), fused.patched()):
        torch.manual_seed(0)
        config = peft.LoraConfig(**LORA)
        with context:
            got, trainer = losses(
                SFTTrainer, SFTConfig, base(tiny_model), tiny_model, data, tmp_path, peft_config=config
            )
        curves.append(got)
    torch.testing.assert_close(curves[0], curves[1], atol=1e-4, rtol=0)
    layers = [module for module in trainer.model.modules() if isinstance(module, peft.tuners.lora.Linear)]
    assert layers and not [layer for layer in layers if type(layer) is peft.tuners.lora.Linear]


def test_grpo_is_peft_s(tiny_model, tmp_path):
    def run(model):
        settings = dict(num_generations=4, max_completion_length=8, per_device_train_batch_size=4, max_steps=2, seed=1)
        settings |= dict(use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", bf16=False, logging_steps=1)
        trainer = GRPOTrainer(
            randomise(model),
            reward_funcs=lambda completions, **_: [float(len(set(text))) for text in completions],
            args=GRPOConfig(str(tmp_path), learning_rate=0.01, **settings),
            train_dataset=datasets.Dataset.from_list([{"prompt": text} for text in TEXTS]),
            processing_class=AutoTokenizer.from_pretrained(tiny_model),
        )
        trainer.train()
        return [(entry["reward"], entry["grad_norm"]) for entry in trainer.state.log_history if "reward" in entry]

    got = run(apply_lora(base(tiny_model), **LORA))
    want = run(peft.get_peft_model(base(tiny_model), peft.LoraConfig(**LORA)))
    assert len(got) == 2 and all(norm > 0 for _, norm in got)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def pairs():
    return [{"prompt": text[:4], "chosen": text[4:], "rejected": text[4:][::-1]} for text in TEXTS]


def test_dpo_from_a_trained_adapter_compares_with_that_adapter(tiny_model, adapter, tmp_path):
    run = (tiny_model, pairs(), tmp_path)
    ours = load_adapter(base(tiny_model), adapter)
    for layer in ours.modules():
        if isinstance(layer, LoRALinear):
            layer.set_hyperparameters("default", lora_alpha=8, lora_dropout=0.5, use_rslora=False)
    got, trainer = losses(DPOTrainer, DPOConfig, ours, *run, ref_model=reference_model(ours))  # which needs no dropout
    theirs = peft.PeftModel.from_pretrained(base(tiny_model), adapter, is_trainable=True)
    want, _ = losses(DPOTrainer, DPOConfig, theirs, *run)
    assert got[0] == pytest.approx(math.log(2), abs=1e-5) and got[-1] != got[0]
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
    assert trainer.ref_model is not None


def test_dpo_without_a_reference_compares_with_the_base_model(tiny_model, adapter, tmp_path):
    run = (tiny_model, pairs(), tmp_path)
    fresh, _ = losses(DPOTrainer, DPOConfig, same_start(apply_lora(base(tiny_model), **LORA)), *run, max_steps=1)
    assert fresh[0] == pytest.approx(math.log(2), abs=1e-5)
    _, trainer = losses(DPOTrainer, DPOConfig, load_adapter(base(tiny_model), adapter), *run, max_steps=1)
    for (name, got), want in zip(trainer.ref_model.named_parameters(), base(tiny_model).parameters(), strict=True):
        assert torch.equal(got, want), name


def test_a_reference_shares_the_base_and_stays(tiny_model, adapter):
    model = load_adapter(base(tiny_model), adapter)
    twin = reference_model(model)
    ids = torch.arange(16)[None]
    want = model(ids).logits.detach()
    assert not any(parameter.requires_grad for parameter in twin.parameters())
    mine = {p.data_ptr() for name, p in model.named_parameters() if "lora_" in name}
    assert {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in model.parameters()} == {
        p.data_ptr() for p in model.parameters()
    } - mine
    randomise(model, seed=8)
    set_adapter(model, None)
    assert torch.equal(twin(ids).logits, want)
    with pytest.raises(ValueError, match="model must have adapters of this library; got one without"):
        reference_model(base(tiny_model))
