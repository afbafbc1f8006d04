"""The bench refuses wrong results, interleaves fairly, writes whole files, and README's table comes from the JSON
alone."""

import importlib.util
import itertools
import json
from argparse import ArgumentTypeError
from pathlib import Path

import pytest
import torch

from fused_lora import bench
from fused_lora.bench import candidates, report, runner, timing
from fused_lora.bench.cases import Case, preset
from fused_lora.testing import random_problem, truth

CASE = Case(24, 32, 40, 4, 0.0, torch.float32)


@pytest.fixture
def tiny(monkeypatch):
    """Every preset is one tiny case."""
    monkeypatch.setattr(bench, "cases_of", lambda name, device: [CASE, Case(24, 32, 40, 4, 0.25, torch.float32)])


@pytest.mark.parametrize("name", candidates.CANDIDATES)
def test_every_candidate_computes_the_layer(name):
    p = random_problem(24, 40, 32, 4)
    made = candidates.CANDIDATES[name](p, 0.0)
    got = runner.outcome(made, p)
    if name == "frozen":
        p.lora_B.zero_()
    assert runner.check(name, got, truth(p), torch.float32) > 0
    assert set(got) == ({"y", "dx"} if name == "frozen" else {"y", "dx", "dA", "dB"})


@pytest.mark.parametrize("tensor", ["y", "dx", "dA", "dB"])
def test_a_wrong_result_is_not_timed(monkeypatch, tensor):
    real = runner.outcome

    def wrong(made, p):
        got = real(made, p)
        if made.leaves:
            got[tensor].view(-1)[3] += 0.01 * got[tensor].abs().max()
        return got

    monkeypatch.setattr(runner, "outcome", wrong)
    monkeypatch.setattr(runner, "interleave", lambda *a, **k: pytest.fail("timed a wrong result"))
    with pytest.raises(runner.WrongResult, match=f"fused: {tensor} is off"):
        runner.run_case(CASE, "cpu", ["frozen", "fused"], 0.1)


def test_nan_is_a_wrong_result():
    p = random_problem(24, 40, 32, 4)
    got = runner.outcome(candidates.fused(p, 0.0), p)
    got["dA"][0, 0] = float("nan")
    with pytest.raises(runner.WrongResult, match="dA"):
        runner.check("fused", got, truth(p), torch.float32)


def test_dropout_is_checked_under_its_own_mask(monkeypatch):
    case = Case(24, 32, 40, 4, 0.5, torch.float32)
    assert len(runner.run_case(case, "cpu", ["frozen", "fused"], 0.01)) == 2
    real = runner.truth
    monkeypatch.setattr(
        runner,
        "truth",
        lambda p, dropout_p=0.0, seed=None: real(p, dropout_p=dropout_p, seed=None if seed is None else seed + 1),
    )
    with pytest.raises(runner.WrongResult, match="fused"):
        runner.run_case(case, "cpu", ["frozen", "fused"], 0.01)


def test_memory_held_for_the_backward():
    """Ours holds h alone, M x R elements; PEFT holds h and, with dropout, mask and dropped x."""
    p = random_problem(24, 40, 32, 4)
    assert runner.held_bytes(candidates.frozen(p, 0.0), p) == 0
    for dropout in (0.0, 0.5):
        held = runner.held_bytes(candidates.fused(p, dropout), p)
        assert 24 * 4 * 4 <= held <= 24 * 4 * 4 + 8  # and the seed
        assert runner.held_bytes(candidates.peft(p, 0.5), p) >= 2 * 24 * 32 * 4


