"""The bench checks before it times, drops what is wrong or fails, and interleaves fairly."""

import hashlib
import itertools
import os
import threading
import time
import weakref
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from fused_lora.bench import candidates, results, runner, timing
from fused_lora.bench.cases import Case, preset
from fused_lora.testing import random_problem, truth

CASE = Case(24, 32, 40, 4, 0.0, torch.float32)


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
def test_a_wrong_candidate_is_dropped_and_the_others_go_on(monkeypatch, tensor):
    made, timed, real = [], [], runner.outcome

    def wrong(candidate, p):
        got = real(candidate, p)
        if any(candidate is m for m in made):
            got[tensor].view(-1)[3] += 0.01 * got[tensor].abs().max()
        return got

    monkeypatch.setitem(candidates.CANDIDATES, "naive", lambda *a: made.append(candidates.naive(*a)) or made[-1])
    monkeypatch.setattr(runner, "outcome", wrong)
    monkeypatch.setattr(
        runner,
        "interleave",
        lambda passes, **k: timed.extend(passes) or {n: timing.Series([(1, 2)], [True]) for n in passes},
    )
    frozen, naive, fused = runner.run_case(CASE, "cpu", ["frozen", "naive", "fused"], 0.1)
    assert timed == ["frozen", "fused"]
    assert naive["fault"] == "wrong" and naive["why"].startswith(f"{tensor} is off by ")
    assert "both_us" not in naive and results.key(naive) == results.key(fused) == results.key(frozen)
    assert fused["both_ratio"] == 1.0 and "fault" not in fused


@pytest.mark.parametrize("when", ["made", "called"])
def test_a_failing_candidate_is_dropped_and_the_others_go_on(monkeypatch, when):
    def fails(*_):
        raise RuntimeError("no compiler\n  here")

    broken = fails if when == "made" else lambda p, dropout: candidates.Made(fails, p.lora_A, p.lora_B)
    monkeypatch.setitem(candidates.CANDIDATES, "compile", broken)
    for rows in (
        runner.run_case(CASE, "cpu", ["frozen", "compile", "fused"], 0.01),
        runner.host_cost("cpu", 0.01, ["frozen", "compile", "fused"]),
    ):
        by = {r["candidate"]: r for r in rows}
        assert (by["compile"]["fault"], by["compile"]["why"]) == ("failed", "RuntimeError: no compiler here")
        assert "fault" not in by["fused"] and len(rows) == 3


def test_what_does_not_fit_is_no_fault(monkeypatch):
    def hungry(*_):
        raise torch.OutOfMemoryError("tried to allocate 1 TiB")

    monkeypatch.setitem(candidates.CANDIDATES, "naive", hungry)
    rows = runner.run_case(CASE, "cpu", ["frozen", "naive"], 0.01)
    assert rows[1]["fault"] == "does not fit"
    assert results.faults(dict(rows=rows, host=[], train_step=[])) == []


def test_a_wrong_frozen_layer_ends_the_run(monkeypatch):
    monkeypatch.setitem(candidates.CANDIDATES, "frozen", candidates.naive)
    with pytest.raises(runner.WrongResult, match="naive|frozen: y is off"):
        runner.run_case(CASE, "cpu", ["frozen", "fused"], 0.1)


def test_nan_is_a_wrong_result():
    p = random_problem(24, 40, 32, 4)
    got = runner.outcome(candidates.fused(p, 0.0), p)
    got["dA"][0, 0] = float("nan")
    with pytest.raises(runner.WrongResult, match="dA"):
        runner.check("fused", got, truth(p), torch.float32)


