"""The command line as users run it: help, whole commands, and a run that is killed with SIGKILL and resumed."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from finetune_runs import QUICK
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fused_lora import __version__, apply_lora, bench, save_adapter
from fused_lora.models import load_model


def program(*arguments):
    """`python -m fused_lora` under way, on one thread."""
    command = [sys.executable, "-m", "fused_lora", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


@pytest.mark.parametrize(
    "command, says",
    [
        ("info", "back end"),
        ("finetune", "--resume"),
        ("merge", "adapter"),
        ("bench", "--preset"),
        ("tune", "--time-limit"),
    ],
)
def test_help(call, command, says):
    assert says in call(command, "--help")[0]
    assert command in call("--help")[0]


def test_help_of_finetune_shows_every_setting(call):
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


def test_finetune_then_merge(call, tiny_options, tmp_path):
    out, _ = call(
        "finetune",
        *tiny_options,
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
    assert (
        sorted(config["target_modules"]) == ["down_proj", "q_proj"]
        and config["base_model_name_or_path"] == tiny_options[1]
    )
    out, _ = call("merge", tmp_path / "out", *tiny_options[:2], "--output", tmp_path / "merged", "--dtype", "bf16")
    assert "wrote" in out
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype is torch.bfloat16


def test_a_killed_run_resumes_to_the_same_bits(refused, tiny_options, tmp_path):
    """SIGKILL in the middle of a run with dropout and accumulation, then --resume: the adapter of an uninterrupted run,
    bit for bit."""
    arguments = ["finetune", *tiny_options, *QUICK, "--steps", "40", "--save-every", "1"]
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


def test_merge_takes_the_base_that_the_adapter_names(call, refused, tiny_options, tmp_path):
    save_adapter(apply_lora(load_model(tiny_options[1], torch.float32, "cpu")[0], r=2), tmp_path / "adapter")
    out, _ = call("merge", tmp_path / "adapter", "--output", tmp_path / "out")
    assert f"base model: {tiny_options[1]}, which the adapter names" in out and (tmp_path / "out/config.json").exists()
    config = tmp_path / "adapter/adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": None}))
    assert "--model must be given" in refused(2, "merge", tmp_path / "adapter", "--output", tmp_path / "out-2")


def test_version(call):
    assert call("--version")[0] == f"fused-lora {__version__}\n"


def test_bench_writes_rows_and_a_plot(call, monkeypatch, tmp_path):
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
