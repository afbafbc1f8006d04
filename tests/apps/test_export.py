"""Merging into a model directory: plain transformers loads it and computes what the adapter model computes."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from tiny_llama import adapted, logits_of
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from fused_lora.files import LOCK
from fused_lora.finetune import export
from fused_lora.finetune.export import export_merged

MERGED = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
        *({"modules_to_save": [name]} for name in ("norm", "embed_tokens", "lm_head")),
    ],
    ids=str,
)
def test_round_trip(base, tmp_path, tied, lora):
    directory = base(tied)
    want = adapted(directory, tmp_path / "adapter", **lora)
    export_merged(directory, tmp_path / "adapter", tmp_path / "out/merged", torch.float32)
    got = logits_of(tmp_path / "out/merged")
    assert (got - want).abs().max() < 1e-5 * want.abs().max() < (logits_of(directory) - want).abs().max()
    assert os.listdir(tmp_path / "out") == ["merged"]
    texts = [AutoTokenizer.from_pretrained(path)("a ü").input_ids for path in (directory, tmp_path / "out/merged")]
    assert texts[0] == texts[1]
    with safe_open(tmp_path / "out/merged/model.safetensors", "pt") as file:
        one = "lm_head.weight" not in file.keys()  # noqa: SIM118
        assert json.loads((tmp_path / "out/merged/config.json").read_text())["tie_word_embeddings"] == one
        assert not [
            key
            for key in file.keys()  # noqa: SIM118  safe_open has no __iter__
            if "lora" in key or "modules_to_save" in key
        ]


def test_bf16_base(base, tmp_path):
    directory = base()
    want = adapted(directory, tmp_path / "adapter", torch.bfloat16).float()
    export_merged(directory, tmp_path / "adapter", tmp_path / "merged", torch.bfloat16)
    assert json.loads((tmp_path / "merged/config.json").read_text())["dtype"] == "bfloat16"
    got = logits_of(tmp_path / "merged", torch.bfloat16).float()
    assert (got - want).abs().max() < 0.05 * want.abs().max() < (logits_of(directory) - want).abs().max()


def test_no_file_is_overwritten(base, tmp_path):
    directory = base()
    adapted(directory, tmp_path / "adapter")
    for output in (directory, tmp_path / "adapter"):
        with pytest.raises(ValueError, match=f"--output must be a new or an empty directory; got {output} with"):
            export_merged(directory, tmp_path / "adapter", output, torch.float32)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="--output must be a directory; got the file"):
        export_merged(directory, tmp_path / "adapter", tmp_path / "file", torch.float32)


@pytest.mark.parametrize("kind", ["plain", "link", "link to a link", "link to nothing", "here", "volume"])
def test_an_output_that_is_there_stays_the_same_directory(base, tmp_path, monkeypatch, kind):
    """A link, a mount point or the working directory cannot be replaced by a rename."""
    directory, output = base(), tmp_path / "out"
    adapted(directory, tmp_path / "adapter")
    linked = "link" in kind
    real = tmp_path / "scratch" if linked else output
    if kind != "link to nothing":
        real.mkdir()
    if kind == "volume":
        (real / "lost+found").mkdir()
    if kind == "link to a link":
        (tmp_path / "between").symlink_to("scratch")
    if linked:
        output.symlink_to("between" if kind == "link to a link" else "scratch")
    if kind == "here":
        monkeypatch.chdir(output)
        output = Path()
    inode = real.stat().st_ino if kind != "link to nothing" else None
    export_merged(directory, tmp_path / "adapter", output, torch.float32)
    assert inode in (None, real.stat().st_ino) and output.is_symlink() == linked
    assert sorted(set(os.listdir(real)) - {"lost+found"}) == MERGED
    AutoModelForCausalLM.from_pretrained(real)


@pytest.mark.parametrize("umask", [0o022, 0o007])
def test_files_have_the_mode_of_the_umask(base, tmp_path, umask):
    directory = base()
    adapted(directory, tmp_path / "adapter")
    before = os.umask(umask)
    try:
        export_merged(directory, tmp_path / "adapter", tmp_path / "new", torch.float32)
    finally:
        os.umask(before)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o777 & ~umask
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "new").iterdir()}
    assert modes == dict.fromkeys(MERGED, 0o666 & ~umask)


@pytest.mark.parametrize("call, nth", [("fsync", 1), ("fsync", 2), ("replace", 1), ("replace", 3)])
def test_a_merge_that_fails_leaves_nothing(base, tmp_path, monkeypatch, call, nth):
    directory, real, calls = base(), getattr(os, call), []
    adapted(directory, tmp_path / "adapter")

    def full(*args):
        calls.append(args)
        if len(calls) == nth:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(OSError, match="No space left"):
            export_merged(directory, tmp_path / "adapter", tmp_path / "merged", torch.float32)
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base"]


def test_an_adapter_of_another_model_is_named(base, tmp_path):
    directory = base()
    adapted(directory, tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="adapter_model.safetensors must be a whole safetensors file"):
        export_merged(directory, tmp_path / "adapter", tmp_path / "merged", torch.float32)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        export_merged(directory, tmp_path / "nowhere", tmp_path / "merged", torch.float32)
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base"]


@pytest.mark.parametrize(
    "error",
    [
        SafetensorError("I/O error: No space left on device"),
        Exception("No space left (os error 28)"),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
)
@pytest.mark.parametrize("existing", [False, True])
def test_what_libraries_raise_on_a_full_disk_is_an_os_error(base, tmp_path, monkeypatch, error, existing):
    directory = base()
    adapted(directory, tmp_path / "adapter")
    if existing:
        (tmp_path / "out").mkdir()

    def save(self, where, *_, **options):
        (Path(where) / "half").write_bytes(b"half")
        raise error

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", save)
    with pytest.raises(OSError, match="No space left.*/out|/out: .*No space left"):
        export_merged(directory, tmp_path / "adapter", tmp_path / "out", torch.float32)
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base", *(["out"] if existing else [])]
    assert not existing or os.listdir(tmp_path / "out") == []


def test_too_little_space_is_found_before_anything_is_written(base, tmp_path, monkeypatch):
    directory = base()
    adapted(directory, tmp_path / "adapter")
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result([1, 1, 1000, 10, 10, 0, 0, 0, 0, 255]))
    monkeypatch.setattr(export, "_write", lambda *arguments: pytest.fail("written"))
    with pytest.raises(OSError, match=r"No space left on device: needs .* 1e-08 GB are free"):
        export_merged(directory, tmp_path / "adapter", tmp_path / "out", torch.float32)
    assert not (tmp_path / "out").exists()


def test_what_a_killed_merge_left_is_no_model_and_goes(base, tmp_path):
    """SIGKILL between the renames: the next merge removes its hidden directory, and names what else is there."""
    directory = base()
    adapted(directory, tmp_path / "adapter")
    code = (
        "import os, signal, sys, torch\nfrom pathlib import Path\nfrom fused_lora.finetune.export import *\n"
        "real, calls = os.replace, []\n"
        "def replace(*args):\n    calls.append(args)\n    real(*args)\n"
        "    len(calls) == int(sys.argv[4]) and os.kill(os.getpid(), signal.SIGKILL)\n"
        "os.replace = replace\n"
        "export_merged(sys.argv[1], *map(Path, sys.argv[2:4]), torch.float32)"
    )
    arguments = [sys.executable, "-c", code, directory, tmp_path / "adapter", tmp_path / "out", str(len(MERGED) - 1)]
    done = subprocess.run(list(map(str, arguments)), capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert sorted({*MERGED, export._STAGING, LOCK} - {"config.json"}) == sorted(os.listdir(tmp_path / "out"))
    with pytest.raises(ValueError, match="--output must be a new or an empty directory; got .* entries: "):
        export_merged(directory, tmp_path / "adapter", tmp_path / "out", torch.float32)
    assert sorted(os.listdir(tmp_path / "out")) == sorted({*MERGED} - {"config.json"})
    for path in (tmp_path / "out").iterdir():
        path.unlink()
    (tmp_path / "out" / export._STAGING).mkdir()
    (tmp_path / "out" / export._STAGING / "model.safetensors").write_bytes(b"half")
    export_merged(directory, tmp_path / "adapter", tmp_path / "out", torch.float32)
    assert sorted(os.listdir(tmp_path / "out")) == MERGED
