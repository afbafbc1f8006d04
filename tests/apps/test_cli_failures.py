"""The command line when something is wrong: one red line and an exit code, and nothing left behind."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from finetune_runs import QUICK
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from fused_lora import apply_lora, bench, save_adapter
from fused_lora.cli import app
from fused_lora.finetune import checkpoint
from fused_lora.models import load_model


def raising(error):
    """A function that raises, whatever it gets."""

    def function(*args, **kwargs):
        raise error

    return function


@pytest.fixture(autouse=True)
def hangup():
    """SIGHUP as a terminal has it, also where the tests run under nohup, which fused-lora heeds."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def killed_by(function, number):
    """The function, and after it the signal."""

    def wrapped(*args, **kwargs):
        function(*args, **kwargs)
        os.kill(os.getpid(), number)
        time.sleep(60)

    return wrapped


def test_bad_input_is_one_line_and_exit_code_2(refused, tiny_options, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"body": "x"}\n')
    assert "rank must be an int >= 1; got 0" in refused(
        2, "finetune", *tiny_options, "--rank", "0", "--output", tmp_path / "out"
    )
    assert "bad.jsonl, line 1" in refused(
        2, "finetune", *tiny_options[:2], "--data", tmp_path / "bad.jsonl", "--output", tmp_path / "out"
    )
    assert "'q_proj'" in refused(
        2, "finetune", *tiny_options, "--target-modules", "q_porj", "--output", tmp_path / "out"
    )
    assert "dtype must be one of fp32, bf16, fp16; got 'int4'" in refused(
        2, "merge", tmp_path, "--dtype", "int4", "--output", tmp_path / "out"
    )
    assert "preset must be one of quick, readme, full, variants, latency; got 'slow'" in refused(
        2, "bench", "--preset", "slow"
    )
    assert "candidates must be among" in refused(2, "bench", "--candidates", "fused,fast", "--device", "cpu")


def test_what_the_machine_refuses_is_one_line_and_exit_code_1(refused, tiny_options, tmp_path):
    assert (
        refused(1, "finetune", *tiny_options[:2], "--data", tmp_path / "nowhere")
        == f"error: {tmp_path / 'nowhere'}: No such file or directory"
    )
    assert "nowhere/model" in refused(
        1, "finetune", "--model", tmp_path / "nowhere/model", "--output", tmp_path / "out"
    )
    (tmp_path / "file").write_text("")
    assert "Not a directory" in refused(1, "finetune", *tiny_options, *QUICK, "--output", tmp_path / "file/out")
    assert "adapter_config.json: No such file" in refused(
        1, "merge", tmp_path, *tiny_options[:2], "--output", tmp_path / "out"
    )


@pytest.mark.parametrize("package", ["transformers", "matplotlib"])
def test_a_missing_package_is_named_before_the_work(refused, monkeypatch, tiny_options, tmp_path, package):
    monkeypatch.setitem(sys.modules, package, None)
    line = refused(1, "finetune", *tiny_options, "--output", tmp_path / "out")
    assert line == f"error: {package} is not installed: pip install 'fused-lora[finetune]'"
    assert not (tmp_path / "out/metrics.jsonl").exists()


@pytest.mark.parametrize(
    "error, says",
    [
        (ModuleNotFoundError("No module named 'peft'", name="peft"), "peft is not installed: .*fused-lora.peft.'"),
        (
            ModuleNotFoundError("No module named 'gguf.x'", name="gguf.x"),
            "gguf is not installed: .*fused-lora.finetune",
        ),
        (ImportError("Please install torch and gguf>=0.10.0"), "Please install .*: pip install 'fused-lora.finetune"),
    ],
)
def test_an_import_that_fails_names_its_extra(refused, monkeypatch, error, says):
    monkeypatch.setattr(bench, "run", raising(error))
    assert re.search(says, refused(1, "bench"))


