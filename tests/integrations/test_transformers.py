"""transformers' save_pretrained, from_pretrained, Trainer and generate with models of apply_lora."""

import copy
import io
import json

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tiny_llama import randomise, same_start
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel, Trainer, TrainingArguments

import fused_lora
from fused_lora import LoraConfig, apply_lora, load_adapter, merged, save_adapter, set_adapter

peft = pytest.importorskip("peft", reason="needs peft, which reads adapter folders for transformers")
IDS = torch.arange(24).reshape(2, 12) * 5 % 60
SHAPE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
FILES = ["adapter_config.json", "adapter_model.safetensors"]


def llama(**more) -> LlamaForCausalLM:
    torch.manual_seed(0)
    tokens = dict(vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, **tokens, max_position_embeddings=64, **more)).eval()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A saved base model."""
    path = tmp_path_factory.mktemp("base")
    llama().save_pretrained(path)
    return path


def base_of(directory):
    return AutoModelForCausalLM.from_pretrained(directory).eval()


def logits(model, **inputs):
    with torch.no_grad():
        return model.eval()(**(inputs or {"input_ids": IDS})).logits


def close(got, want):
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def written(folder):
    return sorted(file.name for file in folder.iterdir() if file.name != "generation_config.json")


def test_save_pretrained_writes_an_adapter_folder(directory, tmp_path):
    model = randomise(apply_lora(base_of(directory), r=4, lora_alpha=16, modules_to_save=["lm_head"]))
    assert type(model).__name__ == "LlamaForCausalLM" and isinstance(model, LlamaForCausalLM)
    model.save_pretrained(tmp_path / "theirs")
    save_adapter(model, tmp_path / "ours")
    assert written(tmp_path / "theirs") == written(tmp_path / "ours") == FILES
    want, got = (load_file(tmp_path / name / FILES[1]) for name in ("ours", "theirs"))
    assert got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want)
    assert (tmp_path / "theirs" / FILES[0]).read_bytes() == (tmp_path / "ours" / FILES[0]).read_bytes()
    close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")), logits(model))
    close(logits(peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "theirs")), logits(model))
    assert torch.equal(logits(load_adapter(base_of(directory), tmp_path / "theirs")), logits(model))


def test_a_base_from_nowhere_is_saved_beside_its_adapter(tmp_path):
    model = randomise(apply_lora(llama(tie_word_embeddings=True), r=4, modules_to_save=["lm_head"]))
    model.save_pretrained(tmp_path)
    assert written(tmp_path) == [*FILES, "config.json", "model.safetensors"]
    assert not [key for key in load_file(tmp_path / "model.safetensors") if "lora" in key or "modules_to_save" in key]
    close(logits(load_adapter(base_of_folder(tmp_path), tmp_path)), logits(model))
    close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def base_of_folder(folder):
    """The base model in a folder that holds an adapter, too."""
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder))
    outcome = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    assert not outcome.unexpected_keys and outcome.missing_keys == ["lm_head.weight"]  # tied
    return model


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: torch.load(pickled(model), weights_only=False),
    "compiled": lambda model: torch.compile(model, backend="eager"),
}


def pickled(model) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return buffer


@pytest.mark.parametrize("kind", COPIES)
def test_copies_and_wrappers_save_adapters_too(kind, directory, tmp_path):
    model = randomise(apply_lora(base_of(directory), r=4))
    twin = COPIES[kind](model)
    randomise(twin, seed=2)
    twin.save_pretrained(tmp_path)
    assert written(tmp_path) == FILES
    twin = getattr(twin, "_orig_mod", twin)
    assert torch.equal(logits(load_adapter(base_of(directory), tmp_path)), logits(twin))
    assert (kind == "compiled") == torch.equal(logits(model), logits(twin))


def test_inner_models_and_state_dicts_from_elsewhere(directory, tmp_path):
    model = randomise(apply_lora(base_of(directory), r=4))
    model.model.save_pretrained(tmp_path / "inner")
    inner = load_adapter(LlamaModel.from_pretrained(directory), tmp_path / "inner")
    assert torch.equal(inner(IDS).last_hidden_state, model.model(IDS).last_hidden_state)
    state = {f"_orig_mod.{key}": tensor * 2 for key, tensor in model.state_dict().items()}  # as an engine gathers it
    model.save_pretrained(tmp_path / "given", state_dict=state)
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
    want = 2 * model.model.layers[0].mlp.up_proj.lora_B["default"]
    assert torch.equal(load_file(tmp_path / "given" / FILES[1])[key], want)
    assert any("lora_A" in key for key in model.state_dict()) and "model.embed_tokens.weight" in model.state_dict()


def test_new_models_of_the_adapted_class_are_plain(directory):
    model = apply_lora(base_of(directory), r=4)
    for plain in (type(model)(model.config), type(model).from_pretrained(directory)):
        assert type(plain) is LlamaForCausalLM
    assert type(fused_lora.unload(model)) is LlamaForCausalLM


def test_peft_refuses_an_adapted_model(directory):
    model = apply_lora(base_of(directory), r=4, target_modules=["q_proj"])
    with pytest.raises(AttributeError, match=r"fused_lora\.unload\(model\) gives it back; got one with adapters"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["v_proj"]))


def test_sharded_models_save_whole_adapters(directory, tmp_path):
    model = randomise(apply_lora(base_of(directory), r=4, modules_to_save=["lm_head"]))
    model.save_pretrained(tmp_path / "whole")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        for layer in (*model.model.layers, model):
            fully_shard(layer)
        model(IDS)
        model.save_pretrained(tmp_path / "sharded")
        assert type(model).__name__ == "FSDPLlamaForCausalLM" and hasattr(model.lm_head.weight, "full_tensor")
    finally:
        dist.destroy_process_group()
    for name in FILES:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "sharded" / name).read_bytes()


def test_merged_models_save_plain_ones(directory, tmp_path):
    model = randomise(apply_lora(base_of(directory), r=4))
    want = logits(model)
    with merged(model):
        model.save_pretrained(tmp_path)
    close(logits(LlamaForCausalLM.from_pretrained(tmp_path)), want)
    model.model.layers[0].mlp.up_proj.merge()
    with pytest.raises(ValueError, match="must be merged as others are, or all unmerged, to be saved"):
        model.save_pretrained(tmp_path)


def test_the_methods_of_transformers_for_adapters(directory, tmp_path):
    model = randomise(apply_lora(base_of(directory), r=4))
    first, plain = logits(model), logits(base_of(directory))
    model.save_pretrained(tmp_path)
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), "second")
    second = logits(randomise(model, seed=3))
    assert model.active_adapters() == ["second"] and set(model.peft_config) == {"default", "second"}
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.disable_adapters()
    assert torch.equal(logits(model), plain) and model.active_adapters() == []
    with pytest.raises(ValueError, match=r"one adapter must be active to be saved, set_adapter says which; got \[\]"):
        model.save_pretrained(tmp_path / "none")
    model.enable_adapters()
    assert torch.equal(logits(model), first)
    model.disable_adapters()
    model.set_adapter("second")  # which enables it
    model.enable_adapters()
    assert torch.equal(logits(model), second)
    model.disable_adapters()
    assert torch.equal(logits(model), plain)
    model.enable_adapters()
    assert torch.equal(logits(model), second)
    model.load_adapter(tmp_path, "third")
    model.delete_adapter(["default"])
    assert model.active_adapters() == ["third"] and torch.equal(logits(model), first)
    model.set_adapter("second")
    assert torch.equal(logits(model), second)
    attributes = vars(base_of(directory)).keys()
    model.disable_adapters()
    model.delete_adapter(["second", "third"])
    assert type(model) is LlamaForCausalLM and torch.equal(logits(model), plain) and vars(model).keys() == attributes


def test_load_adapter_takes_the_words_of_transformers(directory, tmp_path):
    model = randomise(apply_lora(base_of(directory), r=4))
    model.save_pretrained(tmp_path)
    want = logits(model)
    model.load_adapter(str(tmp_path), "rests", is_trainable=False, low_cpu_mem_usage=True, local_files_only=True)
    assert torch.equal(logits(model), want) and not model.model.layers[0].mlp.up_proj.lora_A["rests"].requires_grad
    for arguments, message in (
        (dict(peft_model_id=tmp_path), "adapter_name must be an adapter's with hotswap=True, else new; got 'default'"),
        (dict(peft_model_id=tmp_path, adapter_name="x", hotswap=True), "else new; got 'x' beside .*hotswap=True"),
        (dict(peft_model_id=tmp_path, hotswap="yes"), "hotswap must be True, False or 'auto'; got 'yes'"),
    ):
        with pytest.raises(ValueError, match=message):
            model.load_adapter(**arguments)
    with pytest.raises(ValueError, match="hotswap=True. swaps adapters of one rank"):
        model.enable_peft_hotswap(target_rank=8)
    model.set_adapter("default")
    randomise(model, seed=7)
    assert not torch.equal(logits(model), want)
    model.load_adapter(tmp_path, hotswap=True)
    assert model.active_adapters() == ["default"] and torch.equal(logits(model), want)


def test_copies_that_are_made_from_the_class_alone(directory):
    """DataParallel's replicas, accelerate's compile_regions."""
    from accelerate.utils import compile_regions

    model = randomise(apply_lora(base_of(directory), r=4))
    want = logits(model)
    twin = model._replicate_for_data_parallel()
    assert type(twin) is type(model) and twin.peft_config.keys() == {"default"}
    assert torch.equal(logits(compile_regions(model, backend="eager")), want)
    assert type(type(model)(model.config)) is LlamaForCausalLM


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"use_dora": True},
        {"lora_bias": True},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens"]},
    ],
)
def test_the_state_dict_of_peft_s_layers_is_read(directory, tmp_path, lora):
    """As the trainer of sentence-transformers resumes, from a model that transformers has made of the folder."""
    model = randomise(apply_lora(base_of(directory), r=4, **lora))
    model.save_pretrained(tmp_path)
    want = logits(model)
    theirs = peft.PeftModel.from_pretrained(base_of(directory), tmp_path).base_model.model
    randomise(model, seed=9)
    model.load_state_dict(theirs.state_dict())
    close(logits(model), want)


def test_generate_uses_the_adapter_and_the_cache(directory):
    model = randomise(apply_lora(base_of(directory), r=4), seed=4)
    prompt = dict(input_ids=IDS[:, :4], attention_mask=torch.ones(2, 4, dtype=torch.long), max_new_tokens=6)
    got, slow = (model.generate(**prompt, do_sample=False, use_cache=cache) for cache in (True, False))
    want = fused_lora.merge_and_unload(copy.deepcopy(model)).generate(**prompt, do_sample=False)
    assert torch.equal(got, slow) and torch.equal(got, want)


# --- Trainer


def rows(n=16):
    generator = torch.Generator().manual_seed(5)
    ids = [torch.randint(3, 60, (8,), generator=generator) for _ in range(n)]
    return [{"input_ids": row, "labels": row} for row in ids]


def trained(model, folder, resume=None, **arguments):
    """Losses of a short run, and the trainer."""
    given = dict(per_device_train_batch_size=2, learning_rate=0.01, logging_steps=1, seed=1, max_steps=4)
    given |= dict(use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", lr_scheduler_type="constant")
    settings = TrainingArguments(str(folder), **{**given, **arguments})
    trainer = Trainer(model, settings, train_dataset=rows(), eval_dataset=rows(4))
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer


def ours(directory, **lora):
    return same_start(apply_lora(base_of(directory), **{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **lora}))


def peer(directory, **lora):
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **lora})
    return same_start(peft.get_peft_model(base_of(directory), config))


TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


RUNS = {
    "plain": {},
    "bf16": dict(bf16=True),
    "fp16": dict(fp16=True),
    "reentrant": dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}),
    "not reentrant": dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}),
    "accumulation": dict(gradient_accumulation_steps=2, per_device_train_batch_size=1),
    "compiled": dict(torch_compile=True, torch_compile_backend="aot_eager"),
}


def fused(directory, **lora):
    fused_lora_peft = pytest.importorskip("fused_lora.peft")
    model = peer(directory, **lora)
    fused_lora_peft.fuse(model, strict=True)
    return model


@pytest.mark.parametrize(
    "make, run", [(ours, run) for run in RUNS] + [(fused, run) for run in RUNS if run != "compiled"]
)
def test_trainer_s_losses_are_peft_s(run, make, directory, tmp_path):
    got, trainer = trained(make(directory), tmp_path, **RUNS[run])
    want, _ = trained(peer(directory), tmp_path, **(RUNS[run] if run != "compiled" else {}))
    assert len(got) == 4 and got[-1] != got[0]
    torch.testing.assert_close(got, want, atol=2e-2 if "16" in run else 1e-4, rtol=0)
    assert all(torch.count_nonzero(p) for name, p in trainer.model.named_parameters() if "lora_B" in name)


def test_trainer_s_checkpoints_hold_adapters_and_resume(directory, tmp_path, caplog):
    every = dict(save_strategy="steps", save_steps=2, dataloader_num_workers=0)
    lora = dict(lora_dropout=0.1, modules_to_save=["lm_head"])
    want, whole = trained(ours(directory, **lora), tmp_path, **every)
    checkpoint = tmp_path / "checkpoint-2"
    assert set(FILES) <= set(written(checkpoint)) and "config.json" not in written(checkpoint)
    held = load_file(checkpoint / "model.safetensors")
    assert held and not [key for key in held if "lora_" not in key and "modules_to_save" not in key]
    got, resumed = trained(ours(directory, **lora), tmp_path, resume=str(checkpoint), **every)
    assert got[-2:] == want[-2:] and "keys in the checkpoint" not in caplog.text
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    whole.save_model(tmp_path / "final")
    assert "model.safetensors" not in written(tmp_path / "final")
    close(logits(peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "final")), logits(whole.model))


def test_fused_peft_models_resume_and_bring_the_best_back(directory, tmp_path):
    every = dict(save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True)
    every |= dict(metric_for_best_model="loss", greater_is_better=True)
    want, whole = trained(fused(directory), tmp_path, **every)
    losses = [entry["eval_loss"] for entry in whole.state.log_history if "eval_loss" in entry]
    assert whole.evaluate()["eval_loss"] == pytest.approx(max(losses), abs=1e-6)
    got, _ = trained(fused(directory), tmp_path, resume=str(tmp_path / "checkpoint-2"), **every)
    assert got[-2:] == want[-2:]


def test_several_active_adapters_are_saved_and_resume(directory, tmp_path):
    """A folder each, as PEFT writes them."""

    def two():
        model = same_start(apply_lora(ours(directory), r=2, target_modules=["q_proj"], adapter_name="second"))
        set_adapter(model, ["default", "second"])
        return model

    every = dict(save_strategy="steps", save_steps=2)
    want, whole = trained(two(), tmp_path, **every)
    checkpoint = tmp_path / "checkpoint-2"
    assert written(checkpoint / "default") == written(checkpoint / "second") == FILES
    got, _ = trained(two(), tmp_path, resume=str(checkpoint), **every)
    assert got[-2:] == want[-2:]
    whole.save_model(tmp_path / "final")
    with pytest.raises(ValueError, match=r"one adapter must be active to be pushed, .*; got \['default', 'second'\]"):
        whole.model.save_pretrained(tmp_path / "pushed", push_to_hub=True)
    assert not (tmp_path / "pushed").exists()
    model = peft.PeftModel.from_pretrained(base_of(directory), tmp_path / "final" / "default")
    model.load_adapter(tmp_path / "final" / "second", "second")
    model.base_model.set_adapter(["default", "second"])
    close(logits(model), logits(whole.model))


def test_the_best_model_comes_back(directory, tmp_path, caplog):
    best = dict(load_best_model_at_end=True, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1)
    best |= dict(metric_for_best_model="loss", greater_is_better=True)  # so that it is not the last one
    _, trainer = trained(ours(directory), tmp_path, **best)
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == 4 and trainer.state.best_global_step != 4
    assert trainer.evaluate()["eval_loss"] == pytest.approx(max(losses), abs=1e-6)
    assert "missing keys" not in caplog.text


def test_trainer_s_checkpoint_of_a_base_from_nowhere_resumes(tmp_path):
    every = dict(save_strategy="steps", save_steps=2)
    want, _ = trained(same_start(apply_lora(llama(), r=4)), tmp_path, **every)
    torch.manual_seed(9)
    other = LlamaForCausalLM(llama().config)
    torch.nn.init.normal_(other.lm_head.weight)  # another base than that of the checkpoint
    got, _ = trained(apply_lora(other, r=4), tmp_path, resume=str(tmp_path / "checkpoint-2"), **every)
    assert got[-2:] == want[-2:]
    config = json.loads((tmp_path / "checkpoint-2" / FILES[0]).read_text())
    assert config["base_model_name_or_path"] is None
    set_adapter(other, None)