@pytest.mark.parametrize("name", ["fused", "triton", "cpu:around"])
def test_dropout_is_checked_under_its_own_mask(monkeypatch, name):
    """Also where a back end is named, as on a GPU."""
    monkeypatch.setattr(
        runner, "candidates_on", lambda device: candidates.CANDIDATES | {"triton": candidates.back_end("cpu")}
    )
    case, real = Case(24, 32, 40, 4, 0.5, torch.float32), runner.truth
    assert ["fault" in r for r in runner.run_case(case, "cpu", ["frozen", name], 0.01)] == [False, False]
    monkeypatch.setattr(
        runner,
        "truth",
        lambda p, dropout_p=0.0, seed=None: real(p, dropout_p=dropout_p, seed=None if seed is None else seed + 1),
    )
    _, row = runner.run_case(case, "cpu", ["frozen", name], 0.01)
    assert row["fault"] == "wrong" and "is off by" in row["why"]


def test_a_plan_by_name():
    """In the sort of row that a back end has; one that it does not have is dropped, with what it says."""
    case = Case(24, 32, 40, 4, 0.0, torch.float32)
    *_, plan, unknown = runner.run_case(case, "cpu", ["frozen", "cpu:around", "cpu:beside"], 0.01)
    assert plan["both_us"] > 0 and plan["adapter_dtype"] == "float32"
    assert unknown["fault"] == "failed" and "'beside'" in unknown["why"]


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
    assert {len(t.rounds) for t in times.values()} == {len(rounds)} and len(rounds) >= 2
    assert len(timing.interleave(passes, budget_s=1e9, most=7)["a"].rounds) == 7
    assert len(timing.interleave(passes, budget_s=0, least=3)["a"].rounds) == 3


def test_rounds_in_which_a_thread_waited_for_a_cpu_do_not_count():
    """Every third pass of one candidate is disturbed; its pairs with the other are those of the other rounds."""
    now = dict(waited=0, calls=0)

    def disturbed():
        now["calls"] += 1
        now["waited"] += 10**9 if now["calls"] % 3 == 0 else 1000
        return (9.0,) if now["calls"] % 3 == 0 else (2.0,)

    passes = dict(base=lambda: (1.0,), other=disturbed)
    times = timing.interleave(passes, budget_s=1e9, least=6, most=12, waited=lambda: now["waited"])
    assert times["base"].counts == [True] * 12 and times["other"].clean == 8
    assert set(times["other"].seconds()) == {2.0}
    assert timing.ratio(times["other"], times["base"]) == (2.0, 2.0, 2.0)


def test_where_every_round_is_disturbed_all_count_and_the_run_ends():
    clock, waits = itertools.count(), itertools.count(step=10**9)
    given = dict(budget_s=4, least=3, clock=lambda: next(clock), waited=lambda: next(waits))
    times = timing.interleave(dict(a=lambda: (1.0,)), **given)["a"]
    assert times.seconds() == [1.0] * len(times.rounds) and 4 < len(times.rounds) <= 13  # three budgets


def test_a_run_ends_once_it_knows_enough():
    asked = []
    times = timing.interleave(
        dict(a=lambda: (1.0,)),
        budget_s=1e9,
        least=3,
        waited=lambda: 0,
        enough=lambda t: asked.append(t) or len(asked) == 2,
    )
    assert len(times["a"].rounds) == 8 and len(asked) == 2


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="needs a kernel that counts waiting")
def test_the_system_tells_who_waited():
    """More threads than CPUs, all busy: some wait. The sum over threads, which come and go, never falls."""
    before = timing.waited_ns()
    assert before >= 0
    busy = lambda: [hashlib.sha256(bytes(2**22)) for _ in range(5)]  # without the interpreter's lock
    threads = [threading.Thread(target=busy) for _ in range(8 * os.cpu_count())]
    for thread in threads:
        thread.start()
    most = before
    while any(thread.is_alive() for thread in threads):
        most = max(most, timing.waited_ns())
        time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert most > before and timing.waited_ns() >= most


