"""Fine-tuning with other optimizers, variants and merges, of the whole model, and by a recipe: runs that learn, resume
bit for bit, and write what PEFT and transformers read."""

import json
import shutil

import pytest
import torch
from finetune_runs import FILES, refused_unloaded, rows_of
from safetensors import safe_open
from safetensors.torch import load_file

from fused_lora.finetune import job
from fused_lora.finetune.settings import OPTIMIZERS, Settings

KINDS = {name: dict(optimizer=name) for name in OPTIMIZERS[1:]}
KINDS["rslora"] = dict(variant="rslora")
KINDS["dora"] = dict(variant="dora", rslora=True)
KINDS["allora"] = dict(variant="allora", alpha=4.0)
KINDS["allora, update"] = dict(variant="allora", alpha=4.0, allora_mode="update")
KINDS["merges"] = dict(merge_every=2)
KINDS["merges, rite, bf16"] = dict(merge_every=2, optimizer="rite", dtype="bf16")
KINDS["full"] = dict(full=True)


class Killed(Exception):
    pass


def kill(row):
    if row["step"] == 5:
        raise Killed


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_learns_and_resumes_bit_for_bit(tiny, run, settings_of, tmp_path, kind):
    settings = settings_of(tiny, **KINDS[kind])
    summary = run(settings, tmp_path / "whole")
    assert summary["perplexity_after"] < summary["perplexity_before"]
    with pytest.raises(Killed):
        run(settings, tmp_path / "killed", save_every=3, tick=kill)
    torch.rand(5)
    run(settings, tmp_path / "killed", resume=True)
    names = FILES[:3] if kind != "full" else ["checkpoint.safetensors", "model/model.safetensors"]
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name
    losses = [[row.get("loss") for row in rows_of(tmp_path / name)] for name in ("whole", "killed")]
    assert losses[0] == losses[1]


def test_a_checkpoint_of_lora_fa_holds_the_A_that_it_was_trained_with(tiny, run, settings_of, tmp_path):
    """On another machine it would be drawn otherwise."""
    run(settings_of(tiny, optimizer="lora-fa"), tmp_path / "run")
    adapter = load_file(tmp_path / "run/adapter_model.safetensors")
    with safe_open(tmp_path / "run/checkpoint.safetensors", "pt") as file:
        kept = [file.get_tensor(key) for key in file.keys() if ".lora_A." in key]  # noqa: SIM118
    assert kept and all(any(torch.equal(t, A) for A in adapter.values()) for t in kept)


@pytest.mark.parametrize("kind", ["merges", "dora", "full"])
def test_what_a_run_writes_is_what_it_measured(tiny, run, settings_of, tmp_path, kind):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    settings = settings_of(tiny, **KINDS[kind])
    summary = run(settings, tmp_path / "out", eval_every=0)
    if kind == "full":
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
        assert not (tmp_path / "out" / "adapter_config.json").exists()
    else:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny[0]), tmp_path / "out")
        tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
        ranks = {len(t) for key, t in tensors.items() if "lora_A" in key}
        assert ranks == ({12} if kind == "merges" else {4}), "three stages of rank 4, and a fresh fourth left out"
    _, _, _, measured = job._load(settings, lambda line: None)
    from fused_lora.finetune.loop import held_out_loss

    loss = held_out_loss(model, measured, 2, "cpu")
    assert torch.tensor(loss).exp().item() == pytest.approx(summary["perplexity_after"], rel=1e-4)


def test_the_groups_of_loraplus_keep_their_ratio(tiny, run, settings_of, tmp_path, monkeypatch):
    seen, real = [], torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        seen.append(sorted({round(group["lr"], 9) for group in self.param_groups}))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    run(settings_of(tiny, optimizer="loraplus", steps=3, lr=1e-3), tmp_path / "out")
    assert [rates[-1] / rates[0] for rates in seen] == pytest.approx([16, 16, 16])


