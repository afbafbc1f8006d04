"""One training step of a small model: candidates agree, bad ones are dropped, memory is of a process of its own."""

import functools

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fused_lora import LoRALinear
from fused_lora.backends import cpu_norm
from fused_lora.bench import memory, mixed, report, steps, ways
from fused_lora.bench.steps import Batch, Candidate, Workload, model_for, run_steps

SHAPE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
BASE = functools.partial(LlamaForCausalLM, LlamaConfig(vocab_size=64, use_cache=False, **SHAPE))
SMALL = Workload("small", BASE, (Batch(1, 8), Batch(2, 16)))


@pytest.fixture
def quick(monkeypatch):
    """Peak memory is not measured."""
    monkeypatch.setattr(memory, "in_fresh_process", lambda *arguments: 2.0)


def test_a_step_of_every_candidate(quick, capsys):
    for batch, rows in zip(SMALL.batches, run_steps(SMALL, budget_s=0, least=2)):
        assert [r["candidate"] for r in rows] == ["frozen", "peft", "peft+fuse", "fused", "addmm"]
        for r in rows:
            assert r["rounds"] == 2 and 0 < r["step_p20_ms"] <= r["step_ms"] <= r["step_p80_ms"]
            assert abs(r["loss"] - rows[0]["loss"]) < 1e-3 and r["step_mib"] == 2.0
            assert (r["sequences"], r["tokens"], r["checkpointing"]) == (batch.sequences, batch.tokens, False)
        assert rows[1]["times_peft"] == 1.0 and rows[2]["memory_ratio"] > rows[0]["memory_ratio"] == 1.0
    report.print_steps("small", rows)
    printed = capsys.readouterr().out
    assert "a training step of 2 x 16 tokens" in printed and "fused" in printed
    assert all(len(line) <= 80 and line == line.rstrip() for line in printed.splitlines())


def test_a_step_with_dropout_in_half_precision(quick, capsys):
    """Base in bf16, adapters in fp32; the widest names and figures are printed whole."""
    workload = Workload("small", lambda: BASE().bfloat16(), (Batch(2, 8, checkpointing=True),), (0.0, 0.05))
    (rows,) = run_steps(workload, budget_s=0, least=1)
    assert [r["candidate"] for r in rows if "fault" not in r] == list(workload.candidates()), rows
    assert {r["dtype"] for r in rows} == {"bfloat16"} and len(rows) == 8
    wide = dict(step_ms=12345.6, step_low_ms=11234.4, step_high_ms=13456.7, step_mib=12345.6)
    report.print_steps("Llama-3.1-8B shape, 32 layers, bf16", [row | wide for row in rows])
    printed = capsys.readouterr().out
    assert "peft+fuse p=0.05" in printed and "11234-13457" in printed
    assert "…" not in printed and all(len(line) <= 80 for line in printed.splitlines()), printed


def test_a_bf16_step_where_the_cpu_has_the_arithmetic(monkeypatch):
    for avx512, dtypes in ((False, ["fp32"]), (True, ["fp32", "bf16"])):
        monkeypatch.setattr(steps, "cpu_features", lambda avx512=avx512: dict(avx512=avx512))
        assert [w.title.split()[-1] for w in steps.smollm2_steps("cpu")] == dtypes


def test_a_step_of_every_variant(quick, capsys):
    """Every way is right at its start, trains, and is compared with LoRA and with the PEFT that does the same."""
    variants = steps.variants_on("cpu")
    for workload, batch in zip(variants, (Batch(2, 8, weighed=False), Batch(8, 4))):
        small = Workload("small", BASE, (batch,), kinds=workload.kinds)
        (rows,) = run_steps(small, budget_s=0, least=1)
        assert [r["candidate"] for r in rows] == list(workload.kinds)
        for r in rows:
            assert "fault" not in r, r
            assert r["over_lora"] > 0 and abs(r["loss"] - rows[0]["loss"]) < 1e-3
            assert ("step_mib" in r) is ("memory_ratio" in r) is batch.weighed
        assert all("times_peft" in r for r in rows if r["candidate"] in ways.PEERS)
        report.print_steps("small", rows)
    printed = capsys.readouterr().out
    assert "x LoRA" in printed and all(len(line) <= 80 and line == line.rstrip() for line in printed.splitlines())
    assert {kind for workload in variants for kind in workload.kinds} | {"peft+fuse", "addmm"} == set(ways.WAYS)


def test_every_timed_step_is_one_after_an_optimizer_s(monkeypatch):
    """DoRA's norms are kept until parameters change, and a step of training changes them."""
    counts, real = [], cpu_norm.row_norm
    monkeypatch.setattr(cpu_norm, "row_norm", lambda *given: counts.append(None) or real(*given))
    model = model_for(Candidate("dora"), BASE())
    one = steps.timed(model, steps.step_of(model, SMALL.batches[0]))
    one()
    counts.clear()
    one(), one()
    layers = sum(isinstance(m, LoRALinear) for m in model.modules())
    assert len(counts) == 2 * layers > 0