@pytest.mark.parametrize(
    "error",
    [
        ImportError("cannot import name 'x'", name="fused_lora.ops"),
        ModuleNotFoundError("No module named 'fused_lora.x'", name="fused_lora.x"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        IndexError("list index out of range"),
    ],
)
def test_a_bug_keeps_its_traceback(monkeypatch, error):
    monkeypatch.setattr(bench, "run", raising(error))
    assert CliRunner().invoke(app, ["bench"]).exception is error


def test_an_interrupt_is_one_line(refused, monkeypatch):
    monkeypatch.setattr(bench, "run", raising(KeyboardInterrupt))
    assert "interrupted" in refused(130, "bench")


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("2 GiB"), "allocate"])
def test_memory_that_runs_out_is_one_line_and_exit_code_1(refused, monkeypatch, error):
    run = raising(error) if error != "allocate" else lambda *args: torch.empty(10**13)
    monkeypatch.setattr(bench, "run", run)
    assert refused(1, "bench").startswith("error: out of memory")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_with_its_code_after_the_cleaning(refused, monkeypatch, number):
    cleaned = []

    def run(*args):
        try:
            os.kill(os.getpid(), number)
            time.sleep(60)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # a second one must not cut the cleaning short
            cleaned.append(True)

    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP)]
    monkeypatch.setattr(bench, "run", run)
    assert refused(128 + number, "bench") == f"error: ended by {number.name}" and cleaned
    assert before == [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP)]


def test_nohup_holds(call, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        monkeypatch.setattr(
            bench, "run", lambda *args: os.kill(os.getpid(), signal.SIGHUP) or dict(rows=[], host=[], train_step=[])
        )
        call("bench")
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("existing", [False, True])
def test_a_signal_in_a_merge_leaves_nothing(call, tiny_options, tmp_path, monkeypatch, existing):
    save_adapter(apply_lora(load_model(tiny_options[1], torch.float32, "cpu")[0], r=2), tmp_path / "adapter")
    if existing:
        (tmp_path / "out").mkdir()
    staged = killed_by(LlamaForCausalLM.save_pretrained, signal.SIGTERM)
    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", staged)
    call("merge", tmp_path / "adapter", "--output", tmp_path / "out", code=143)
    assert sorted(os.listdir(tmp_path)) == ["adapter", *(["out"] if existing else [])]
    assert not existing or os.listdir(tmp_path / "out") == []


def test_a_signal_in_a_run_leaves_what_can_be_resumed(call, tiny_options, tmp_path, monkeypatch):
    out, calls, fsync = tmp_path / "out", [], os.fsync

    def sync(file):
        fsync(file)
        calls.append(file)
        if len(calls) == 4:  # the lock, the checkpoints of steps 0 and 1, and in the middle of writing step 2
            os.kill(os.getpid(), signal.SIGHUP)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", sync)
        assert "SIGHUP" in call("finetune", *tiny_options, *QUICK, "--save-every", "1", "--output", out, code=129)[1]
    assert sorted(os.listdir(out)) == ["checkpoint.safetensors", "metrics.jsonl"]
    assert checkpoint.read_state(out / "checkpoint.safetensors")["step"] == 1


@pytest.mark.parametrize("option", ["model", "data", "eval-data", "output", "prompt", "text-field", "device", "dtype"])
def test_empty_options_of_finetune_are_refused(refused, tiny_options, tmp_path, monkeypatch, option):
    """An unset variable in a script; an empty path would be the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "private.txt").write_text("words\n" * 9)
    line = refused(2, "finetune", *tiny_options, "--output", tmp_path / "out", f"--{option}", "")
    assert option.replace("-", "_") in line.replace("-", "_") and os.listdir(tmp_path) == ["private.txt"]


def test_empty_options_of_merge_are_refused(refused, tiny_options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments in (["", *tiny_options[:2]], [tmp_path, "--model", ""], [tmp_path, "--output", ""]):
        assert "must not be empty; got ''" in refused(2, "merge", *arguments)
    assert refused(2, "merge", "") == "error: ADAPTER must not be empty; got ''"
    assert refused(2, "analyze", "") == "error: TUNED must not be empty; got ''"
    assert os.listdir(tmp_path) == []


def test_names_that_are_not_utf_8_are_printed_somehow(refused, tiny_options):
    line = refused(1, "finetune", *tiny_options[:2], "--data", os.fsdecode(b"/nowhere/caf\xe9"))
    assert "/nowhere/caf\ufffd: No such file" in line


@pytest.mark.parametrize("arguments", [["info"], ["tune", "--show"]])
def test_a_reader_that_goes_is_no_traceback(arguments):
    """`fused-lora tune --show | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "fused_lora", *arguments]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == 141 and done.stderr == ""


def test_a_full_disk_under_the_output_is_one_line():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "fused_lora", "info"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "error: [Errno 28] No space left on device\n")


def test_a_wrong_result_is_one_line_and_exit_code_1(refused, monkeypatch):
    def wrong(*args):
        raise bench.runner.WrongResult("fused: y is off")

    monkeypatch.setattr(bench, "run", wrong)
    assert refused(1, "bench") == "error: fused: y is off"
