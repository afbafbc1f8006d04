"""Runs that stop and resume, files that stay whole, and what another run left."""

import dataclasses
import errno
import json
import os

import pytest
import torch
from finetune_runs import FILES, refused_unloaded, rows_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fused_lora import apply_lora, files
from fused_lora.finetune import checkpoint, job
from fused_lora.schedules import MergeSchedule


class Killed(Exception):
    """Stands for a kill after a step was made and before it was written."""


def kill_at(step):
    def tick(row):
        if row["step"] == step:
            raise Killed

    return tick


@pytest.mark.parametrize("step", [1, 3, 4, 6])
def test_a_run_stopped_anywhere_resumes_to_the_same_bits(tiny, run, settings_of, tmp_path, step):
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


def test_resuming_nothing_starts_and_resuming_a_finished_run_repeats_its_end(tiny, run, settings_of, tmp_path):
    settings = settings_of(tiny, steps=3)
    said = []
    first = job.finetune(settings, tmp_path / "new", resume=True, say=said.append, prompt="the")
    assert f"no checkpoint in {tmp_path / 'new'}: the run starts from the beginning" in said
    adapter = (tmp_path / "new/adapter_model.safetensors").read_bytes()
    (tmp_path / "new/adapter_model.safetensors").unlink()
    again = run(settings, tmp_path / "new", resume=True)
    assert (tmp_path / "new/adapter_model.safetensors").read_bytes() == adapter
    assert {**first, "seconds": 0} == {**again, "seconds": 0}


@pytest.mark.parametrize(
    "change",
    [dict(lr=2e-2), dict(steps=7), dict(target_modules="q_proj"), dict(dropout=0.1), dict(seed=1), dict(dtype="bf16")],
)
def test_resuming_with_other_settings_names_the_setting(tiny, run, settings_of, stopped, change):
    (name, got), before = next(iter(change.items())), (stopped / "checkpoint.safetensors").read_bytes()
    want = getattr(settings_of(tiny), name)
    with pytest.raises(ValueError, match=f"checkpoint.safetensors: {name} must be {want!r}; got {got!r}"):
        run(settings_of(tiny, **change), stopped, resume=True)
    assert (stopped / "checkpoint.safetensors").read_bytes() == before


def test_what_follows_from_a_changed_setting_is_not_blamed(tiny, run, settings_of, tmp_path):
    """The warm-up of 4 steps is 2, of 8 steps 4: --steps was changed."""
    run(settings_of(tiny, warmup=None, steps=4), tmp_path / "out")
    with pytest.raises(ValueError, match="checkpoint.safetensors: steps must be 4; got 8"):
        run(settings_of(tiny, warmup=None, steps=8), tmp_path / "out", resume=True)


def test_resuming_on_changed_data_is_refused(tiny, run, settings_of, stopped_copy):
    output, (_, file) = stopped_copy, tiny
    text = open(file).read()
    try:
        open(file, "w").write(text.replace("square", "sphere"))
        with pytest.raises(ValueError, match="data_sha256 must be '[0-9a-f]{64}'; got '[0-9a-f]{64}'"):
            run(settings_of(tiny), output, resume=True)
    finally:
        open(file, "w").write(text)


def test_damaged_files_of_a_run_are_named(tiny, run, settings_of, stopped_copy):
    output = stopped_copy
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


