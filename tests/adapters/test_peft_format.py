"""Adapter files: every way a file can be damaged, foreign or unsupported, and writes that fail half-way."""

import errno
import json
import os
import pickle
import resource

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llama import llama, randomise

from fused_lora.adapters import apply_lora, load_adapter, save_adapter

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def adapter(tmp_path):
    """A good adapter in tmp_path, to be damaged."""
    save_adapter(randomise(apply_lora(llama(), r=4, target_modules=["q_proj", "v_proj"])), tmp_path)
    return tmp_path


def edit_config(directory, **fields):
    config = json.loads((directory / CONFIG).read_text())
    config.update(fields)
    (directory / CONFIG).write_text(json.dumps(config))


def edit_tensors(directory, change):
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS)


Q0 = "base_model.model.model.layers.0.self_attn.q_proj."


@pytest.mark.parametrize("into", ["plain", "existing"])
@pytest.mark.parametrize(
    "damage, message",
    [
        (
            lambda d: (d / WEIGHTS).write_bytes((d / WEIGHTS).read_bytes()[:-100]),
            rf"{WEIGHTS} must be a whole safetensors file",
        ),
        (
            lambda d: (d / WEIGHTS).write_bytes((d / WEIGHTS).read_bytes()[:20]),
            rf"{WEIGHTS} must be a whole safetensors file",
        ),
        (lambda d: (d / WEIGHTS).write_bytes(b""), rf"{WEIGHTS} must be a whole safetensors file"),
        (lambda d: (d / WEIGHTS).write_bytes(bytes(range(256)) * 8), rf"{WEIGHTS} must be a whole safetensors file"),
        (
            lambda d: edit_tensors(d, lambda t: t.pop(Q0 + "lora_A.weight")),
            rf"{WEIGHTS} must hold the 8 tensors .* 1 missing: {Q0}lora_A",
        ),
        (lambda d: edit_tensors(d, lambda t: t.update(extra=torch.ones(2))), r"got 9, 1 unexpected: extra"),
        (lambda d: edit_tensors(d, dict.clear), r"got 0, 8 missing"),
        (lambda d: save_file({"model.weight": torch.ones(2)}, d / WEIGHTS), r"got 1, 8 missing"),
        (
            lambda d: edit_tensors(d, lambda t: t.update({Q0 + "lora_A.weight": torch.ones(4, 48)})),
            r"another base model: model\.layers\.0\.self_attn\.q_proj\.lora_A\.weight must have shape \[4, 64\]; got "
            r"\[4, 48\]",
        ),
        (
            lambda d: edit_tensors(d, lambda t: t.update({Q0 + "lora_B.weight": torch.ones(64, 4, dtype=torch.int32)})),
            r"lora_B.weight must be floating point; got I32",
        ),
        (lambda d: (d / CONFIG).write_text("{"), rf"{CONFIG} must be JSON"),
        (lambda d: (d / CONFIG).write_bytes(b"\xff\xfe\x00"), rf"{CONFIG} must be JSON"),
        (lambda d: (d / CONFIG).write_text("[1]"), rf"{CONFIG} must hold a JSON object; got list"),
        (lambda d: edit_config(d, peft_type="IA3"), r"peft_type must be 'LORA'; got 'IA3'"),
        (lambda d: edit_config(d, r=0), rf"{CONFIG}: r must be an int >= 1; got 0"),
        (lambda d: edit_config(d, lora_alpha="x"), rf"{CONFIG}: lora_alpha must be a finite number"),
        (
            lambda d: edit_config(d, target_modules=None),
            rf"{CONFIG}: target_modules must be a list or a regular expression; got None",
        ),
        (
            lambda d: edit_config(d, target_modules=["qkv"]),
            rf"{CONFIG} does not fit the model: target_modules must be one of .*; got 'qkv'",
        ),
        (
            lambda d: edit_config(d, rank_pattern={"q_proj": 2}),
            r"must have shape \[2, 64\]; got \[4, 64\]|exists with r=4",
        ),
        (
            lambda d: edit_config(d, use_dora=True),
            r"got 8, 4 missing: .*lora_magnitude_vector|exists with use_dora=False",
        ),
        (lambda d: edit_config(d, lora_bias=True), r"got 8, 4 missing: .*lora_B.bias|exists with lora_bias=False"),
        (lambda d: edit_config(d, bias="some"), r"bias must be one of \['all', 'lora_only', 'none'\]; got 'some'"),
        (lambda d: edit_config(d, layers_to_transform=[0]), r"got 8, 4 unexpected|exists on other layers"),
        (lambda d: edit_config(d, layer_replication=[[0, 1]]), r"layer_replication is not supported"),
        (
            lambda d: edit_config(d, target_parameters=["norm.weight"]),
            r"target_parameters: model\.norm: weight must be .* two or three dimensions",
        ),
        (
            lambda d: edit_config(d, trainable_token_indices=[1]),
            r"got 8, 1 missing: .*trainable_tokens_delta|exists on other",
        ),
        (
            lambda d: edit_config(d, a_field_of_the_future=1),
            r"a_field_of_the_future is not supported and must be off; got 1",
        ),
        (
            lambda d: edit_config(d, init_lora_weights="pissa_niter_4"),
            r"init_lora_weights must be one of .* rewrite the base weights .*; got 'pissa_niter_4'",
        ),
        (
            lambda d: edit_config(d, init_lora_weights="pissa", r=65),
            r"must have shape|up to its smaller side; got .* and r=65|exists with",
        ),
        (lambda d: edit_config(d, init_lora_weights="mica"), r"init_lora_weights must be one of .*; got 'mica'"),
    ],
)
def test_bad_files_are_refused_and_change_nothing(damage, message, into, adapter, refuses):
    model = llama() if into == "plain" else apply_lora(llama(), r=4, target_modules=["q_proj", "v_proj"])
    damage(adapter)
    if into == "existing" and ("qkv" in message or "missing" in message):
        message = f"{message}|exists on other layers"
    with refuses(model, message):
        load_adapter(model, adapter)


