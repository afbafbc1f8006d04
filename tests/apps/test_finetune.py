"""Fine-tuning: the step's arithmetic, the files of a run, and SmolLM2 learning Python."""

import dataclasses
import functools
import json
import math
import os

import pytest
import torch
from finetune_runs import FILES, rows_of
from torch.nn import functional as F

from fused_lora import apply_lora, load_adapter
from fused_lora.data import IGNORED
from fused_lora.finetune import checkpoint
from fused_lora.finetune import job as finetune
from fused_lora.finetune import loop as training
from fused_lora.finetune.settings import Settings


def test_a_run_writes_what_it_says(tiny, run, settings_of, tmp_path):
    seen = []
    summary = run(settings_of(tiny), tmp_path / "out", tick=seen.append, eval_every=3)
    assert sorted(os.listdir(tmp_path / "out")) == FILES
    rows = rows_of(tmp_path / "out")
    assert [row["step"] for row in rows] == list(range(7)) and seen == rows[1:]
    assert [row["step"] for row in rows if "held_out_loss" in row] == [0, 3, 6]
    assert all(
        set(row) - {"held_out_loss"} == {"step", "loss", "lr", "grad_norm", "tokens", "seconds"} for row in rows[1:]
    )
    assert summary == json.loads((tmp_path / "out/summary.json").read_text())
    assert (
        summary["perplexity_before"]
        == math.exp(rows[0]["held_out_loss"])
        > summary["perplexity_after"]
        == math.exp(rows[-1]["held_out_loss"])
    )
    assert summary["settings"]["rank"] == 4 and summary["train_tokens"] == sum(row["tokens"] for row in rows[1:])
    assert (tmp_path / "out/loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    model, tokenizer = finetune.load_model(tiny[0], torch.float32, "cpu")
    assert finetune.complete(model, tokenizer, "the") == summary["completion_of_base"]
    load_adapter(model, tmp_path / "out")
    assert finetune.complete(model, tokenizer, "the") == summary["completion"]


def test_a_step_weighs_every_token_alike(tiny):
    """A step over passes of 23, 5 and 11 predicted tokens has the gradient of the mean over all 39."""
    blocks = torch.randint(0, 256, (3, 24), generator=torch.Generator().manual_seed(0))
    blocks[1, 6:], blocks[2, 12:] = IGNORED, IGNORED
    model, _ = finetune.load_model(tiny[0], torch.float64, "cpu")
    apply_lora(model, 4, 8)
    for parameter in checkpoint.trained(model).values():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    total = sum(
        F.cross_entropy(model(row[row >= 0][None]).logits[0, :-1], row[row >= 0][1:], reduction="sum") for row in blocks
    )
    exact = torch.autograd.grad(total / 39, list(checkpoint.trained(model).values()))
    start = {name: parameter.detach().clone() for name, parameter in checkpoint.trained(model).items()}
    for passes in ([blocks], list(blocks.split(1)), [blocks[1:], blocks[:1]]):
        optimizer = torch.optim.SGD(checkpoint.trained(model).values(), lr=1.0)
        loss, norm = training.train_step(
            model, optimizer, torch.amp.GradScaler("cpu", enabled=False), passes, max_grad_norm=0
        )
        assert loss == pytest.approx(total.item() / 39, rel=1e-5)  # logits go to fp32 in the loss
        assert norm == pytest.approx(torch.stack([g.norm() for g in exact]).norm().item(), rel=1e-5)
        for (name, parameter), gradient in zip(checkpoint.trained(model).items(), exact, strict=True):
            assert torch.allclose(start[name] - parameter, gradient, rtol=1e-4, atol=1e-6), name
            parameter.data.copy_(start[name])
    optimizer = torch.optim.SGD(checkpoint.trained(model).values(), lr=1.0)
    training.train_step(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), [blocks], max_grad_norm=norm / 2)
    for (name, parameter), gradient in zip(checkpoint.trained(model).items(), exact, strict=True):
        assert torch.allclose(start[name] - parameter, gradient / 2, rtol=1e-4, atol=1e-6), name


def test_held_out_loss_is_the_mean_over_all_predicted_tokens(tiny):
    model, _ = finetune.load_model(tiny[0], torch.float32, "cpu")
    blocks = torch.randint(0, 256, (3, 24), generator=torch.Generator().manual_seed(0))
    blocks[2, 10:] = IGNORED
    with torch.no_grad():
        parts = [
            model(row[row >= 0][None], labels=row[row >= 0][None]).loss.item() * (len(row[row >= 0]) - 1)
            for row in blocks
        ]
    model.train()
    for batch_size in (1, 2, 3):
        assert training.held_out_loss(model, blocks, batch_size, "cpu") == pytest.approx(
            sum(parts) / (23 + 23 + 9), rel=1e-5
        )
    assert model.training


def test_few_steps_have_a_warm_up_that_fits():
    warmups = [Settings(steps=steps).warmup for steps in (1, 2, 4, 9, 10, 60)]
    assert warmups == [0, 1, 2, 4, 5, 5]
    with pytest.raises(ValueError, match="alpha must be a finite number"):  # what is wrong comes first
        Settings(steps=4, warmup=5, alpha=float("nan"))


def test_learning_rate():
    settings = Settings(lr=1.0, warmup=4, steps=12)
    rates = [training.learning_rate(step, settings) for step in range(12)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[8] == pytest.approx(0.5) and rates[4:] == sorted(rates[4:], reverse=True) and 0 < rates[11] < 0.05
    assert training.learning_rate(0, Settings(lr=1.0, warmup=0)) == 1.0
    for schedule in ("cosine", "linear"):
        ends = Settings(lr=2.0, warmup=4, steps=12, schedule=schedule, final_share=0.1)
        assert [training.learning_rate(step, ends) for step in (4, 8, 12)] == pytest.approx([2.0, 1.1, 0.2])


def test_a_gradient_that_overflows_in_fp16_skips_its_step(tiny, run, settings_of, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=2.0**40))
    summary = run(settings_of(tiny, dtype="fp16", steps=30), tmp_path / "out")
    norms = [row["grad_norm"] for row in rows_of(tmp_path / "out")[1:]]
    assert norms[0] is None and norms[-1] is not None and summary["perplexity_after"] < summary["perplexity_before"]


def test_a_run_visits_every_block_once_an_epoch(tiny, run, settings_of, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        training,
        "train_step",
        lambda model, optimizer, scaler, passes, norm: seen.append(torch.cat(passes)) or (1.0, 1.0),
    )
    run(settings_of(tiny, steps=30, seq_len=17), tmp_path / "out")
    assert all(step.shape == (4, 17) for step in seen)
    blocks = [tuple(block.tolist()) for block in torch.cat(seen)]
    n = len(set(blocks))
    assert n < len(blocks) == 120 and len(set(blocks[:n])) == n and set(blocks[n : 2 * n]) <= set(blocks[:n])


def test_the_seed_decides(tiny, run, settings_of, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(settings_of(tiny, seed=seed, steps=3, dropout=0.1), tmp_path / name)
    a, b, c = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_targets():
    def targets(text):
        return dataclasses.replace(Settings(), target_modules=text).targets()

    assert targets("all-linear") == "all-linear"
    assert targets("q_proj") == ["q_proj"] and targets("q_proj, mlp.up_proj") == ["q_proj", "mlp.up_proj"]
    assert targets(r".*\.(q|v)_proj") == r".*\.(q|v)_proj"
