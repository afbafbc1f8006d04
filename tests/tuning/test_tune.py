"""A run of `tune`: broken candidates cost themselves alone, are named and never picked; what is done is kept."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import broken_backends  # noqa: F401  registers them
import pytest
import torch
from torch import nn

import fused_lora
from fused_lora import backends, tuning
from fused_lora.backends import Request, pick, tuned
from fused_lora.bench.cases import Case
from fused_lora.models import packaged_model
from fused_lora.ops.linear import forget_verdicts
from fused_lora.tuning import job, problems
from fused_lora.tuning.jail import Jail

CPU = torch.device("cpu")
SETUP = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import broken_backends
broken_backends.announce()
"""
CASE = Case(64, 40, 24, 4, 0.0, torch.float32)


@pytest.fixture
def one_case(monkeypatch):
    """Every model has one tiny shape."""
    monkeypatch.setattr(job, "cases_for", lambda *_: [CASE])


class Judge:
    """Stands for the processes: every candidate is right, and takes as long as `times` says."""

    def __init__(self, **times):
        self.times, self.asked = times, []

    def __call__(self, device, threads, setup):
        return self

    def ask(self, request, limit_s):
        self.asked.append((request["do"], request.get("candidate"), request["case"]["M"]))
        if request["do"] != "race":
            return {}
        us = {name: self.times.get(name.replace(":", "_"), 9.0) for name in ("frozen", *request["candidates"])}
        return dict(times={name: dict(us=t, ratio=t / us["frozen"]) for name, t in us.items()})

    def close(self):
        pass


@pytest.fixture
def judge(monkeypatch):
    judge = Judge(frozen=1.0, reference=1.5)
    monkeypatch.setattr(job, "Jail", judge)
    return judge


def picked(case=CASE):
    request = Request(CPU, case.dtype, torch.float32, backends.bucket(case.M), case.N, case.K, case.R, True, ())
    back_end, plan = pick("auto", request)
    return back_end.__name__.rpartition(".")[2] + (f":{plan}" if plan else "")


def test_broken_back_ends_are_caught_named_written_and_never_picked(cache, one_case, monkeypatch):
    """A wrong sum, a hang and a crash stand first in line."""
    line = ("wrong", "hangs", "crashes", "talks", "reference")
    monkeypatch.setattr(backends, "_LINES", {"cpu": line})
    forget_verdicts()
    assert picked() == "wrong"
    document = tuning.tune(time_limit_s=20.0, budget_s=0.2, setup=SETUP)  # on a busy machine, too
    (path,) = cache.iterdir()
    assert json.loads(path.read_text()) == document and path == tuned.path_of(CPU)
    (row,) = document["rows"]
    found = row["candidates"]
    assert set(found) == set(line) and row["frozen"]["us"] > 0
    assert (found["wrong"]["fault"], found["hangs"]["fault"], found["crashes"]["fault"]) == ("wrong", "hung", "crashed")
    assert "integers are off" in found["wrong"]["why"] and "no answer within 20 s" in found["hangs"]["why"]
    assert found["crashes"]["why"] == "signal 11 (Segmentation fault)"
    for name in ("talks", "reference"):  # right ones are timed, with intervals
        assert "fault" not in found[name], found[name]
        assert 0 < found[name]["low_us"] <= found[name]["us"] <= found[name]["high_us"] and found[name]["rounds"] >= 7
        assert found[name]["ratio_low"] <= found[name]["ratio"] <= found[name]["ratio_high"]
    assert picked() in ("talks", "reference")
    assert picked(Case(9999, 40, 24, 4, 0.0, torch.float32)) == "talks"  # not tuned, but those have failed elsewhere


def test_the_process_says_how_a_candidate_ended():
    """And the next question finds a new one."""
    jail = Jail("cpu", 1, SETUP)
    try:
        answers = {}
        for name in ("exits", "raises", "talks"):
            assert jail.ask(dict(do="prepare", case=CASE.facts()), 60.0) == {}
            answers[name] = jail.ask(dict(do="check", case=CASE.facts(), candidate=name), 60.0)
    finally:
        jail.close()
    assert answers["exits"] == dict(fault="crashed", why="exit code 3: the driver has said goodbye")
    assert answers["raises"] == dict(fault="failed", why="RuntimeError: no kernel image is available")
    assert answers["talks"] == {}