def test_another_base_is_named(adapter, refuses):
    model = llama(hidden=32)
    with refuses(
        model,
        r"for another base model: model\.layers\.0\.self_attn\.q_proj\.lora_A\.weight must have shape \[4, 32\]; got "
        r"\[4, 64\]",
    ):
        load_adapter(model, adapter)


def test_an_existing_name_of_other_shape_is_refused(adapter, refuses):
    model = apply_lora(llama(), r=8, target_modules=["q_proj", "v_proj"])
    with refuses(model, r"'default' exists with r=8 in model\.layers\.0\.self_attn\.q_proj; got r=4"):
        load_adapter(model, adapter)
    model = apply_lora(llama(), r=4, target_modules=["q_proj", "k_proj"])
    with refuses(
        model,
        r"'default' exists on other layers than the file's, which differ in \['model\.layers\.0\.self_attn\.k_proj'",
    ):
        load_adapter(model, adapter)


def test_missing_files_are_named(adapter, refuses):
    model = llama()
    (adapter / WEIGHTS).unlink()
    with refuses(model, WEIGHTS, FileNotFoundError):
        load_adapter(model, adapter)
    (adapter / CONFIG).unlink()
    with refuses(model, CONFIG, FileNotFoundError):
        load_adapter(model, adapter)


def test_pickles_are_never_read(adapter, refuses):
    class Trap:
        def __reduce__(self):
            return (open, (str(adapter / "sprung"), "w"))

    pickle.loads(pickle.dumps(Trap())).close()
    (adapter / "sprung").unlink()  # the trap works
    (adapter / WEIGHTS).unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Trap()))
    model = llama()
    with refuses(model, r"safetensors only; got adapter_model\.bin, a pickle"):
        load_adapter(model, adapter)
    assert not (adapter / "sprung").exists()


def contents(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_full_disk_leaves_the_old_files_whole(adapter):
    before = contents(adapter)
    assert len(before[WEIGHTS]) > 4096
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    model = randomise(apply_lora(llama(), r=16), 9)
    save_adapter(model, adapter / "sub")  # imports what a first save imports
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match=WEIGHTS) as raised:
            save_adapter(model, adapter)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    for path in (adapter / "sub").iterdir():
        path.unlink()
    (adapter / "sub").rmdir()
    assert raised.value.errno == errno.EFBIG and contents(adapter) == before


@pytest.mark.parametrize("function, call, name", [("fsync", 1, WEIGHTS), ("fsync", 2, CONFIG), ("replace", 1, WEIGHTS)])
def test_a_failing_step_leaves_the_old_files_whole(function, call, name, adapter, monkeypatch):
    model, before, calls = randomise(apply_lora(llama(), r=16), 9), contents(adapter), []
    real = getattr(os, function)

    def failing(*args):
        calls.append(args)
        if len(calls) == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    monkeypatch.setattr(os, function, failing)
    with pytest.raises(OSError, match=rf"No space left on device.*{name}") as raised:
        save_adapter(model, adapter)
    assert raised.value.errno == errno.ENOSPC and contents(adapter) == before
    save_adapter(model, adapter)
    assert contents(adapter).keys() == before.keys() and contents(adapter)[WEIGHTS] != before[WEIGHTS]


def test_a_write_is_synced_before_it_replaces(adapter, monkeypatch):
    steps = []
    for function in ("fsync", "replace"):
        real = getattr(os, function)
        monkeypatch.setattr(os, function, lambda *args, f=function, real=real: (steps.append(f), real(*args))[1])
    save_adapter(apply_lora(llama(), target_modules=["q_proj"]), adapter)
    assert steps == ["fsync", "fsync", "replace", "replace"]


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(OSError, match="file"):
        save_adapter(apply_lora(llama(), target_modules=["q_proj"]), tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_what_peft_cannot_express_is_not_saved(tmp_path):
    model = apply_lora(llama(), target_modules=["q_proj"])
    model.model.layers[1].self_attn.q_proj.set_hyperparameters("default", 8, 0.5, False)
    with pytest.raises(
        ValueError,
        match=r"lora_dropout must be the same in all layers.* 0.0 and, in model\.layers\.1\.self_attn\.q_proj, 0.5",
    ):
        save_adapter(model, tmp_path)
    model.model.layers[1].self_attn.q_proj.set_hyperparameters("default", 8, 0.0, False)
    model.model.layers[1].self_attn.q_proj.scaling["default"] = 3.0
    with pytest.raises(ValueError, match=r"scaling of model\.layers\.1\.self_attn\.q_proj must be 1.0.*; got 3.0"):
        save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())
