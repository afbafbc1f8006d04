"""Loading a base model: whole, of the shapes that its configuration says, and nothing but a base model."""

import json
import logging
import os
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fused_lora import apply_lora, models, save_adapter
from fused_lora.finetune.settings import Settings
from fused_lora.models import load_model, packaged_model


@pytest.fixture
def copied(tiny_model, tmp_path):
    """A copy of the tiny model's directory."""
    return shutil.copytree(tiny_model, tmp_path / "model")


def load(path, **options):
    return load_model(path, torch.float32, "cpu", **options)


def change_tensors(directory, change):
    """Rewrite model.safetensors with what `change` makes of its dict."""
    path = directory / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def change_config(directory, **fields):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_models_that_are_none_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty must be a Hugging Face model directory with a config.json; got none"):
        load(tmp_path / "empty")
    for path in (tmp_path / "nowhere", tmp_path / "nowhere.gguf"):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            load(path)
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="Not a model directory and not a GGUF file.*model.bin"):
        load(tmp_path / "model.bin")
    with pytest.raises(ValueError, match="--model must be a model directory, a GGUF file or a hub id; got ''"):
        load("")
    with pytest.raises(ValueError, match=r"--model must have a name in UTF-8, .*caf\\xe9"):
        load(tmp_path / os.fsdecode(b"caf\xe9"))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_damaged_files_are_one_error(copied, name):
    path = copied / name
    path.write_bytes(path.read_bytes()[:1000] if name == "model.safetensors" else b"[]")
    with pytest.raises(ValueError, match=f"{copied} must be a causal language model that transformers loads; got"):
        load(copied)


@pytest.mark.parametrize(
    "part, says",
    [
        (".layers.1.mlp.", r"model.layers.1.mlp.down_proj.weight, .*gate_proj.weight, .*up_proj.weight missing"),
        ("lm_head", "lm_head.weight missing"),
        ("", r"lm_head.weight, model.embed_tokens.weight, .* and \d+ more missing"),
    ],
)
def test_missing_tensors_are_named(copied, part, says):
    change_tensors(copied, lambda tensors: {k: t for k, t in tensors.items() if part not in k} or {"x": torch.ones(1)})
    with pytest.raises(ValueError, match=f"{copied} must hold every tensor of a LlamaForCausalLM; {says}"):
        load(copied)


def test_a_missing_shard_and_a_tensor_that_its_shard_lacks_are_named(copied):
    model, _ = load(copied)
    (copied / "model.safetensors").unlink()
    model.save_pretrained(copied, max_shard_size="20KB")
    load(copied)
    shard = sorted(copied.glob("model-0000*.safetensors"))[1]
    tensors = load_file(shard)
    first = min(tensors)
    kept = {key: tensor for key, tensor in tensors.items() if key != first}
    save_file(kept or {"x": torch.ones(1)}, shard, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"must hold every tensor of a LlamaForCausalLM; {first} missing"):
        load(copied)
    shard.unlink()
    with pytest.raises(OSError, match=shard.name):
        load(copied)


def test_other_shapes_are_named(copied):
    change_config(copied, intermediate_size=40)
    with pytest.raises(
        ValueError, match=r"shapes that its config.json says; .*down_proj.weight is \[32, 48\] and must"
    ):
        load(copied)


@pytest.mark.parametrize(
    "extra, left_out",
    [
        ("model.layers.0.self_attn.q_proj.bias", True),
        ("model.layers.2.mlp.down_proj.weight", True),
        ("vision.proj.weight", False),
        ("score.weight", False),
        ("model.layers.0.self_attn.masked_bias", False),
    ],
)
def test_tensors_that_the_configuration_leaves_out(copied, caplog, extra, left_out):
    """A layer or a bias that would be dropped gives another model; a part that the architecture has not is logged."""
    change_tensors(copied, lambda tensors: {**tensors, extra: torch.ones(32)})
    if left_out:
        with pytest.raises(ValueError, match=f"config.json of its own tensors; it leaves out {extra}"):
            load(copied)
    else:
        with caplog.at_level(logging.WARNING, logger="fused_lora"):
            load(copied)
        assert [r.getMessage() for r in caplog.records if r.name == "fused_lora"] == [f"{copied}: not used: {extra}"]


