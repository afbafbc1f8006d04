"""The command line as users run it: help, messages, exit codes, and a run that is killed with SIGKILL and resumed."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from typer.testing import CliRunner

from fused_lora import __version__, apply_lora, bench, save_adapter
from fused_lora.cli import app
from fused_lora.finetune import checkpoint
from fused_lora.models import load_model


@pytest.fixture
def tiny(tiny_model, one_thread, tmp_path_factory):
    """The options --model and --data of a tiny model and a file of lines of JSON."""
    data = tmp_path_factory.mktemp("data") / "data.jsonl"
    data.write_text("\n".join(json.dumps({"text": f"the square of {i} is {i * i}"}) for i in range(60)))
    return ["--model", tiny_model, "--data", str(data), "--device", "cpu"]


_COLOUR = re.compile(r"\x1b\[[0-9;]*m")  # typer colours its help wherever it believes to be in a CI service
QUICK = [
    "--steps",
    "12",
    "--warmup",
    "2",
    "--seq-len",
    "24",
    "--rank",
    "4",
    "--eval-tokens",
    "200",
    "--dropout",
    "0.1",
    "--grad-accum",
    "2",
]


def call(*arguments, code=0):
    """Run in this process; returns (stdout, stderr)."""
    result = CliRunner().invoke(
        app, [str(argument) for argument in arguments], prog_name="fused-lora", terminal_width=200
    )
    assert result.exit_code == code, f"exit {result.exit_code}\n{result.stdout}\n{result.stderr}\n{result.exception!r}"
    return _COLOUR.sub("", result.stdout), _COLOUR.sub("", result.stderr)


def refused(code, *arguments):
    """The one red line of a command that fails."""
    out, err = call(*arguments, code=code)
    lines = err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and "Traceback" not in out + err, err
    return lines[0]


@pytest.mark.parametrize(
    "command, says", [("info", "back end"), ("finetune", "--resume"), ("merge", "adapter"), ("bench", "--preset")]
)
def test_help(command, says):
    assert says in call(command, "--help")[0]
    assert command in call("--help")[0]


def test_help_of_finetune_shows_every_setting():
    text = call("finetune", "--help")[0]
    for option in [
        "model",
        "data",
        "eval-data",
        "text-field",
        "output",
        "rank",
        "alpha",
        "dropout",
        "target-modules",
        "rslora",
        "lr",
        "steps",
        "batch-size",
        "grad-accum",
        "seq-len",
        "warmup",
        "max-grad-norm",
        "weight-decay",
        "seed",
        "dtype",
        "device",
        "save-every",
        "eval-every",
        "eval-tokens",
        "resume",
        "overwrite",
        "prompt",
    ]:
        assert f"--{option}" in text


def test_as_a_program_help_imports_neither_transformers_nor_peft():
    code = (
        "import atexit, runpy, sys; sys.argv = ['fused-lora', '--help']\n"
        "atexit.register(lambda: print(sorted({'transformers', 'peft', 'matplotlib'} & set(sys.modules))))\n"
        "runpy.run_module('fused_lora', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "finetune" in done.stdout and done.stdout.strip().endswith("[]"), (
        done.stdout + done.stderr
    )


def test_finetune_then_merge(tiny, tmp_path):
    out, _ = call(
        "finetune",
        *tiny,
        *QUICK,
        "--output",
        tmp_path / "out",
        "--target-modules",
        "q_proj,down_proj",
        "--rslora",
        "--prompt",
        "the",
    )
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    before, after = summary["perplexity_before"], summary["perplexity_after"]
    assert after < before and f"held-out perplexity {before:.3f} -> {after:.3f}" in out
    assert "step 12/12  loss" in out and "tokens/s" in out and "completion, with the adapter" in out
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"], config["use_rslora"]) == (4, 32.0, 0.1, True)
    assert sorted(config["target_modules"]) == ["down_proj", "q_proj"] and config["base_model_name_or_path"] == tiny[1]
    out, _ = call("merge", tmp_path / "out", *tiny[:2], "--output", tmp_path / "merged", "--dtype", "bf16")
    assert "wrote" in out
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype is torch.bfloat16


def program(*arguments):
    """`python -m fused_lora` under way, on one thread."""
    command = [sys.executable, "-m", "fused_lora", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def test_a_killed_run_resumes_to_the_same_bits(tiny, tmp_path):
    """SIGKILL in the middle of a run with dropout and accumulation, then --resume: the adapter of an uninterrupted run,
    bit for bit."""
    arguments = ["finetune", *tiny, *QUICK, "--steps", "40", "--save-every", "1"]
    whole = program(*arguments, "--output", tmp_path / "whole")
    assert whole.wait() == 0, whole.stdout.read()
    killed = program(*arguments, "--output", tmp_path / "killed")
    metrics = tmp_path / "killed/metrics.jsonl"
    while killed.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > 4):
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL, "the run was over before it could be killed: make it longer"
    assert not (tmp_path / "killed/adapter_model.safetensors").exists()
    assert load_file(tmp_path / "killed/checkpoint.safetensors")
    refused(2, *arguments, "--output", tmp_path / "killed")
    resumed = program(*arguments, "--output", tmp_path / "killed", "--resume")
    out = resumed.communicate()[0]
    assert resumed.returncode == 0 and "resuming after step" in out, out
    for name in ("adapter_model.safetensors", "checkpoint.safetensors", "adapter_config.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(41))


def test_bad_input_is_one_line_and_exit_code_2(tiny, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"body": "x"}\n')
    assert "rank must be an int >= 1; got 0" in refused(
        2, "finetune", *tiny, "--rank", "0", "--output", tmp_path / "out"
    )
    assert "bad.jsonl, line 1" in refused(
        2, "finetune", *tiny[:2], "--data", tmp_path / "bad.jsonl", "--output", tmp_path / "out"
    )
    assert "'q_proj'" in refused(2, "finetune", *tiny, "--target-modules", "q_porj", "--output", tmp_path / "out")
    assert "dtype must be one of fp32, bf16, fp16; got 'int4'" in refused(
        2, "merge", tmp_path, "--dtype", "int4", "--output", tmp_path / "out"
    )
    assert "preset must be one of quick, readme, full; got 'slow'" in refused(2, "bench", "--preset", "slow")
    assert "candidates must be among" in refused(2, "bench", "--candidates", "fused,fast", "--device", "cpu")


def test_what_the_machine_refuses_is_one_line_and_exit_code_1(tiny, tmp_path):
    assert (
        refused(1, "finetune", *tiny[:2], "--data", tmp_path / "nowhere")
        == f"error: {tmp_path / 'nowhere'}: No such file or directory"
    )
    assert "nowhere/model" in refused(
        1, "finetune", "--model", tmp_path / "nowhere/model", "--output", tmp_path / "out"
    )
    (tmp_path / "file").write_text("")
    assert "Not a directory" in refused(1, "finetune", *tiny, *QUICK, "--output", tmp_path / "file/out")
    assert "adapter_config.json: No such file" in refused(1, "merge", tmp_path, *tiny[:2], "--output", tmp_path / "out")


@pytest.mark.parametrize("package", ["transformers", "matplotlib"])
def test_a_missing_package_is_named_before_the_work(monkeypatch, tiny, tmp_path, package):
    monkeypatch.setitem(sys.modules, package, None)
    line = refused(1, "finetune", *tiny, "--output", tmp_path / "out")
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
def test_an_import_that_fails_names_its_extra(monkeypatch, error, says):
    monkeypatch.setattr(bench, "run", raising(error))
    assert re.search(says, refused(1, "bench"))


def raising(error):
    """A function that raises, whatever it gets."""

    def function(*args, **kwargs):
        raise error

    return function


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


def test_an_interrupt_is_one_line(monkeypatch):
    monkeypatch.setattr(bench, "run", raising(KeyboardInterrupt))
    assert "interrupted" in refused(130, "bench")


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("2 GiB"), "allocate"])
def test_memory_that_runs_out_is_one_line_and_exit_code_1(monkeypatch, error):
    run = raising(error) if error != "allocate" else lambda *args: torch.empty(10**13)
    monkeypatch.setattr(bench, "run", run)
    assert refused(1, "bench").startswith("error: out of memory")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_with_its_code_after_the_cleaning(monkeypatch, number):
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


def test_nohup_holds(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        monkeypatch.setattr(bench, "run", lambda *args: os.kill(os.getpid(), signal.SIGHUP))
        call("bench")
    finally:
        signal.signal(signal.SIGHUP, before)


def killed_by(function, number):
    """The function, and after it the signal."""

    def wrapped(*args, **kwargs):
        function(*args, **kwargs)
        os.kill(os.getpid(), number)
        time.sleep(60)

    return wrapped


@pytest.mark.parametrize("existing", [False, True])
def test_a_signal_in_a_merge_leaves_nothing(tiny, tmp_path, monkeypatch, existing):
    save_adapter(apply_lora(load_model(tiny[1], torch.float32, "cpu")[0], r=2), tmp_path / "adapter")
    if existing:
        (tmp_path / "out").mkdir()
    staged = killed_by(LlamaForCausalLM.save_pretrained, signal.SIGTERM)
    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", staged)
    call("merge", tmp_path / "adapter", "--output", tmp_path / "out", code=143)
    assert sorted(os.listdir(tmp_path)) == ["adapter", *(["out"] if existing else [])]
    assert not existing or os.listdir(tmp_path / "out") == []


def test_a_signal_in_a_run_leaves_what_can_be_resumed(tiny, tmp_path, monkeypatch):
    out, calls, fsync = tmp_path / "out", [], os.fsync

    def sync(file):
        fsync(file)
        calls.append(file)
        if len(calls) == 4:  # the lock, the checkpoints of steps 0 and 1, and in the middle of writing step 2
            os.kill(os.getpid(), signal.SIGHUP)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", sync)
        assert "SIGHUP" in call("finetune", *tiny, *QUICK, "--save-every", "1", "--output", out, code=129)[1]
    assert sorted(os.listdir(out)) == ["checkpoint.safetensors", "metrics.jsonl"]
    assert checkpoint.read_state(out / "checkpoint.safetensors")["step"] == 1


@pytest.mark.parametrize("option", ["model", "data", "eval-data", "output", "prompt", "text-field", "device", "dtype"])
def test_empty_options_of_finetune_are_refused(tiny, tmp_path, monkeypatch, option):
    """An unset variable in a script; an empty path would be the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "private.txt").write_text("words\n" * 9)
    line = refused(2, "finetune", *tiny, "--output", tmp_path / "out", f"--{option}", "")
    assert option.replace("-", "_") in line.replace("-", "_") and os.listdir(tmp_path) == ["private.txt"]


