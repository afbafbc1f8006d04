"""Fixtures of the fine-tuning tests: a tiny model with its data, settings for it, and a run that was killed."""

import shutil

import pytest

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
        return Settings(**dict(model=tiny[0], data=(tiny[1],)) | plain | changes)

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
