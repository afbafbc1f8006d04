"""`fused-lora analyze`: figures of adapters, with and without their base, and of whole models."""

import io
import json
import re

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny_llama import llama, randomise
from transformers import GPT2Config, GPT2LMHeadModel

from fused_lora import apply_lora, merge_and_unload, save_adapter
from fused_lora.analysis import effective_rank, intruder_dimensions, perturbation_rank
from fused_lora.analysis.report import changed, dense, lying_turned, read_adapter, rows
from fused_lora.cli import console


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory):
    """(base, adapter with two ranks, the two merged)."""
    from fused_lora.models import load_model

    directory = tmp_path_factory.mktemp("analyze")
    model, _ = load_model(tiny_model, torch.float32, "cpu")
    randomise(apply_lora(model, 4, 8, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 2}))
    save_adapter(model, directory / "adapter")
    merge_and_unload(model).save_pretrained(directory / "merged")  # without a tokenizer, which nothing here needs
    return tiny_model, directory / "adapter", directory / "merged"


def figures(text):
    """The cells of the table by layer."""
    lines = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines() if re.search(r"\d x \d", line)]
    return {cells[0]: cells[1:] for cells in lines}


def test_an_adapter_and_the_model_that_it_makes_have_the_same_figures(call, trained, tmp_path):
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


def test_a_file_gets_each_name_whole(call, tmp_path):
    """Beyond the 80 columns that a console believes in where it writes to no terminal."""
    name = ".".join(["model"] + [f"a_long_name_{i}" for i in range(8)])
    pair = {f"{name}.lora_A.weight": torch.ones(2, 32), f"{name}.lora_B.weight": torch.ones(32, 2)}
    write_adapter(tmp_path, pair)
    assert list(figures(call("analyze", tmp_path)[0])) == [name]


def test_figures_are_whole_on_a_terminal_of_80_columns(call, trained, monkeypatch):
    base, adapter, _ = trained
    written = io.StringIO()
    terminal = Console(width=80, force_terminal=True, color_system=None, legacy_windows=False, file=written)
    monkeypatch.setattr(console, "out", terminal)
    call("analyze", adapter, "--model", base)
    lines = written.getvalue().splitlines()
    assert "rank 90%" in lines[0] and "intruders" in lines[0]
    assert "…" not in written.getvalue() and all(len(line) <= 80 for line in lines)
    assert "".join(line[:30].strip() for line in lines[1:3]).startswith("model.layers.0.")


def test_a_plot_is_a_png(refused, trained, tmp_path):
    for name in ("spectra.pdf", "spectra"):
        assert "--plot must be a .png file" in refused(2, "analyze", trained[1], "--plot", tmp_path / name)
        assert not (tmp_path / name).exists()


def test_layers_whose_magnitude_alone_trains(tmp_path):
    """DoRA of rank 0: the update is the rows' scaling alone, which needs the model's weights."""
    model = randomise(apply_lora(llama(), 2, use_dora=True, rank_pattern={"q_proj": 0}))
    weights = {name: t.clone() for name, t in llama().state_dict().items()}
    save_adapter(model, tmp_path)
    updates, notes = read_adapter(tmp_path, weights)
    alone = "model.layers.0.self_attn.q_proj"
    m = load_file(tmp_path / "adapter_model.safetensors")[f"base_model.model.{alone}.lora_magnitude_vector"]
    W = weights[f"{alone}.weight"]
    torch.testing.assert_close(updates[f"{alone}.weight"], W * (m / W.norm(dim=1))[:, None])
    assert not notes
    updates, notes = read_adapter(tmp_path)
    assert f"{alone}.weight" not in updates and "whose magnitude alone trains" in notes[0]


@pytest.mark.parametrize("use_dora", [False, True])
def test_an_adapter_of_another_base_is_named(tmp_path, use_dora):
    options = dict(use_dora=True, rank_pattern={"q_proj": 0}) if use_dora else dict(modules_to_save=["lm_head"])
    save_adapter(apply_lora(llama(), 2, target_modules=["q_proj", "up_proj"], **options), tmp_path)
    weights = dict(llama().state_dict())
    q, head = "model.layers.0.self_attn.q_proj.weight", "lm_head.weight"
    without = {name: t for name, t in weights.items() if name != q}
    with pytest.raises(ValueError, match=f"--model must be the adapter's base: it must have {q}; got a model without"):
        read_adapter(tmp_path, without)
    name, words = (q, "must have 64 rows, as many as magnitudes; got 63") if use_dora else (head, "must have shape")
    with pytest.raises(ValueError, match=f"--model must be the adapter's base: {name} {words}"):
        read_adapter(tmp_path, weights | {name: weights[name][:-1]})
    file = tmp_path / "adapter_model.safetensors"
    tensors, key = load_file(file), "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    save_file(tensors | {key: tensors[key][:1].clone()}, file)
    with pytest.raises(ValueError, match=r"must hold lora_A and lora_B of model.layers.0.mlp.up_proj of one rank; got"):
        read_adapter(tmp_path, weights)