@pytest.mark.parametrize(
    "change, match",
    [
        (dict(optimizer="lyon"), "optimizer must be one of .*'adamw'.*; got 'lyon' .did you mean 'lion'"),
        (dict(variant="doar"), "did you mean 'dora'"),
        (dict(schedule="stairs"), "schedule must be one of"),
        (dict(final_share=1.5), r"final_share must be a number in \[0, 1\]; got 1.5"),
        (dict(schedule="constant", final_share=0.1), "--schedule constant and --final-share 0.1 exclude each other"),
        (dict(merge_every=-1), "merge_every must be an int >= 0; got -1"),
        (dict(full=True, variant="dora"), "--full and --variant dora exclude each other"),
        (dict(full=True, optimizer="rite"), "--full and --optimizer rite exclude each other"),
        (dict(full=True, rslora=True), "--full and --rslora exclude each other"),
        (dict(full=True, rank=3), "--full and --rank 3 exclude each other"),
        (dict(full=True, alpha=7.0), "--full and --alpha 7 exclude each other"),
        (dict(full=True, target_modules="q_proj"), "--full and --target-modules q_proj exclude each other"),
        (dict(full=True, dropout=0.1), "--full and --dropout 0.1 exclude each other"),
        (dict(full=True, merge_every=3), "--full and --merge-every 3 exclude each other"),
        (dict(full=True, dtype="bf16"), "--full, which trains the weights in fp32, and --dtype bf16 exclude"),
        (dict(merge_every=3, variant="dora"), "--merge-every and --variant dora exclude each other"),
        (dict(merge_every=3, optimizer="lora-fa"), "--merge-every and --optimizer lora-fa exclude each other"),
        (dict(variant="allora", dropout=0.1), "--dropout 0.1 and --variant allora exclude each other"),
        (dict(variant="allora", alpha=8.0), "--alpha 8 and --variant allora, whose scale is 1, exclude each other"),
        (dict(variant="allora", rslora=True), "--rslora and --variant allora, whose scale is 1, exclude each other"),
        (dict(allora_eta=2.0), "--allora-eta and --variant lora exclude each other"),
        (dict(allora_mode="update"), "--allora-mode and --variant lora exclude each other"),
        (dict(variant="allora", allora_mode="step"), "allora_mode must be one of .*; got 'step'"),
    ],
)
def test_settings_that_exclude_each_other(change, match):
    with pytest.raises(ValueError, match=match):
        Settings(**change)


def test_a_variants_settings_reach_the_adapter(call, tiny_options, tmp_path):
    options = ["--variant", "allora", "--allora-mode", "update", "--allora-eta", "2", "--output", tmp_path / "out"]
    call(
        "finetune", *tiny_options, "--steps", "2", "--warmup", "0", "--seq-len", "24", "--eval-tokens", "100", *options
    )
    settings = json.loads((tmp_path / "out/summary.json").read_text())["settings"]
    assert (settings["variant"], settings["allora_mode"], settings["allora_eta"]) == ("allora", "update", 2.0)
    config = Settings(variant="allora", allora_mode="update", allora_eta=2.0).lora()
    assert (config.allora_mode, config.allora_eta) == ("update", 2.0)


def test_a_recipe_sets_what_is_not_given(call, refused, tiny_options, tmp_path):
    quick = ["--steps", "2", "--seq-len", "24", "--eval-tokens", "100", "--prompt", "the", "--rank", "4"]
    call("finetune", *tiny_options, *quick, "--recipe", "without-regret", "--output", tmp_path / "a")
    settings = json.loads((tmp_path / "a/summary.json").read_text())["settings"]
    assert (settings["alpha"], settings["warmup"], settings["schedule"], settings["rank"]) == (32.0, 0, "constant", 4)
    assert settings["lr"] == pytest.approx(15 * 5e-5 * (2000 / 32) ** 0.781)
    given = ["--recipe", "biderman", "--lr", "0.003", "--warmup", "1", "--output", tmp_path / "b"]
    call("finetune", *tiny_options, *quick, *given)
    settings = json.loads((tmp_path / "b/summary.json").read_text())["settings"]
    assert (settings["alpha"], settings["warmup"], settings["lr"]) == (8.0, 1, 0.003)
    assert (settings["optimizer"], settings["schedule"], settings["final_share"]) == ("lion", "cosine", 0.01)
    call("finetune", *tiny_options, *quick, *given, "--schedule", "constant", "--overwrite")
    settings = json.loads((tmp_path / "b/summary.json").read_text())["settings"]
    assert (settings["schedule"], settings["final_share"]) == ("constant", 0.0), "whose end the recipe does not know"
    line = refused(2, "finetune", *tiny_options, "--recipe", "regret", "--output", tmp_path / "c")
    assert "--recipe must be one of" in line
    line = refused(2, "finetune", *tiny_options, "--full", "--recipe", "biderman", "--output", tmp_path / "c")
    assert "--full and --recipe biderman, whose learning rate is LoRA's, exclude each other" in line


def test_a_whole_model_replaces_no_other_unasked(tiny, settings_of, tmp_path, monkeypatch):
    copy = shutil.copytree(tiny[0], tmp_path / "model")
    base = settings_of(tiny, full=True)
    refused_unloaded(monkeypatch, "--output must hold no other run.* with model", base, tmp_path)
    settings = settings_of((str(copy), tiny[1]), full=True)
    for options in ({}, dict(overwrite=True)):
        match = "--full writes .*model, which must not be the base model's own"
        refused_unloaded(monkeypatch, match, settings, tmp_path, **options)
