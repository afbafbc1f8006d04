"""load_adapter of an adapter on the Hugging Face hub, which the tests never reach."""

import shutil
import sys

import pytest
import torch
from tiny_llama import llama, randomise

from fused_lora import apply_lora, load_adapter, save_adapter

huggingface_hub = pytest.importorskip("huggingface_hub", reason="needs huggingface_hub")
IDS = torch.arange(48).reshape(2, 24) * 7 % 128


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in for snapshot_download that has one repository, with the adapter in it and in a folder of it."""
    model = randomise(apply_lora(llama()))
    save_adapter(model, tmp_path / "repository")
    save_adapter(randomise(model, 2), tmp_path / "repository" / "second")
    calls = []

    def snapshot_download(name, revision=None, allow_patterns=None, local_files_only=False):
        calls.append((name, revision, allow_patterns))
        if local_files_only and not (tmp_path / "cache").exists():
            raise huggingface_hub.errors.LocalEntryNotFoundError("not downloaded yet")
        if name != "someone/adapter":
            raise huggingface_hub.errors.LocalEntryNotFoundError("nothing of that name\nand more lines")
        for pattern in allow_patterns:
            file = tmp_path / "cache" / pattern
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(tmp_path / "repository" / pattern, file)
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    return calls


def test_an_id_is_downloaded_and_only_safe_files_are(hub, tmp_path):
    got = load_adapter(llama(), "someone/adapter", revision="main")
    assert hub == [("someone/adapter", "main", ["adapter_config.json", "adapter_model.safetensors"])]
    assert torch.equal(got(IDS).logits, load_adapter(llama(), tmp_path / "repository")(IDS).logits)
    got = load_adapter(llama(), "someone/adapter", subfolder="second")
    want = load_adapter(llama(), tmp_path / "repository", subfolder="second")
    assert torch.equal(got(IDS).logits, want(IDS).logits)


def test_what_must_be_here_is_not_downloaded(hub):
    with pytest.raises(FileNotFoundError, match="not downloaded yet"):
        load_adapter(llama(), "someone/adapter", local_files_only=True)
    load_adapter(llama(), "someone/adapter")
    load_adapter(llama(), "someone/adapter", local_files_only=True)


def test_a_directory_is_never_looked_up(hub, tmp_path):
    shutil.copytree(tmp_path / "repository", tmp_path / "someone" / "adapter")
    load_adapter(llama(), "someone/adapter")
    with pytest.raises(FileNotFoundError, match=r"nowhere[/\\]adapter_config\.json"):
        load_adapter(llama(), tmp_path / "nowhere")
    assert hub == []


def test_what_cannot_be_read_is_one_clear_line(hub, refuses, monkeypatch):
    model = llama()
    with refuses(model, r"nor a hub id that can be read \(nothing of that name\): 'someone/else'$", FileNotFoundError):
        load_adapter(model, "someone/else")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with refuses(model, r"pip install huggingface_hub\) no hub id: 'someone/adapter'$", FileNotFoundError):
        load_adapter(model, "someone/adapter")


def test_offline_says_so():
    with pytest.raises(FileNotFoundError, match="nor a hub id that can be read"):  # HF_HUB_OFFLINE, see conftest
        load_adapter(llama(), "someone/adapter-that-is-nowhere")