def test_a_base_with_an_adapter_beside_it_is_no_base(copied, tmp_path, monkeypatch):
    """transformers loads such an adapter too, without a word."""
    save_adapter(apply_lora(load(copied)[0], r=4), copied)
    with pytest.raises(ValueError, match="--model must be a base model; got .* with an adapter_config.json in "):
        load(copied)
    (tmp_path / "model.gguf").write_bytes(b"")
    shutil.copy(copied / "adapter_config.json", tmp_path)
    with pytest.raises(ValueError, match="--model must be a base model; got .*model.gguf with an adapter_config.json"):
        load(tmp_path / "model.gguf")
    monkeypatch.setattr(models, "check_name", lambda path: None)  # as for an adapter on the hub
    with pytest.raises(ValueError, match="--model must be a base model; got .*, an adapter on one"):
        load(copied)


def test_code_of_a_model_is_not_run_and_nobody_is_asked(copied, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked"))
    change_config(copied, model_type="mine", auto_map={"AutoConfig": "a.B", "AutoModelForCausalLM": "a.C"})
    (copied / "a.py").write_text("raise SystemExit('run')")
    with pytest.raises(ValueError, match="must be a causal language model that transformers loads; got .*custom code"):
        load(copied)


@pytest.mark.parametrize(
    "error", [RuntimeError("DefaultCPUAllocator: can't allocate memory"), torch.OutOfMemoryError("x"), MemoryError()]
)
def test_memory_that_runs_out_is_not_the_models_fault(tiny_model, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(type(error)) as caught:
        load(tiny_model)
    assert caught.value is error


@pytest.mark.parametrize("size", [(10**13,), (2**62,), (2**40, 2**40)])
def test_what_pytorch_raises_without_memory_is_known(size):
    with pytest.raises(RuntimeError) as caught:
        torch.empty(size)
    assert models.out_of_memory(caught.value)
    assert not models.out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_the_name_that_adapters_write(tiny_model, monkeypatch):
    monkeypatch.chdir(os.path.dirname(tiny_model))
    assert load(os.path.basename(tiny_model))[0].name_or_path == tiny_model
    monkeypatch.setattr(models, "packaged_model", lambda: models.Path(tiny_model))
    assert load(tiny_model)[0].name_or_path == models.PACKAGED


def test_the_names_of_the_packaged_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert {models.base_model(name) for name in (None, "", "packaged", models.PACKAGED)} == {packaged_model()}
    assert models.base_model("owner/packaged") == "owner/packaged" and Settings(model=models.PACKAGED).model == ""
    (tmp_path / "packaged").mkdir()
    assert models.base_model("packaged") == Settings(model="packaged").model == "packaged"


def test_a_configuration_is_read_as_the_model_is(tiny_model):
    assert models.load_config(tiny_model).hidden_size == 32
    assert models.load_config(packaged_model()).hidden_size == 576  # from a GGUF file
    with pytest.raises(OSError, match="owner/nowhere is no directory here, and as a model id: "):
        models.load_config("owner/nowhere")


def test_a_revision_is_of_the_hub(tiny_model, monkeypatch):
    seen = []

    def fail(source, **options):
        seen.append(options.get("revision"))
        raise OSError("out of reach")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
    for path in ("owner/model", tiny_model):
        with pytest.raises(OSError, match="out of reach"):
            load(path, revision="abc")
    assert seen == ["abc", None]


def test_the_packaged_model_is_a_gguf_file():
    assert packaged_model().suffix == ".gguf" and models._is_packaged(packaged_model())
