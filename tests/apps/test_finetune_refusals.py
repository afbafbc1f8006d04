"""What a run refuses, before the long work and before anything is lost."""

import dataclasses
import os

import pytest
import torch
from finetune_runs import contents, refused_unloaded

from fused_lora.data import IGNORED
from fused_lora.finetune import job as finetune
from fused_lora.finetune import loop as training


@pytest.fixture(scope="module")
def opt(tiny_files, tmp_path_factory):
    """The directory of a model with 32 learned positions."""
    from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

    directory = tmp_path_factory.mktemp("opt")
    shape = dict(hidden_size=16, word_embed_proj_dim=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16)
    tokens = dict(vocab_size=257, bos_token_id=256, eos_token_id=256, pad_token_id=256)
    OPTForCausalLM(OPTConfig(**shape, **tokens, max_position_embeddings=32)).save_pretrained(directory)
    AutoTokenizer.from_pretrained(tiny_files[0]).save_pretrained(directory)
    return str(directory)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(rank=0), "rank must be an int >= 1; got 0"),
        (dict(steps=0), "steps must be an int >= 1; got 0"),
        (dict(seed=2**32), "seed must be less than 2\\*\\*32; got 4294967296"),
        (dict(seq_len=1), "seq_len must be an int >= 2; got 1"),
        (dict(lr=-1.0), "lr must be a finite number >= 0; got -1.0"),
        (dict(lr=float("nan")), "lr must be a finite number >= 0; got nan"),
        (dict(warmup=6), "warmup must be less than steps, 6; got 6"),
        (dict(dtype="int8"), "dtype must be one of fp32, bf16, fp16; got 'int8'"),
        (dict(device="gpu"), "device must be cpu, cuda or cuda:<number>; got 'gpu'"),
        (dict(device="cuda:99"), "device 'cuda:99' needs a GPU that PyTorch sees"),
        (dict(dropout=1.0), r"dropout must be a number in \[0, 1\); got 1.0"),
        (dict(alpha=float("inf")), "alpha must be a finite number; got inf"),
        (dict(target_modules="q_porj"), "target_modules.*q_porj.*q_proj"),
        (dict(target_modules=""), "target_modules must not be empty"),
        (dict(target_modules="(q"), "target_modules must be a regular expression; got '.q'"),
        (dict(text_field=""), "text_field must not be empty"),
        (dict(eval_data=("x", "")), "eval_data must be files or directories; got ''"),
        (dict(rank=2**63), "rank must be less than 2\\*\\*63; got 9.22337e\\+18"),
        (dict(batch_size=2**40, seq_len=2**40), "a step must have less than 2\\*\\*63 tokens"),
        (dict(steps=10**30, warmup=10**30 - 1), "warmup must be less than 2\\*\\*63; got 1e\\+30"),
    ],
)
def test_bad_settings(tiny, run, settings_of, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        run(settings_of(tiny, **change), tmp_path / "out")
    assert not (tmp_path / "out").exists() or not os.listdir(tmp_path / "out")


def test_bad_intervals(tiny, run, settings_of, tmp_path):
    for name in ("save_every", "eval_every"):
        with pytest.raises(ValueError, match=f"{name} must be an int >= 0; got -1"):
            run(settings_of(tiny), tmp_path / "out", **{name: -1})


def test_a_loss_that_is_not_finite_stops_the_run(tiny, run, settings_of, tmp_path):
    with pytest.raises(ValueError, match="loss and gradient must be finite, a lower --lr may help; got loss"):
        run(settings_of(tiny, lr=1e30, max_grad_norm=0.0), tmp_path / "out")


@pytest.mark.parametrize("link", [False, True])
def test_the_models_own_directory_is_no_output(tiny, settings_of, tmp_path, monkeypatch, link):
    output = os.path.relpath(tiny[0])
    if link:
        (tmp_path / "link").symlink_to(tiny[0])
        output = tmp_path / "link"
    refused_unloaded(monkeypatch, "--output must not be the base model's own", settings_of(tiny), finetune.Path(output))
    linked = settings_of((str(output), tiny[1])) if link else settings_of(tiny)
    refused_unloaded(monkeypatch, "--output must not be the base model's own", linked, finetune.Path(tiny[0]))
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf/model.gguf").write_bytes(b"")
    settings = settings_of(tiny, model=str(tmp_path / "gguf/model.gguf"))
    refused_unloaded(monkeypatch, "--output must not be the base model's own", settings, tmp_path / "gguf")


def test_an_output_among_the_data_is_refused(tiny, settings_of, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.txt").write_text("words\nand words\n")
    where = (str(tmp_path / "data"),)
    for change in (dict(data=where), dict(eval_data=where)):
        match = "--output must lie outside the data"
        refused_unloaded(monkeypatch, match, settings_of(tiny, **change), tmp_path / "data/out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/summary.json").write_text("words\nand words\n")
    settings = settings_of(tiny, data=(str(tmp_path / "out/summary.json"),))
    refused_unloaded(monkeypatch, "--output must not write over the data", settings, tmp_path / "out", overwrite=True)


@pytest.mark.parametrize("prompt", ["", "half \ud83d"])
def test_prompts_that_are_no_text_are_refused_first(tiny, settings_of, tmp_path, monkeypatch, prompt):
    refused_unloaded(monkeypatch, "--prompt must be UTF-8 text", settings_of(tiny), tmp_path / "out", prompt=prompt)


def test_a_prompt_beyond_the_context_is_refused_before_the_training(tiny, settings_of, stopped_copy):
    output = stopped_copy
    before = contents(output)
    with pytest.raises(ValueError, match="less than the model's context; got 64 tokens"):
        finetune.finetune(settings_of(tiny), output, overwrite=True, prompt="x" * 64, say=lambda line: None)
    assert contents(output) == before
    model, tokenizer = finetune.load_model(tiny[0], torch.float32, "cpu")
    lengths, generate = [], model.generate
    model.generate = lambda **options: lengths.append(generate(**options).shape[1]) or generate(**options)
    model.generation_config.eos_token_id = None
    finetune.complete(model, tokenizer, "x" * 60)
    assert lengths == [64], "no token beyond the context"


def test_a_default_prompt_without_words_is_replaced(tiny, settings_of):
    _, tokenizer = finetune.load_model(tiny[0], torch.float32, "cpu")
    blanks = torch.tensor([tokenizer(" \n \n ").input_ids])
    assert finetune._default_prompt(tokenizer, blanks, settings_of(tiny), 64).startswith("def ")
    words = torch.tensor([[*tokenizer("a word").input_ids, IGNORED]])
    assert finetune._default_prompt(tokenizer, words, settings_of(tiny), None) == "a word"
    assert finetune._default_prompt(tokenizer, words, settings_of(tiny), 8) == "a wo", "room for an answer"


def test_blocks_beyond_learned_positions_are_refused_and_the_old_run_stays(tiny, run, settings_of, opt, stopped_copy):
    output = stopped_copy
    before, settings = contents(output), settings_of((opt, tiny[1]), seq_len=33, steps=3)
    with pytest.raises(ValueError, match="seq_len must be within the model's context, 32 tokens; got 33 .IndexError"):
        run(settings, output, overwrite=True)
    assert contents(output) == before
    finetune.finetune(dataclasses.replace(settings, seq_len=32), output, overwrite=True, say=lambda line: None)
    assert (output / "summary.json").exists(), "the default prompt must leave room in the context"


def test_blocks_beyond_a_context_that_the_model_can_leave_are_said(tiny, settings_of, tmp_path):
    said = []
    settings = settings_of(tiny, seq_len=80, steps=3)
    finetune.finetune(settings, tmp_path / "out", say=said.append, prompt="the")
    assert "blocks of 80 tokens are longer than the model's context of 64" in said


def test_tokens_that_the_model_does_not_know_are_refused(tiny, run, settings_of, tmp_path, monkeypatch):
    load = finetune.load_model

    def smaller(*arguments):
        model, tokenizer = load(*arguments)
        model.resize_token_embeddings(100)
        return model, tokenizer

    monkeypatch.setattr(finetune, "load_model", smaller)
    with pytest.raises(ValueError, match="the tokenizer must be the model's, which knows 100 tokens; got token 256"):
        run(settings_of(tiny), tmp_path / "out")


@pytest.mark.parametrize("outcome", [float("nan"), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_base_that_fails_is_found_before_the_old_run_is_replaced(
    tiny, run, settings_of, stopped_copy, monkeypatch, outcome
):
    output = stopped_copy
    before = contents(output)

    def measure(*arguments):
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(training, "held_out_loss", measure)
    with pytest.raises((ValueError, RuntimeError), match="held-out data must be finite; got nan|DefaultCPUAllocator"):
        run(settings_of(tiny), output, overwrite=True)
    assert contents(output) == before


def test_too_little_space_is_found_before_the_training(tiny, run, settings_of, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result([1, 1, 10**6, 10**3, 10**3, 0, 0, 0, 0, 255]))
    with pytest.raises(OSError, match="No space left on device: needs"):
        run(settings_of(tiny), tmp_path / "out", tick=lambda row: pytest.fail("trained"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change",
    [
        dict(),
        dict(merge_every=2),
        dict(full=True),
        *(dict(optimizer=name) for name in ("lion", "rite", "pro", "lora-fa")),
    ],
    ids=str,
)
def test_the_space_is_what_a_run_needs_at_its_peak(tiny, run, settings_of, tmp_path, monkeypatch, change):
    """The old checkpoint and the new one lie there at once."""
    asked, there, replace = [], [], os.replace

    def seen(*arguments):
        there.append(sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file()))
        replace(*arguments)

    monkeypatch.setattr(finetune, "_FIGURES", 2**17)  # beside a tiny adapter; files have headers and the plot 50 KB
    monkeypatch.setattr(finetune, "check_space", lambda directory, needed: asked.append(needed))
    settings = settings_of(tiny, **({} if "full" in change else dict(rank=24)), **change)
    run(settings, tmp_path / "out", save_every=1)
    monkeypatch.setattr(os, "replace", seen)
    run(settings, tmp_path / "out", save_every=1, overwrite=True)
    assert max(there) <= asked[0] <= 1.5 * max(there) + 2**17, (asked, max(there))


def test_a_run_needs_no_peft_for_its_summary(tiny, tmp_path, monkeypatch):
    real = finetune.metadata.version

    def version(name):
        if name == "peft":
            raise finetune.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(finetune.metadata, "version", version)
    assert "torch" in finetune._versions() and "peft" not in finetune._versions()