def test_the_figures_are_the_functions(trained):
    from fused_lora.models import load_model

    base, adapter, _ = trained
    weights = load_model(base, torch.float32, "cpu")[0].state_dict()
    updates, notes = read_adapter(adapter, weights)
    assert not notes
    for row in rows(updates, weights, energy=0.5, k=5, eps=0.9):
        update, before = updates[f"{row.name}.weight"], weights[f"{row.name}.weight"]
        assert row.rank == perturbation_rank(dense(update), 0.5)
        assert row.effective_rank == pytest.approx(effective_rank(dense(update)), rel=1e-4)
        assert row.norm == pytest.approx(dense(update).norm().item(), rel=1e-5)
        assert row.intruders == len(intruder_dimensions(before, before + dense(update), 5, 0.9))


@pytest.mark.parametrize("use_dora", [False, True])
def test_embeddings_transposed_weights_and_full_copies(tmp_path, use_dora):
    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=16, vocab_size=40, tie_word_embeddings=False)
    model, targets = GPT2LMHeadModel(config), ["c_attn", "attn.c_proj", *([] if use_dora else ["wte"])]
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    turned = lying_turned(model)
    options = dict(modules_to_save=["lm_head"], use_dora=use_dora)
    randomise(apply_lora(model, 3, 6, target_modules=targets, **options))
    save_adapter(model, tmp_path)
    updates, notes = read_adapter(tmp_path, weights, turned)
    found = {row.name: row for row in rows(updates, weights)}
    assert not notes
    assert {name: row.shape for name, row in found.items()} == {
        "transformer.h.0.attn.c_attn": (16, 48),
        "transformer.h.0.attn.c_proj": (16, 16),
        **({} if use_dora else {"transformer.wte": (40, 16)}),
        "lm_head": (40, 16),
    }
    after = merge_and_unload(model).state_dict()
    for name, row in found.items():
        before, tuned = weights[f"{name}.weight"], after[f"{name}.weight"]
        assert row.norm == pytest.approx((tuned - before).norm().item(), rel=1e-4)
        assert row.rank == perturbation_rank(tuned - before)
        assert row.intruders == len(intruder_dimensions(before, tuned))
    updates, notes = read_adapter(tmp_path)
    assert "lm_head.weight" not in updates and "without figures: 1 layers trained in full, as lm_head" in notes[0]
    assert len(notes) == 1 + use_dora and (not use_dora or "2 layers are DoRA's: without --model" in notes[1])


def test_a_tied_weight_has_one_line():
    model = llama(tie=True)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    assert len([name for name in before if "embed" in name or "head" in name]) == 2
    assert list(changed(before, model.state_dict())) == ["model.embed_tokens.weight"]


def test_adapters_of_fused_experts_are_left_out_with_a_word(call, tmp_path):
    lora_A = {"attn.q_proj.lora_A.weight": torch.ones(2, 8), "mlp.experts.base_layer.lora_A.weight": torch.ones(8, 6)}
    tensors = lora_A | {
        "attn.q_proj.lora_B.weight": torch.ones(8, 2),
        "mlp.experts.base_layer.lora_B.weight": torch.ones(6, 8),
    }
    write_adapter(tmp_path, tensors, target_parameters=["experts.gate_up_proj"])
    out, _ = call("analyze", tmp_path)
    assert "1 weights" in out and "without figures: 1 adapters of fused experts, as mlp.experts" in out


def write_adapter(directory, tensors, **fields):
    config = dict(peft_type="LORA", r=2, lora_alpha=2, target_modules=["q_proj"]) | fields
    (directory / "adapter_config.json").write_text(json.dumps(config))
    named = {f"base_model.model.{name}": t for name, t in tensors.items()}
    save_file(named, directory / "adapter_model.safetensors")


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
    assert "--top must be >= 1; got 0" in refused(2, "analyze", adapter, "--top", "0")
    assert "energy must be in (0, 1]" in refused(2, "analyze", adapter, "--energy", "0")


def test_files_that_do_not_fit_are_named(refused, trained, tmp_path):
    base = trained[0]
    pair = {"q_proj.lora_A.weight": torch.ones(2, 32), "q_proj.lora_B.weight": torch.ones(32, 2)}
    write_adapter(tmp_path, {"q_proj.lora_A.weight": torch.ones(2, 32)})
    assert "must hold lora_B of q_proj beside its lora_A" in refused(2, "analyze", tmp_path)
    write_adapter(tmp_path, pair)
    line = refused(2, "analyze", tmp_path, "--model", base)
    assert "must be the adapter's base: it must have q_proj.weight; got a model without it" in line
    write_adapter(tmp_path, pair | {"q_proj.lora_B.weight": torch.full((32, 2), torch.nan)})
    assert "q_proj.weight must be finite" in refused(2, "analyze", tmp_path)


def test_an_adapter_that_began_as_a_part_of_the_weights(call, refused, tmp_path):
    """Its B A is not what it has changed."""
    llama().save_pretrained(tmp_path / "base")
    save_adapter(apply_lora(llama(), 2, init_lora_weights="pissa"), tmp_path / "adapter")
    assert "of which W gave the start" in read_adapter(tmp_path / "adapter")[1][0]
    said = refused(2, "analyze", tmp_path / "adapter", "--model", tmp_path / "base")
    assert "--model must not be given for an adapter with init_lora_weights='pissa'" in said