def test_candidates_share_the_weights_of_the_base():
    base = BASE()
    kept = {id(p) for p in base.parameters()}
    for kind in ("frozen", "peft", "peft+fuse", "addmm", "fused"):
        model = model_for(Candidate(kind), base)
        assert kept <= {id(p) for p in model.parameters()}
        trained = [p for p in model.parameters() if p.requires_grad]
        assert len(trained) == (0 if kind == "frozen" else 2 * 7 * 2)  # A and B on seven linears of two layers
    assert not any(p.requires_grad for p in base.parameters())
    assert isinstance(base.model.layers[0].self_attn.q_proj, nn.Linear)
    with pytest.raises(
        ValueError, match="kind must be frozen, peft, peft.fuse, fused, addmm, .* or peft mixed.fuse; got .fast."
    ):
        model_for(Candidate("fast"), base)


def test_a_wrong_or_failing_candidate_is_dropped(monkeypatch, quick):
    real = steps.model_for

    def spoiled(candidate, base):
        model = real(candidate, base)
        if candidate.kind == "peft":
            raise ModuleNotFoundError("No module named 'peft'", name="peft")
        if candidate.kind == "addmm":
            nn.init.normal_(model.model.layers[0].mlp.up_proj.lora_B)
        if candidate.kind == "fused":
            model.model.layers[1].mlp.up_proj.lora_A["default"].register_hook(lambda grad: grad * float("nan"))
        return model

    monkeypatch.setattr(steps, "model_for", spoiled)
    for rows in run_steps(SMALL, budget_s=0, least=1):
        frozen, peft, _, fused, addmm = rows
        assert "fault" not in frozen and peft["fault"] == "failed" and "peft" in peft["why"]
        assert addmm["fault"] == "wrong" and addmm["why"].startswith("the loss must be ")
        assert fused["fault"] == "wrong" and "lora_A.default has no finite gradient" in fused["why"]


def test_a_failing_frozen_model_ends_the_run(monkeypatch, quick):
    monkeypatch.setattr(steps, "step_of", lambda *a: (_ for _ in ()).throw(RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        list(run_steps(SMALL, budget_s=0))


def test_model_memory_counts_a_tensor_once():
    model = nn.ModuleList([nn.Linear(256, 1024, bias=False), nn.Linear(256, 1024, bias=False)])
    model[1].weight = model[0].weight
    assert memory.model_mib(model) == 1.0
    model[1].weight = nn.Parameter(model[0].weight.detach()[:, :128])
    assert memory.model_mib(model) == 1.0


def test_resident_memory_is_the_peak_of_a_fresh_process():
    """64 MiB made and dropped three times need 64 MiB, whatever this process has had before."""
    torch.ones(256, 2**18)
    step = functools.partial(torch.ones, 64, 2**18)
    assert 60 < memory.in_fresh_process(memory.resident_mib, step) < 80


def test_a_workload_travels_to_the_process_that_measures():
    assert memory.in_fresh_process(steps.peak_on_cpu, BASE, Candidate("addmm"), Batch(1, 8), 1) >= 0
    with pytest.raises(OSError, match="process that measures peak memory failed: ValueError: kind must be"):
        memory.in_fresh_process(steps.peak_on_cpu, BASE, Candidate("fast"), Batch(1, 8), 1)


def test_a_layer_with_an_adapter_for_each_sample(capsys):
    cases = [mixed.MixedCase(count, 32, 16, 24, dtype) for count in (2, 8) for dtype in (torch.float32, torch.bfloat16)]
    for case, rows in zip(cases, mixed.run_mixed(cases, "cpu", budget_s=0, least=1)):
        assert [r["candidate"] for r in rows] == ["frozen", "one adapter", "fused", "peft", "padded", "bmm"]
        for r in rows:
            assert "fault" not in r, r
            assert r["adapters"] == case.adapters and r["ratio"] > 0 and r["over_one"] > 0
        report.print_mixed(rows)
    assert "a batch of 8 adapters" in capsys.readouterr().out


def test_a_wrong_mixture_is_dropped(monkeypatch):
    def swapped(p):
        forward, leaves = mixed.CANDIDATES["fused"](p)
        return lambda x: forward(x).flip(0), leaves

    monkeypatch.setitem(mixed.CANDIDATES, "bmm", swapped)
    (rows,) = mixed.run_mixed([mixed.MixedCase(2, 32, 16, 24)], "cpu", budget_s=0, least=1)
    assert rows[-1]["fault"] == "wrong" and "fault" not in rows[2]