def test_empty_options_of_merge_are_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments in (["", *tiny[:2]], [tmp_path, "--model", ""], [tmp_path, "--output", ""]):
        assert "must not be empty; got ''" in refused(2, "merge", *arguments)
    assert os.listdir(tmp_path) == []


def test_names_that_are_not_utf_8_are_printed_somehow(tiny):
    line = refused(1, "finetune", *tiny[:2], "--data", os.fsdecode(b"/nowhere/caf\xe9"))
    assert "/nowhere/caf\ufffd: No such file" in line


def test_merge_takes_the_base_that_the_adapter_names(tiny, tmp_path):
    save_adapter(apply_lora(load_model(tiny[1], torch.float32, "cpu")[0], r=2), tmp_path / "adapter")
    out, _ = call("merge", tmp_path / "adapter", "--output", tmp_path / "out")
    assert f"base model: {tiny[1]}, which the adapter names" in out and (tmp_path / "out/config.json").exists()
    config = tmp_path / "adapter/adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": None}))
    assert "--model must be given" in refused(2, "merge", tmp_path / "adapter", "--output", tmp_path / "out-2")


def test_version():
    assert call("--version")[0] == f"fused-lora {__version__}\n"


def test_a_reader_that_goes_is_no_traceback():
    """`fused-lora info | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "fused_lora", "info"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode in (1, 141) and done.stderr == ""


def test_a_wrong_result_is_one_line_and_exit_code_1(monkeypatch):
    def wrong(*args):
        raise bench.runner.WrongResult("fused: y is off")

    monkeypatch.setattr(bench, "run", wrong)
    assert refused(1, "bench") == "error: fused: y is off"


def test_bench_writes_rows_and_a_plot(monkeypatch, tmp_path):
    """The whole way through the options, over one small case."""
    monkeypatch.setattr(bench.suite, "cases_of", lambda preset, device: [bench.Case(16, 64, 32, 4, 0.0, torch.float32)])
    out, _ = call(
        "bench",
        "--device",
        "cpu",
        "--candidates",
        "naive,fused",
        "--budget",
        "0.05",
        "--threads",
        torch.get_num_threads(),
        "--output",
        tmp_path / "bench.json",
        "--plot",
        tmp_path / "bench.png",
    )
    document = json.loads((tmp_path / "bench.json").read_text())
    assert [row["candidate"] for row in document["rows"]] == ["frozen", "naive", "fused"] and document[
        "preset"
    ] == "quick"
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG") and "fused" in out
