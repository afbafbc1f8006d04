"""`fused-lora finetune` of a decoder in plain PyTorch, which takes little time: in two processes the run is one
process's, resumes bit for bit, and one of them writes and speaks; runs that merge resume with each optimizer."""

import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from finetune_runs import FILES, rows_of
from safetensors.torch import load_file
from torch import nn
from two_processes import TARGETS, Decoder, outcomes, run_checks

from fused_lora.finetune import job, loop, processes
from fused_lora.finetune.settings import OPTIMIZERS, Settings
from fused_lora.rows import IGNORED

KINDS: dict[str, dict] = {name: dict(optimizer=name) for name in OPTIMIZERS}
KINDS["merges"] = dict(merge_every=2, optimizer="rite", warmup=1)
KINDS["full"] = dict(full=True, target_modules="all-linear", rank=Settings.rank, max_grad_norm=0.1)


class Model(nn.Module):
    """The decoder over token ids, called and saved as a model of transformers."""

    def __init__(self):
        super().__init__()
        self.decoder = Decoder()
        self.embedding = nn.Embedding(32, 16)

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.decoder(self.embedding(input_ids)))

    def save_pretrained(self, directory):
        directory.mkdir()
        torch.save(self.state_dict(), directory / "weights.pt")


def loaded(settings, say):
    """(model, tokenizer, blocks, held-out blocks) of several lengths. In fp64, as the processes' rounding would make
    the first steps of Adam differ."""
    model = Model().double().requires_grad_(False).eval()
    tokens = torch.randint(32, (9, 12), generator=torch.Generator().manual_seed(0))
    tokens[2, 5:] = tokens[5, 9:] = IGNORED
    return model, SimpleNamespace(save_pretrained=lambda directory: None), tokens[:7], tokens[7:]


def run(directory: Path, name: str, resume=False, say=lambda line: None, **changes) -> dict:
    """A run of five steps of three blocks, which two processes share as two and one."""
    plain = dict(rank=2, lr=3e-3, warmup=0, steps=5, batch_size=3, seq_len=12, target_modules=",".join(TARGETS))
    settings = Settings(model=str(directory / "base"), **plain | changes)
    with (
        patch.object(job, "_load", loaded),
        patch.object(job, "complete", lambda *arguments: ""),
        patch.object(job, "plot", lambda rows: b""),
    ):
        return job.finetune(settings, directory / name, resume, save_every=2, prompt="the", say=say)


def trains_alike(name: str, directory: Path) -> None:
    said: list[str] = []
    summary = run(directory, f"two {name}", say=said.append, **KINDS[name])
    assert len(said) == (2 if processes.rank() == 0 else 0) and summary["settings"]["processes"] == 2


def resumes_bit_for_bit(directory: Path, **changes) -> None:
    run(directory, "whole", **changes)
    steps: list[float] = []

    def killed(*arguments):
        if len(steps) == 3:
            raise KeyboardInterrupt
        steps.append(real(*arguments)[0])
        return steps[-1], 1.0

    real = loop.train_step
    with patch.object(loop, "train_step", killed), pytest.raises(KeyboardInterrupt):
        run(directory, "killed", **changes)
    torch.rand(5)
    run(directory, "killed", resume=True, **changes)
    for name in FILES[:3]:
        assert (directory / "whole" / name).read_bytes() == (directory / "killed" / name).read_bytes(), name


def resumes(directory: Path) -> None:
    """With dropout, for which each process draws for itself, and merges, for which the first one draws."""
    resumes_bit_for_bit(directory, dropout=0.3, merge_every=2)


def is_refused_in_both(directory: Path) -> None:
    """What the first process alone finds out, too."""
    with pytest.raises(ValueError, match="--output must hold no other run"):
        run(directory, "whole")
    with pytest.raises(ValueError, match="batch_size . grad_accum must be at least the number of processes, 2"):
        run(directory, "other", batch_size=1)
    assert not (directory / "other").exists()


CHECKS = [resumes, is_refused_in_both]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(directory of the runs, what was found in each process)."""
    directory = tmp_path_factory.mktemp("runs")
    (directory / "base").mkdir()
    (directory / "base/config.json").write_text("{}")
    return directory, outcomes(__file__, directory)


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_two_processes(both, check):
    assert both[1][check] == [None, None], "\n".join(filter(None, both[1][check]))


@pytest.mark.parametrize("name", KINDS)
def test_the_run_is_that_of_one_process(both, one_thread, name):
    directory, found = both
    assert found[name] == [None, None], "\n".join(filter(None, found[name]))
    run(directory, f"one {name}", **KINDS[name])
    one, two = (rows_of(directory / f"{count} {name}") for count in ("one", "two"))
    for key in ("step", "tokens", "loss", "grad_norm", "held_out_loss"):
        assert [row[key] for row in two if key in row] == pytest.approx([row[key] for row in one if key in row]), key
    one, two = (load_file(directory / f"{count} {name}" / FILES[2]) for count in ("one", "two"))
    for key in one:
        if key.startswith("adapter."):
            assert torch.allclose(one[key], two[key], rtol=1e-9, atol=1e-11), key


@pytest.mark.parametrize("optimizer", ["loraplus", "pro", "riemannian", "lion"])
def test_a_run_of_one_process_that_merges_resumes_bit_for_bit(one_thread, tmp_path, optimizer):
    """Killed right after its second merge; AdamW and LoRA-RITE merge in other tests."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text("{}")
    resumes_bit_for_bit(tmp_path, optimizer=optimizer, merge_every=2, warmup=1)


if __name__ == "__main__":
    for unused in ("matplotlib", "transformers"):  # seconds to import, for a plot and a model that are not made here
        sys.modules[unused] = ModuleType(unused)
    kinds = [partial(trains_alike, name) for name in KINDS]
    for kind, name in zip(kinds, KINDS):
        kind.__name__ = name
    run_checks([*kinds, *CHECKS], int(sys.argv[1]), Path(sys.argv[2]))
