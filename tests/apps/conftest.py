"""Fixtures of the applications: a tiny model with its data, settings, a run that was killed, the command line."""

import json
import re
import shutil

import pytest
import torch
from transformers import AutoConfig, LlamaForCausalLM
from typer.testing import CliRunner

from fused_lora.cli import app
from fused_lora.finetune import job
from fused_lora.finetune.settings import Settings


@pytest.fixture(scope="session")
def tiny_files(tiny_model, tmp_path_factory):
    """A tiny model and a text file: (model directory, data file)."""
    data = tmp_path_factory.mktemp("data") / "data.txt"
    data.write_text("".join(f"the square of {i} is {i * i}\n" for i in range(60)))
    return tiny_model, str(data)


@pytest.fixture
def tiny(tiny_files, one_thread):
    """tiny_files, on one thread."""
    return tiny_files


@pytest.fixture(scope="session")
def settings_of():
    """Settings for (model directory, data file), with changes."""
    plain = dict(rank=4, alpha=8.0, lr=1e-2, warmup=2, steps=6, batch_size=2, grad_accum=2, seq_len=24, eval_tokens=200)

    def make(tiny, **changes):
        own = {name: value for name, value in plain.items() if not (changes.get("full") and name in ("rank", "alpha"))}
        return Settings(**dict(model=tiny[0], data=(tiny[1],)) | own | changes)

    return make


@pytest.fixture(scope="session")
def run():
    """finetune() without words; returns its summary."""

    def make(settings, output, **options):
        return job.finetune(settings, output, say=lambda line: None, prompt="the", **options)

    return make


@pytest.fixture(scope="session")
def stopped(tiny_files, settings_of, run, tmp_path_factory):
    """The output of a run that was killed after its checkpoint at step 2: to be copied."""

    class Killed(Exception):
        pass

    def tick(row):
        if row["step"] == 3:
            raise Killed

    output = tmp_path_factory.mktemp("stopped") / "out"
    with pytest.raises(Killed):
        run(settings_of(tiny_files), output, save_every=2, tick=tick)
    return output


@pytest.fixture
def stopped_copy(stopped, tmp_path):
    """The output of the killed run, to be worked on."""
    return shutil.copytree(stopped, tmp_path / "out")


@pytest.fixture
def tiny_options(tiny_model, one_thread, tmp_path_factory):
    """The options --model and --data of a tiny model and a file of lines of JSON."""
    data = tmp_path_factory.mktemp("data") / "data.jsonl"
    data.write_text("\n".join(json.dumps({"text": f"the square of {i} is {i * i}"}) for i in range(60)))
    return ["--model", tiny_model, "--data", str(data), "--device", "cpu"]


@pytest.fixture(scope="session")
def call():
    """Runs the command line in this process; gives (stdout, stderr)."""
    colour = re.compile(r"\x1b\[[0-9;]*m")  # typer colours its help wherever it believes to be in a CI service

    def make(*arguments, code=0):
        result = CliRunner().invoke(app, [str(a) for a in arguments], prog_name="fused-lora", terminal_width=200)
        words = f"exit {result.exit_code}\n{result.stdout}\n{result.stderr}\n{result.exception!r}"
        assert result.exit_code == code, words
        return colour.sub("", result.stdout), colour.sub("", result.stderr)

    return make


@pytest.fixture(scope="session")
def refused(call):
    """Runs a command that fails; gives its one red line."""

    def make(code, *arguments):
        out, err = call(*arguments, code=code)
        lines = err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: ") and "Traceback" not in out + err, err
        return lines[0]

    return make


@pytest.fixture
def base(tiny_model, tmp_path):
    """Makes the directory of a tiny model, its head tied to the embedding or not."""

    def make(tied=True):
        directory = shutil.copytree(tiny_model, tmp_path / "base")
        torch.manual_seed(0)
        LlamaForCausalLM(AutoConfig.from_pretrained(directory, tie_word_embeddings=tied)).save_pretrained(directory)
        return directory

    return make
