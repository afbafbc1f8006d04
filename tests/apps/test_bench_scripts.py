"""The programs of bench/: README comes from the JSON alone, the profile adds up, the Llama step runs on few layers."""

import importlib.util
import json
import re
from argparse import ArgumentTypeError, Namespace
from pathlib import Path

import pytest
import torch

from fused_lora import bench
from fused_lora.bench import memory, steps, suite
from fused_lora.bench.cases import Case

ROOT = Path(__file__).resolve().parents[2]
CASE = Case(24, 32, 40, 4, 0.0, torch.float32)
PNG = b"\x89PNG\r\n\x1a\n"


def script(name):
    """A program of bench/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "bench" / f"{name}.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


@pytest.fixture
def tiny(monkeypatch):
    """Every preset is two tiny cases."""
    monkeypatch.setattr(suite, "cases_of", lambda name, device: [CASE, Case(24, 32, 40, 4, 0.25, torch.float32)])


def test_readme_has_the_variants_of_their_file(tmp_path):
    env = dict(device="A CPU", kind="cpu", threads=2, features={}, torch="2", commit="abc", date="today")
    plain = dict(sequences=1, tokens=64, step_ms=200.0, ratio=1.2)
    step = plain | dict(step_mib=100.0)
    rows = [
        plain | dict(candidate="fused", over_lora=1.0),
        step | dict(candidate="dora", over_lora=1.25, times_peft=2.5),
    ]
    rows.append(dict(sequences=1, tokens=64, candidate="flow", fault="wrong", why="it is"))
    layer = dict(dtype="float32", M=2048, K=8, N=8, adapters=32)
    mixed = [layer | dict(candidate=n, both_ms=3.0, over_one=o) for n, o in (("one adapter", 1.0), ("fused", 1.07))]
    document = dict(environment=env, train_step=rows, mixed=mixed)
    text = script("readme").variants(document)
    assert "**A CPU**, 2 threads; torch 2; commit abc; today. LoRA's variants" in text
    assert "| 1 × 64 | fused | 200 | 1.20 | 1.00 | – | – |" in text
    assert "| 1 × 64 | dora | 200 | 1.20 | 1.25 | 2.50 | 100 |" in text and "| 1 × 64 | flow | wrong | – " in text
    assert "| float32 | 32 | 3.0 | **1.07** |" in text


def test_readme_has_a_line_a_batch_of_prompts():
    env = dict(device="A CPU", kind="cpu", threads=2, features={}, torch="2", commit="abc", date="today")
    prompts = dict(sequences=8, tokens=128, generated=0)
    rows = [
        prompts | dict(candidate="frozen", forward_ms=150.21, ratio=1.0),
        prompts | dict(candidate="fused", forward_ms=90.0, ratio=0.6),
        prompts | dict(candidate="peft", fault="failed", why="it did"),
    ]
    rows += [row | dict(generated=16) for row in rows]
    text = script("readme").latency(dict(environment=env, latency=rows))
    assert "**A CPU**, 2 threads; torch 2; commit abc; today. A forward" in text
    assert "| frozen, ms | fused | peft |" in text and "| 8 × 128 | 150.2 | **0.60** | failed |" in text
    assert "| 8 × 128, a token after it | 150.2 | **0.60** | failed |" in text


def test_readme_has_the_steps_of_a_large_model(tmp_path):
    env = dict(device="A GPU", kind="cuda", features={}, torch="2", commit="abc", date="today")
    step = dict(sequences=4, tokens=2048, step_ms=880.4, ratio=1.111, times_peft=1.556, memory_ratio=1.004)
    rows = [step | dict(candidate="fused", checkpointing=True)]
    rows.append(dict(sequences=1, tokens=512, checkpointing=False, candidate="peft", fault="does not fit", why="it is"))
    text = script("readme").llama(dict(environment=env, layers=32, rank=16, rows=rows))
    assert "**A GPU**; torch 2; commit abc; today. One training step" in text and "32 layers" in text
    assert "| 4 × 2048, checkpointing | fused | 880 | 1.11 | 1.56 | 1.00 |" in text
    assert "| 1 × 512 | peft | does not fit | – | – | – |" in text


def test_readme_tables_come_from_the_json(tiny, tmp_path):
    """A line of the summary and a section a file, each with its own figures and plot; the rest of README stays."""
    readme_script, readme = script("readme"), tmp_path / "README.md"
    folder = tmp_path / "results"
    document = bench.run(preset="readme", output=folder, candidates=["peft", "fused"], budget_s=0.1, train_step=False)
    (file,) = folder.glob("readme-cpu-*.json")
    other = document | dict(environment=document["environment"] | dict(device="Another CPU"), host=[])
    other["rows"] = [row | dict(R=16, both_ratio=1.0 + n / 8) for n, row in enumerate(document["rows"])]
    other["rows"] += [row | dict(M=48, both_ratio=2.5) for row in other["rows"][:3]]
    small = dict(dtype="bfloat16", sequences=4, tokens=256, step_ms=8.0, times_peft=2.38)
    other["train_step"] = [
        small | dict(candidate=n, ratio=r) for n, r in (("addmm", 1.1), ("fused", 1.03), ("fused p=0.05", 1.06))
    ]
    (folder / "readme-cpu-zzz.json").write_text(json.dumps(other))
    (folder / "quick-cpu.json").write_text("{}")
    step = dict(
        sequences=4, tokens=2048, checkpointing=True, ratio=1.111, step_ms=8.0, times_peft=1.5, memory_ratio=1.0
    )
    steps_of = [step | dict(candidate=n) for n in ("peft+fuse", "fused")]
    large = dict(environment=other["environment"], layers=32, rank=16, rows=steps_of)
    (folder / "llama-x.json").write_text(json.dumps(large))
    (folder / "readme-cpu-zzz.png").write_bytes(PNG)
    readme.write_text(f"before\n{readme_script.BEGIN}\nstale\n{readme_script.END}\nafter\n")
    readme_script.update(readme, folder)
    once = readme.read_text()
    readme_script.update(readme, folder)
    assert readme.read_text() == once, "writing it again changes nothing"
    assert once.startswith("before\n") and once.endswith("\nafter\n") and "stale" not in once
    row = next(r for r in json.loads(file.read_text())["rows"] if r["candidate"] == "fused")
    assert f"**{row['both_ratio']:.2f}**" in once and f"| {row['M']} | {row['K']}→{row['N']} |" in once
    assert (
        once.index(document["environment"]["device"]) < once.index("**Another CPU**") < once.index("readme-cpu-zzz.png")
    )
    assert "| Another CPU | float32 | 1.12 to 2.50 | **1.25 to 2.50** |" in once and once.count("<details>") == 3
    assert (
        "| Another CPU | Llama-3.1-8B's shape, bf16: 4 × 2048, checkpointing | – | 1.11 | **1.11** | – | – | – |"
        in once
    )
    assert "| Another CPU | SmolLM2-135M, bf16: 4 × 256 | – | – | **1.03** | – | – | **1.06** |" in once
    assert "| bfloat16 | 4 × 256 | fused p=0.05 | 8 | 1.06 | 2.38 | – |" in once
    assert once.count("](results/readme-cpu-") == 1 and once.count("Host cost") == 1
    assert once.count("; 95 % intervals ±0.") == 2 and f"| {CASE.floor:.2f} | " in once
    used = "AMX used" if document["environment"]["features"]["amx"] else "AMX not used"
    assert f"; {used}; torch" in once


def test_a_file_from_before_intervals_and_features_is_still_read(tiny):
    document = bench.run(preset="readme", candidates=["fused"], budget_s=0.05, train_step=False)
    new = script("readme").section(document)
    document["rows"] = [
        {key: value for key, value in row.items() if not re.search("_low|_high|disturbed|floor", key)}
        for row in document["rows"]
    ]
    del document["environment"]["features"]
    old = script("readme").section(document)
    assert "interval" in new and "interval" not in old and "AMX" not in script("readme").origin(document)
    assert old.splitlines()[1:] == new.splitlines()[1:]


def test_the_published_readme_is_what_the_script_writes(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text((ROOT / "README.md").read_text())
    (tmp_path / "bench").symlink_to(ROOT / "bench")
    script("readme").update(readme, tmp_path / "bench" / "results")
    assert re.sub(r"\]\(.*bench/results/", "](bench/results/", readme.read_text()) == (ROOT / "README.md").read_text()


def test_readme_says_wrong_and_failed(tiny, tmp_path):
    document = bench.run(preset="readme", candidates=["fused"], budget_s=0.05, train_step=False)
    for name, fault in (("naive", "wrong"), ("peft", "failed")):
        document["rows"] += [CASE.facts() | dict(candidate=name, fault=fault, why="of a test")]
        document["host"] += [dict(candidate=name, fault=fault, why="of a test")]
    figures = dict(step_ms=2.0, ratio=1.0, step_mib=3.0, tokens=8)
    document["train_step"] = [
        figures | dict(candidate="frozen"),
        dict(candidate="peft", tokens=8, fault="failed", why="of a test"),
    ]
    text = script("readme").section(document)
    assert "** | wrong | failed |" in text and "naive wrong, peft failed." in text
    assert "| float32 | 1 × 8 | frozen | 2 | 1.00 | – | 3 |\n| float32 | 1 × 8 | peft | failed | – | – | – |" in text


def test_readme_without_its_block_or_results_is_refused(tmp_path):
    readme_script, readme = script("readme"), tmp_path / "README.md"
    readme.write_text("no block")
    with pytest.raises(ValueError, match="must hold one"):
        readme_script.update(readme, tmp_path)
    readme.write_text(f"{readme_script.BEGIN}\n{readme_script.END}\n")
    with pytest.raises(ValueError, match=r"must hold readme-\*\.json"):
        readme_script.update(readme, tmp_path)
    assert readme.read_text() == f"{readme_script.BEGIN}\n{readme_script.END}\n"


def test_a_profile_counts_overlapping_kernels_once():
    """A kernel that starts early and waits for the one before it counts from that one's end; only idle time is a
    gap."""
    module = script("profile_kernels")
    rows = module.summary([("b", 5.0, 20.0), ("a", 0.0, 10.0), ("a", 25.0, 31.0), ("b", 31.0, 41.0)], passes=2)
    assert rows == [
        dict(kernel="a", calls=1.0, us=8.0),
        dict(kernel="b", calls=1.0, us=10.0),
        dict(kernel="gaps", calls=0.0, us=2.5),
    ]
    assert module.parse("16,4096,1024,8,0.1") == Case(16, 4096, 1024, 8, 0.1, torch.bfloat16)
    with pytest.raises(ArgumentTypeError, match="M,K,N,R,p; got '16,4096'"):
        module.parse("16,4096")


def test_a_llama_step_on_a_small_model(monkeypatch):
    """Every candidate of bench_llama.py, with dropout and checkpointing, over one set of bf16 weights."""
    module = script("bench_llama")
    shape = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=2, num_key_value_heads=1)
    model = module.base_model(2, "cpu", **shape)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and torch.get_default_dtype() == torch.float32
    monkeypatch.setattr(memory, "in_fresh_process", lambda *arguments: 1.0)
    batches = (steps.Batch(1, 8), steps.Batch(2, 8, checkpointing=True))
    workload = steps.Workload("small", lambda: model, batches, (0.0, module.DROPOUT))
    plain, checkpointed = steps.run_steps(workload, budget_s=0, least=1)
    names = ["frozen", "peft", "peft+fuse", "fused", "peft p=0.05", "peft+fuse p=0.05", "fused p=0.05", "addmm"]
    for rows in (plain, checkpointed):
        assert [r["candidate"] for r in rows] == names and not any("fault" in r for r in rows), rows
        by = {r["candidate"]: r for r in rows}
        assert by["fused p=0.05"]["times_peft"] == by["peft p=0.05"]["step_ms"] / by["fused p=0.05"]["step_ms"]
        assert by["frozen"]["ratio"] == by["frozen"]["memory_ratio"] == 1.0 < by["fused"]["memory_ratio"]
    assert checkpointed[0]["checkpointing"] and not plain[0]["checkpointing"]
    assert module.BATCHES[-1] == steps.Batch(4, 2048, checkpointing=True)


def test_a_mixture_s_experts_on_a_small_layer():
    """Every candidate of bench_experts.py computes PEFT's numbers in both dtypes."""
    module = script("bench_experts")
    given = Namespace(output=None, hidden=16, intermediate=24, experts=6, tokens=9, budget=0.0)
    for dtype in (torch.float32, torch.bfloat16):
        rows = module.rows_of(given, dtype)
        assert [r["candidate"] for r in rows] == ["frozen", "peft", "peft+fuse", "copied", "fused"]
        assert not any("fault" in r for r in rows), rows
        assert rows[0]["ratio"] == rows[1]["times_peft"] == 1.0 and rows[4]["experts"] == 6
