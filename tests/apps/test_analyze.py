"""`fused-lora analyze`: figures of adapters, with and without their base, and of whole models."""

import re

import pytest
import torch
from tiny_llama import llama, randomise
from transformers import GPT2Config, GPT2LMHeadModel

from fused_lora import apply_lora, merge_and_unload, save_adapter
from fused_lora.analysis import effective_rank, intruder_dimensions, perturbation_rank
from fused_lora.analysis.report import dense, read_adapter, rows
from fused_lora.cli import console


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory):
    """(base, adapter with two ranks, the two merged)."""
    from fused_lora.models import load_model

    directory = tmp_path_factory.mktemp("analyze")
    model, tokenizer = load_model(tiny_model, torch.float32, "cpu")
    randomise(apply_lora(model, 4, 8, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 2}))
    save_adapter(model, directory / "adapter")
    merge_and_unload(model).save_pretrained(directory / "merged")
    tokenizer.save_pretrained(directory / "merged")
    return tiny_model, directory / "adapter", directory / "merged"


def figures(text):
    """The cells of the table by layer."""
    lines = [re.split(r"\s*│\s*", line.strip("│ ")) for line in text.splitlines() if line.startswith("│")]
    return {cells[0]: cells[1:] for cells in lines}


def test_an_adapter_and_the_model_that_it_makes_have_the_same_figures(call, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(console.out, "width", 160)  # which it has read from the environment when it was made
    base, adapter, whole = trained
    out, _ = call("analyze", adapter)
    alone = figures(out)
    assert len(alone) == 4 and "mean rank" in out and "intruders" not in out
    assert alone["model.layers.0.self_attn.q_proj"][0] == "32 x 32"
    assert all(int(cells[2]) <= (2 if "down" in name else 4) for name, cells in alone.items())
    out, _ = call("analyze", adapter, "--model", base, "--plot", tmp_path / "spectra.png")
    with_base = figures(out)
    assert {name: cells[:4] for name, cells in with_base.items()} == alone
    assert (tmp_path / "spectra.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    out, _ = call("analyze", whole, "--model", base)
    assert figures(out) == with_base
    assert re.search(r"4 weights, mean rank .*, \d+ intruders", out)


def test_the_figures_are_the_functions(trained):
    from fused_lora.models import load_model

    base, adapter, _ = trained
    weights = load_model(base, torch.float32, "cpu")[0].state_dict()
    updates = read_adapter(adapter, weights)
    for row in rows(updates, weights, energy=0.5, k=5, eps=0.9):
        update, before = updates[f"{row.name}.weight"], weights[f"{row.name}.weight"]
        assert row.rank == perturbation_rank(dense(update), 0.5)
        assert row.effective_rank == pytest.approx(effective_rank(dense(update)), rel=1e-4)
        assert row.norm == pytest.approx(dense(update).norm().item(), rel=1e-5)
        assert row.intruders == len(intruder_dimensions(before, before + dense(update), 5, 0.9))


def test_embeddings_transposed_weights_and_full_copies(tmp_path):
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=16, vocab_size=40, tie_word_embeddings=False)
    model, targets = GPT2LMHeadModel(config), ["c_attn", "wte"]
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    randomise(apply_lora(model, 3, 6, target_modules=targets, modules_to_save=["lm_head"]))
    save_adapter(model, tmp_path)
    found = {row.name: row for row in rows(read_adapter(tmp_path, weights), weights)}
    assert {name: row.shape for name, row in found.items()} == {
        "transformer.h.0.attn.c_attn": (16, 48),
        "transformer.wte": (40, 16),
        "lm_head": (40, 16),
    }
    after = merge_and_unload(model).state_dict()
    for name, row in found.items():
        update = after[f"{name}.weight"] - weights[f"{name}.weight"]
        assert row.norm == pytest.approx(update.norm().item(), rel=1e-4)
        assert row.rank == perturbation_rank(update)
    assert "lm_head" not in {row.name for row in rows(read_adapter(tmp_path))}


def test_what_cannot_be_compared_is_refused(refused, trained, tmp_path):
    base, adapter, whole = trained
    assert "must hold an adapter" in refused(2, "analyze", whole)
    assert "No such directory" in refused(1, "analyze", tmp_path / "nothing")
    assert "must differ in a matrix" in refused(2, "analyze", base, "--model", base)
    llama().save_pretrained(tmp_path / "other")
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "other")
    assert "must be the adapter's base" in refused(2, "analyze", adapter, "--model", tmp_path / "other")
    assert "must have the same weights" in refused(2, "analyze", whole, "--model", tmp_path / "other")
    assert "energy must be in (0, 1]" in refused(2, "analyze", adapter, "--energy", "0")