def test_spread():
    s = timing.Spread.of([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (s.median, s.low, s.high, s.p20, s.p80, s.count) == (3.0, 1.0, 5.0, 2.0, 5.0, 5)
    facts = s.facts("both", "us", 1e6)
    assert facts == dict(both_us=3e6, both_low_us=1e6, both_high_us=5e6, both_p20_us=2e6, both_p80_us=5e6)


@pytest.mark.parametrize(
    "count, skipped", [(1, 0), (5, 0), (6, 0), (8, 0), (9, 1), (20, 5), (100, 39), (101, 39), (1000, 468)]
)
def test_the_interval_of_a_median(count, skipped):
    """The ranks of the textbook's table: of 20 values the 6th and the 15th."""
    s = timing.Spread.of([float(i) for i in range(count)])
    assert (s.low, s.high) == (skipped, count - 1 - skipped)


def test_the_interval_of_a_ratio_comes_from_pairs():
    """It holds its 95 %; and slow rounds, which slow both, don't widen it as they widen each median's interval."""
    g, hits, together, alone = torch.Generator().manual_seed(0), 0, 0.0, 0.0
    for _ in range(100):
        load = 1 + torch.rand(40, generator=g)
        times = [scale * load * (1 + 0.01 * torch.rand(40, generator=g)) for scale in (1.1, 1.0)]
        other, base = (timing.Series([(seconds,) for seconds in t.tolist()], [True] * 40) for t in times)
        value, low, high = timing.ratio(other, base)
        spread = timing.Spread.of(other.seconds())
        hits += low <= 1.1 <= high
        together, alone = together + (high - low) / value, alone + (spread.high - spread.low) / spread.median
    assert hits >= 85 and together < alone / 4


def test_a_ratio_of_rounds_that_never_count_together_is_not_taken_for_certain():
    """Each candidate was undisturbed in other rounds than the other one: no pair tells how they compare."""
    seconds = [(2.0,), (3.0,)] * 5
    other, base = (timing.Series(list(seconds), [place % 2 == start for place in range(10)]) for start in (0, 1))
    other.rounds[0], base.rounds[1] = (2.4,), (2.5,)
    assert timing.ratio(other, base) == (2.0 / 3.0, 2.0 / 3.0, 2.4 / 2.5)
    assert timing.ratio(base, base) == (1.0, 1.0, 1.0)


def test_distance_to_the_floor():
    assert CASE.floor == 1 + 1.5 * 4 * (1 / 32 + 1 / 40)
    frozen, fused = runner.run_case(CASE, "cpu", ["frozen", "fused"], 0.01)
    assert fused["floor"] == CASE.floor and frozen["floor"] == 1.0
    assert fused["both_ratio_low"] <= fused["both_ratio"] <= fused["both_ratio_high"]
    assert fused["both_low_us"] <= fused["both_us"] <= fused["both_high_us"]


def test_copies_exceed_the_cache(monkeypatch):
    x = torch.zeros(1024, 16)
    assert len(timing.copies(x, cold=False)) == 2
    for times, count in ((4, 4), (1, 2), (10**6, 16)):
        monkeypatch.setitem(timing._PAST_CACHES, "cpu", times * x.numel() * 4)
        made = timing.copies(x)
        assert len({t.data_ptr() for t in made}) == len(made) == count


def test_presets_cover_what_they_promise():
    for device in ("cpu", "cuda"):
        cases = preset("readme", device)
        assert len(set(cases)) == len(cases) and {c.dropout for c in cases} == {0.0, 0.1}
    assert {c.dtype for c in preset("readme", "cpu")} == {torch.float32, torch.bfloat16}


def test_a_replay_keeps_what_its_graph_reads(monkeypatch):
    """A graph knows addresses: tensors that nobody holds any more are gone by the time that it is replayed."""

    class Graph:
        def replay(self):
            pass

    class Stream:
        def wait_stream(self, other):
            pass

    for name, stand_in in (("Stream", Stream), ("current_stream", Stream), ("CUDAGraph", Graph)):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *given: nullcontext())

    def made():
        weight = torch.ones(3)
        return timing.captured(lambda: weight.sum()), weakref.ref(weight)

    replay, weight = made()
    replay()
    assert weight() is not None
    del replay
    assert weight() is None