def test_interleaving_runs_everyone_every_round_in_changing_order():
    order, now = [], itertools.count()
    passes = {name: (lambda name=name: order.append(name) or (1.0,)) for name in "abc"}
    times = timing.interleave(passes, budget_s=4, least=2, clock=lambda: next(now))
    rounds = ["".join(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len(set(rounds)) > 1
    assert {len(t) for t in times.values()} == {len(rounds)} and len(rounds) >= 2
    assert len(timing.interleave(passes, budget_s=1e9, most=7)["a"]) == 7
    assert len(timing.interleave(passes, budget_s=0, least=3)["a"]) == 3


def test_spread():
    s = timing.Spread.of([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (s.median, s.p20, s.p80, s.count) == (3.0, 2.0, 5.0, 5)


def test_copies_exceed_the_cache():
    x = torch.zeros(1024, 16)
    made = timing.copies(x, 4 * x.numel() * 4)
    assert len(made) == 4 and len({t.data_ptr() for t in made}) == 4
    assert len(timing.copies(x, 0)) == 2 and len(timing.copies(x, 1 << 40)) == 16


def test_run_writes_json_and_plot(tiny, tmp_path, capsys):
    rows = bench.run(
        output=tmp_path / "new" / "b.json", plot=tmp_path / "b.png", candidates=["naive", "peft", "fused"], budget_s=0.1
    )
    document = json.loads((tmp_path / "new" / "b.json").read_text())
    assert document["rows"] == rows and document["environment"]["torch"] == torch.__version__
    assert {r["candidate"] for r in rows} == {"frozen", "naive", "peft", "fused"}
    for r in rows:
        assert r["both_p20_us"] <= r["both_us"] <= r["both_p80_us"] and r["both_us"] > 0
        assert r["both_ratio"] == 1.0 or r["candidate"] != "frozen"
    assert {r["candidate"] for r in document["host"]} == {"frozen", "naive", "peft", "fused"}
    assert (tmp_path / "b.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    printed = capsys.readouterr().out
    assert "x frozen" in printed and "fused / PEFT" in printed
    assert sorted(f.name for f in tmp_path.iterdir()) == ["b.png", "new"]


def test_an_interrupted_run_goes_on(tiny, tmp_path, monkeypatch):
    """What was timed before a stop is in the file and is not timed again."""
    path, real, cases = tmp_path / "b.json", runner.run_case, bench.cases_of("quick", "cpu")

    def stopped(case, *rest, **more):
        if case == cases[1]:
            raise KeyboardInterrupt
        return real(case, *rest, **more)

    monkeypatch.setattr(runner, "run_case", stopped)
    with pytest.raises(KeyboardInterrupt):
        bench.run(output=path, candidates=["fused"], budget_s=0.1)
    first = json.loads(path.read_text())["rows"]
    assert len(first) == 2 and {report.key(r) for r in first} == {
        report.key(vars(cases[0]) | {"dtype": str(cases[0].dtype)[6:]})
    }
    monkeypatch.setattr(
        runner,
        "run_case",
        lambda case, *rest, **more: pytest.fail("timed again") if case == cases[0] else real(case, *rest, **more),
    )
    rows = bench.run(output=path, candidates=["fused"], budget_s=0.1, resume=True)
    assert rows[:2] == first and len(rows) == 2 * len(cases) and json.loads(path.read_text())["rows"] == rows
    with pytest.raises(ValueError, match="cannot be resumed: candidates must be .*'naive'.*; got"):
        bench.run(output=path, candidates=["naive"], budget_s=0.1, resume=True)
    with pytest.raises(ValueError, match="resume needs output"):
        bench.run(candidates=["fused"], resume=True)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "b.json"
    path.write_text("old")
    monkeypatch.setattr(report.json, "dumps", lambda *a, **k: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space"):
        report.write_json({"preset": "quick", "environment": {"kind": "cpu"}}, path)
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_readme_table_comes_from_the_json(tiny, tmp_path):
    bench.run(preset="readme", output=tmp_path, candidates=["peft", "fused"], budget_s=0.1, train_step=False)
    (document,) = tmp_path.glob("readme-cpu.json")
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.update_readme(readme, tmp_path)
    once = readme.read_text()
    report.update_readme(readme, tmp_path)
    assert readme.read_text() == once, "writing it again changes nothing"
    assert once.startswith("before\n") and once.endswith("\nafter\n") and "old" not in once
    row = next(r for r in json.loads(document.read_text())["rows"] if r["candidate"] == "fused")
    assert f"**{row['both_ratio']:.2f}**" in once and f"| {row['M']} | {row['K']}→{row['N']} |" in once


def test_readme_without_its_block_or_results_is_refused(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("no block")
    with pytest.raises(ValueError, match="must hold one"):
        report.update_readme(readme, tmp_path)
    readme.write_text(f"{report.BEGIN}\n{report.END}\n")
    with pytest.raises(ValueError, match=r"must hold readme-\*\.json"):
        report.update_readme(readme, tmp_path)
    assert readme.read_text() == f"{report.BEGIN}\n{report.END}\n"


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(device="tpu"), "device must be cpu or cuda; got 'tpu'"),
        (dict(preset="slow"), "preset must be one of quick, readme, full; got 'slow'"),
        (dict(candidates=["fast"]), "candidates must be among .*; got fast"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        bench.run(**change)


def test_presets_cover_what_they_promise():
    for device in ("cpu", "cuda"):
        cases = preset("readme", device)
        assert len(set(cases)) == len(cases) and {c.dropout for c in cases} == {0.0, 0.1}
    assert {c.dtype for c in preset("readme", "cpu")} == {torch.float32, torch.bfloat16}


def test_a_profile_counts_overlapping_kernels_once():
    """A kernel that starts early and waits for the one before it counts from that one's end; only idle time is a
    gap."""
    path = Path(__file__).resolve().parents[2] / "bench" / "profile_kernels.py"
    spec = importlib.util.spec_from_file_location("profile_kernels", path)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    rows = module.summary([("b", 5.0, 20.0), ("a", 0.0, 10.0), ("a", 25.0, 31.0), ("b", 31.0, 41.0)], passes=2)
    assert rows == [
        dict(kernel="a", calls=1.0, us=8.0),
        dict(kernel="b", calls=1.0, us=10.0),
        dict(kernel="gaps", calls=0.0, us=2.5),
    ]
    assert module.parse("16,4096,1024,8,0.1") == Case(16, 4096, 1024, 8, 0.1, torch.bfloat16)
    with pytest.raises(ArgumentTypeError, match="M,K,N,R,p; got '16,4096'"):
        module.parse("16,4096")