MOMENT = "optimizer.exp_avg.0.lora_B.default"


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(remove="rng.cpu"), "must hold the state of PyTorch's generator of each process as rng.cpu; got KeyError"),
        (dict(change="rng.cpu", to=torch.zeros(1, 9, dtype=torch.uint8)), "generator of each process as rng.cpu; got"),
        (dict(change="rng.cpu", to=torch.zeros(0, 9, dtype=torch.uint8)), "generator of each process as rng.cpu; got"),
        (dict(change=MOMENT, to=torch.zeros(1, 3)), r"exp_avg.0.lora_B.default must fit .* \[4, 2\]; got .* \[1, 3\]"),
        (dict(change=MOMENT, to=torch.zeros(2, 4)), r"exp_avg.0.lora_B.default must fit .* \[4, 2\]; got .* \[2, 4\]"),
        (dict(change="optimizer.step.0.lora_B.default", to=torch.zeros(2)), "step.0.lora_B.default must fit"),
        (dict(change="optimizer.exp_avg", to=torch.zeros(2)), "optimizer's state of this model only; got optim"),
        (dict(remove=MOMENT), f"must hold {MOMENT}, as of others; got none"),
        (dict(remove="schedule.steps"), "the schedule's state must be of a schedule with export='weights'"),
        (dict(state="scaler", to={"scale": 1.0}), r"must hold a loss scale of \[\]; got \['scale'\]"),
        (dict(state="step", to=None), "a whole checkpoint of fused-lora; got ValueError: step must be of type"),
        (dict(state="settings", to=3), "got ValueError: settings must be of type dict; got 3"),
    ],
)
def test_a_checkpoint_that_lacks_something_changes_nothing(tmp_path, change, message):
    path, scaler = tmp_path / "checkpoint.safetensors", torch.amp.GradScaler("cpu", enabled=False)

    def made():
        model = apply_lora(torch.nn.Sequential(torch.nn.Linear(4, 4)), 2, target_modules=["0"])
        optimizer, schedule = torch.optim.AdamW(checkpoint.trained(model).values()), MergeSchedule(model, every=1)
        return model, optimizer, schedule

    model, optimizer, schedule = made()
    model(torch.ones(3, 4)).sum().backward()
    optimizer.step()
    schedule.merges = schedule.steps = schedule.merged_at = 1
    checkpoint.save_checkpoint(path, model, optimizer, scaler, 1, {}, schedule)
    with safe_open(path, "pt") as file:
        tensors, state = {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["fused_lora"])  # noqa: SIM118
    if "remove" in change:
        del tensors[change["remove"]]
    else:
        (tensors if "change" in change else state)[change.get("change") or change["state"]] = change["to"]
    save_file(tensors, path, {"fused_lora": json.dumps(state)})
    model, optimizer, schedule = made()
    before, generator = {name: t.clone() for name, t in model.state_dict().items()}, torch.get_rng_state()
    with pytest.raises(ValueError, match=f"checkpoint.safetensors.*{message}"):
        checkpoint.load_checkpoint(path, model, optimizer, scaler, {}, schedule)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not optimizer.state and not schedule.merges and torch.equal(torch.get_rng_state(), generator)


def test_another_run_is_not_overwritten_unasked(tiny, run, settings_of, stopped_copy):
    output = stopped_copy
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
def test_no_space_leaves_the_old_checkpoint_whole(tiny, run, settings_of, tmp_path, monkeypatch, call):
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


@pytest.mark.parametrize("left", [["adapter_model.safetensors"], ["summary.json"], ["metrics.jsonl"]])
def test_resume_without_its_checkpoint_keeps_what_is_there(tiny, settings_of, tmp_path, monkeypatch, left):
    output = tmp_path / "out"
    output.mkdir()
    for name in left:
        (output / name).write_text('{"step": 0}\n{"step": 1}\n')
    match = f"--resume needs the checkpoint .*checkpoint.safetensors, which is gone; got .*/out with {left[0]}"
    refused_unloaded(monkeypatch, match, settings_of(tiny), output, resume=True)


def test_resume_of_a_run_killed_before_its_first_checkpoint_starts(tiny, run, settings_of, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/metrics.jsonl").write_text('{"step": 0, "held_out')
    run(settings_of(tiny, steps=3), tmp_path / "out", resume=True)
    assert [row["step"] for row in rows_of(tmp_path / "out")] == [0, 1, 2, 3]


def test_a_resume_that_cannot_be_is_refused_before_the_work(tiny, settings_of, stopped_copy, monkeypatch):
    output = stopped_copy
    refused_unloaded(monkeypatch, "lr must be 0.01; got 0.5", settings_of(tiny, lr=0.5), output, resume=True)
    for content in (b"", b"5\n6\n", b"\xff\n", None):
        (output / "metrics.jsonl").write_bytes(content) if content is not None else (output / "metrics.jsonl").unlink()
        refused_unloaded(
            monkeypatch, "metrics.jsonl must hold the steps 0 to 2", settings_of(tiny), output, resume=True
        )


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_run_in_an_output_is_refused(tiny, settings_of, stopped_copy, monkeypatch, resume):
    output = stopped_copy
    with files.claimed(output, pytest.fail):
        options = dict(resume=resume, overwrite=not resume)
        refused_unloaded(monkeypatch, "another run is at work in it", settings_of(tiny), output, **options)


def test_what_a_run_left_when_it_was_killed_while_writing_goes(tiny, run, settings_of, stopped_copy):
    output = stopped_copy
    (output / ".checkpoint.safetensors.0123456789abcdef.tmp").write_bytes(b"half")
    run(settings_of(tiny), output, resume=True)
    assert sorted(os.listdir(output)) == FILES


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_base(tiny, run, settings_of, tmp_path, dtype):
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
