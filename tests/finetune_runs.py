"""What tests of fine-tuning share: options of a quick run, the files that a run writes, refusals before the work."""

import json

import pytest

from fused_lora.finetune import job

# Of the command line.
QUICK = ["--steps", "12", "--warmup", "2", "--seq-len", "24", "--rank", "4", "--eval-tokens", "200"]
QUICK += ["--dropout", "0.1", "--grad-accum", "2"]

FILES = [
    "adapter_config.json",
    "adapter_model.safetensors",
    "checkpoint.safetensors",
    "loss.png",
    "metrics.jsonl",
    "summary.json",
]


def rows_of(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def contents(output):
    return {str(path): path.read_bytes() for path in sorted(output.rglob("*")) if path.is_file()}


def refused_unloaded(monkeypatch, match, settings, output, **options):
    """The run is refused before data is read or a model loaded, and the output is as it was."""
    before = contents(output) if output.is_dir() else None
    with monkeypatch.context() as patch:
        for owner, name in ((job, "load_model"), (job.data, "read")):
            patch.setattr(owner, name, lambda *arguments: pytest.fail("too late"))
        with pytest.raises((ValueError, OSError), match=match):
            job.finetune(settings, output, say=lambda line: None, **options)
    assert before == (contents(output) if output.is_dir() else None)