def test_a_process_that_does_not_start_is_no_candidate_s_fault():
    jail = Jail("cpu", 1, "raise SystemExit('no PyTorch here')")
    with pytest.raises(OSError, match="did not start: exit code 1: no PyTorch here"):
        jail.ask(dict(do="prepare", case=CASE.facts()), 60.0)


def test_who_fails_in_the_race_is_found_and_the_others_race_again(cache, one_case, judge, monkeypatch):
    real = judge.ask

    def ask(request, limit_s):
        if request["do"] == "race" and "cpu:around" in request["candidates"]:
            return dict(fault="crashed", why="signal 9 (Killed)")
        return real(request, limit_s)

    monkeypatch.setattr(judge, "ask", ask)
    (row,) = tuning.tune()["rows"]
    assert row["candidates"]["cpu:around"] == dict(fault="crashed", why="signal 9 (Killed)")
    assert all("us" in figures for name, figures in row["candidates"].items() if name != "cpu:around")
    assert picked() == "reference"


def test_plans_of_a_back_end_share_a_process_until_one_fails(cache, one_case, judge, monkeypatch):
    """What is right is computed once for all of them, and again for the process that follows a fault."""
    first, second, reference = job.candidates_for(CASE, CPU)
    asked = lambda: [candidate or do for do, candidate, _ in judge.asked]
    tuning.tune()
    assert asked() == ["prepare", first, second, "prepare", reference, "race"]
    real = judge.ask

    def ask(request, limit_s):
        answer = real(request, limit_s)
        return dict(fault="wrong", why="") if request.get("candidate") == first else answer

    monkeypatch.setattr(judge, "ask", ask)
    judge.asked.clear()
    tuning.tune(again=True)
    assert asked() == ["prepare", first, "prepare", second, "prepare", reference, "race"]


def test_a_candidate_that_keeps_failing_is_given_up(cache, judge, monkeypatch):
    cases = [Case(M, 40, 24, 4, 0.0, torch.float32) for M in (1, 2, 4, 8, 16)]
    monkeypatch.setattr(job, "cases_for", lambda *_: [*cases, Case(16, 40, 24, 4, 0.0, torch.bfloat16)])
    real, tried = judge.ask, []

    def ask(request, limit_s):
        if request.get("candidate") == "cpu:around":
            tried.append(request["case"]["dtype"])
            return dict(fault="hung", why="")
        return real(request, limit_s)

    monkeypatch.setattr(judge, "ask", ask)
    faults = [row["candidates"]["cpu:around"]["fault"] for row in tuning.tune()["rows"]]
    assert faults == ["hung"] * 3 + ["not tried"] * 2 + ["hung"]
    assert tried == ["float32"] * 3 + ["bfloat16"]


def test_what_pytorch_itself_cannot_compute_is_not_written(cache, one_case, judge, monkeypatch):
    seen = []
    monkeypatch.setattr(judge, "ask", lambda request, limit_s: dict(fault="does not fit", why=""))
    assert tuning.tune(progress=lambda *given: seen.append(given))["rows"] == []
    assert seen == [(1, 1, CASE, None)]


def test_a_stopped_run_goes_on_and_a_whole_one_measures_nothing(cache, judge, monkeypatch):
    cases = [Case(M, 40, 24, 4, 0.0, torch.float32) for M in (16, 64)]
    monkeypatch.setattr(job, "cases_for", lambda *_: cases)

    def stop(done, *_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tuning.tune(progress=stop)
    assert {M for *_, M in judge.asked} == {16} and picked(cases[0]) == "reference"
    judge.asked.clear()
    first = tuning.tune()
    assert {M for *_, M in judge.asked} == {64} and len(first["rows"]) == 2
    judge.asked.clear()
    assert tuning.tune() == first and judge.asked == []
    assert len(tuning.tune(again=True)["rows"]) == 2 and {M for *_, M in judge.asked} == {16, 64}


def test_another_environment_s_rows_are_dropped(cache, one_case, judge):
    tuning.tune()
    path = tuned.path_of(CPU)
    document = json.loads(path.read_text())
    document["environment"]["torch"] = "0.4"
    document["rows"][0]["M"] = 4096
    path.write_text(json.dumps(document))
    assert [row["M"] for row in tuning.tune()["rows"]] == [64]
    path.write_text("{")
    assert [row["M"] for row in tuning.tune()["rows"]] == [64]


def test_rows_count_for_their_bucket(cache, judge, monkeypatch):
    monkeypatch.setattr(job, "cases_for", lambda *_: [Case(50, 40, 24, 4, 0.0, torch.float32)])
    (row,) = tuning.tune()["rows"]
    assert (row["M"], row["rows"]) == (64, 50) and picked() == "reference"


def test_two_runs_do_not_write_one_file(cache, one_case, judge):
    def another(*_):
        with pytest.raises(OSError, match="another run is at work"):
            tuning.tune()

    tuning.tune(progress=another)


@pytest.mark.parametrize(
    "given, words",
    [
        (dict(device="tpu"), "device must be"),
        (dict(device="meta"), "device must be"),
        (dict(rows=[0]), r"rows must be 1 or more each; got \[0\]"),
        (dict(rows=64), "rows must be a list; got 64"),
        (dict(dtypes="bfloat16"), "dtypes must be a list; got 'bfloat16'"),
        (dict(ranks=[-1]), "ranks must be"),
        (dict(dropouts=[1.0]), "dropouts must be"),
        (dict(dropouts=[]), "dropouts must be"),
        (dict(dtypes=[torch.float64]), "dtypes must be"),
        (dict(time_limit_s=0), "time_limit_s must be"),
        (dict(budget_s=-1), "budget_s must be"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(cache, given, words):
    with pytest.raises(ValueError, match=words):
        tuning.tune(**dict(device="cpu") | given)
    assert not cache.exists()


def test_arguments_may_be_generators(cache, monkeypatch):
    given = {}

    def seen(*arguments):
        given.update(zip(("model", "device", "dtypes", "rows", "ranks", "dropouts"), arguments))
        return []

    monkeypatch.setattr(job, "cases_for", seen)
    of = dict(dtypes=(torch.float32,), rows=(64,), ranks=(4,), dropouts=(0.0,))
    tuning.tune(device="cpu", **{name: iter(values) for name, values in of.items()})
    assert {name: given[name] for name in of} == of


def test_the_shapes_of_a_model(tiny_model):
    model = nn.ModuleDict({"a": nn.Linear(8, 16), "b": nn.Linear(8, 16), "c": nn.Linear(16, 8)})
    assert problems.shapes_of(model) == [(8, 16, 16), (16, 8, 16)]
    assert problems.shapes_of(model, iter([3])) == [(8, 16, 3), (16, 8, 3)]
    fused_lora.apply_lora(model, r=4, lora_alpha=8, target_modules=["a"])
    assert problems.shapes_of(model) == [(8, 16, 4), (8, 16, 16), (16, 8, 16)]
    assert problems.shapes_of(model, [2]) == [(8, 16, 2), (16, 8, 2)]
    llama = problems.skeleton(tiny_model)
    assert {p.device.type for p in llama.parameters()} == {"meta"}
    assert set(problems.shapes_of(llama)) == {(32, 32, 16), (32, 16, 16), (32, 48, 16), (48, 32, 16)}  # not the head


def test_the_shapes_of_the_packaged_model():
    shapes = problems.shapes_of(problems.skeleton(packaged_model()))
    assert set(shapes) == {(576, 576, 16), (576, 192, 16), (576, 1536, 16), (1536, 576, 16)}


def test_the_usual_cases():
    """Without a model the benchmark's; neighbouring numbers of rows leave no gap in what a verdict holds for."""
    cases = problems.cases_for(None, "cpu")
    assert {(case.K, case.N) for case in cases} == {(1024, 1024), (1024, 4096), (4096, 1024), (4096, 4096)}
    assert {case.dropout for case in cases} == {0.0, 0.1} and len(set(cases)) == len(cases)
    assert [case.M * case.K * case.N for case in cases] == sorted(case.M * case.K * case.N for case in cases)
    for rows in problems.ROWS.values():
        assert all(larger <= 4 * smaller for smaller, larger in itertools.pairwise(rows))
    given = problems.cases_for(nn.Sequential(nn.Linear(8, 8)), "cpu", (torch.float16,), (3,), (2,), (0.5,))
    assert given == [Case(3, 8, 8, 2, 0.5, torch.float16)]


def test_it_is_at_hand_and_costs_nothing_until_asked():
    code = "import fused_lora, sys; print('fused_lora.tuning' in sys.modules, callable(fused_lora.tune))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False True\n", done.stderr
    assert fused_lora.tune is tuning.tune
    with pytest.raises(AttributeError, match="no attribute 'tun'"):
        getattr(fused_lora, "tun")  # noqa: B009
