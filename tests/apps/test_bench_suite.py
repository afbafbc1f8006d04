"""A run of the bench from arguments to files: what can be refused is refused first, what was measured is kept."""

import json
import logging
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fused_lora import bench
from fused_lora.bench import candidates, machine, results, runner, suite
from fused_lora.bench import plot as picture
from fused_lora.bench.cases import Case
from fused_lora.cli import app

CASE = Case(24, 32, 40, 4, 0.0, torch.float32)
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def tiny(monkeypatch):
    """Every preset is two tiny cases."""
    monkeypatch.setattr(suite, "cases_of", lambda name, device: [CASE, Case(24, 32, 40, 4, 0.25, torch.float32)])


@pytest.fixture
def nothing_is_timed(monkeypatch):
    monkeypatch.setattr(runner, "run_case", lambda *a, **k: pytest.fail("timed before the refusal"))


def test_peft_comes_without_the_words_of_what_it_imports(monkeypatch, tmp_path, caplog):
    """Their loggers are silent while it is imported, and as they were then."""
    (tmp_path / "peft.py").write_text(
        "import logging\n"
        "logging.getLogger('torchao').warning('Failed to load _C_cutlass_90a')\n"
        "logging.getLogger('another').warning('worth a word')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.delitem(sys.modules, "peft")
    before = logging.getLogger("torchao").level
    candidates.import_peft()
    assert [record.getMessage() for record in caplog.records] == ["worth a word"]
    assert logging.getLogger("torchao").level == before


def test_run_writes_json_and_plot(tiny, tmp_path, capsys):
    document = bench.run(
        output=tmp_path / "new" / "b.json", plot=tmp_path / "b.png", candidates=["naive", "peft", "fused"], budget_s=0.1
    )
    assert json.loads((tmp_path / "new" / "b.json").read_text()) == document
    assert document["environment"]["torch"] == torch.__version__
    assert {r["candidate"] for r in document["rows"]} == {"frozen", "naive", "peft", "fused"}
    for r in document["rows"]:
        assert r["both_p20_us"] <= r["both_us"] <= r["both_p80_us"] and r["both_us"] > 0
        assert r["both_ratio"] == 1.0 or r["candidate"] != "frozen"
    assert {r["candidate"] for r in document["host"]} == {"frozen", "naive", "peft", "fused"}
    assert (tmp_path / "b.png").read_bytes()[:8] == PNG
    printed = capsys.readouterr().out
    assert "x frozen" in printed and "fused / PEFT" in printed
    assert all(len(line) <= 80 and line == line.rstrip() for line in printed.splitlines() if str(tmp_path) not in line)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["b.png", "new"]


def test_a_run_with_bad_candidates_says_so_everywhere(tiny, monkeypatch, tmp_path):
    """Table, JSON, plot and exit code; what is right is timed."""
    wrong = lambda p, dropout: candidates.naive(replace(p, scaling=2 * p.scaling), dropout)
    monkeypatch.setitem(candidates.CANDIDATES, "naive", wrong)
    monkeypatch.setitem(sys.modules, "peft", None)
    output, plot = tmp_path / "readme-x.json", tmp_path / "readme-x.png"
    arguments = ["bench", "--device", "cpu", "--candidates", "naive,peft,fused", "--budget", "0.05"]
    done = CliRunner().invoke(app, [*arguments, "--output", str(output), "--plot", str(plot)])
    assert done.exit_code == 1 and "error: dropped from the run: naive (wrong), peft (failed)" in done.stderr
    assert "naive: wrong, not timed: y is off by " in done.stdout and "peft: failed, not timed" in done.stdout
    assert all(line == line.rstrip() for line in done.stdout.splitlines())
    document = json.loads(output.read_text())
    for row in document["rows"] + document["host"]:
        assert row.get("fault") == {"naive": "wrong", "peft": "failed"}.get(row["candidate"])
    assert len(results.faults(document)) == 2 * 3 and plot.read_bytes()[:8] == PNG


def test_the_plot_marks_what_was_dropped(monkeypatch, tmp_path):
    """Where a bar is missing stands the reason; a run of the frozen layer alone has a plot, too."""
    texts = []
    monkeypatch.setattr(picture.pyplot(), "close", lambda f: texts.extend(t.get_text() for t in f.axes[0].texts))
    good = CASE.facts() | dict(candidate="frozen", both_ratio=1.0)
    bad = CASE.facts() | dict(candidate="fused", fault="wrong", why="y is off")
    environment = dict(device="a CPU", torch="2", date="today")
    picture.write_plot(dict(rows=[good, bad], environment=environment), tmp_path / "a.png")
    picture.write_plot(dict(rows=[good], environment=environment), tmp_path / "b.png")
    assert [t.strip() for t in texts] == ["fused: wrong"] and (tmp_path / "b.png").read_bytes()[:8] == PNG


def test_without_peft_the_others_are_timed(tiny, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr(suite, "candidates_on", lambda kind: dict.fromkeys(["frozen", "peft", "fused"]))
    document = bench.run(budget_s=0.05)
    assert document["candidates"] == ["frozen", "fused"] and not results.faults(document)
    assert "without PEFT" in capsys.readouterr().out
    assert {r["candidate"] for r in document["host"]} == {"frozen", "fused"}


def test_an_interrupted_run_goes_on(tiny, tmp_path, monkeypatch):
    """What was timed before a stop is in the file and is not timed again."""
    path, real, cases = tmp_path / "b.json", runner.run_case, suite.cases_of("quick", "cpu")

    def stopped(case, *rest, **more):
        if case == cases[1]:
            raise KeyboardInterrupt
        return real(case, *rest, **more)

    monkeypatch.setattr(runner, "run_case", stopped)
    with pytest.raises(KeyboardInterrupt):
        bench.run(output=path, candidates=["fused"], budget_s=0.1)
    first = json.loads(path.read_text())["rows"]
    assert len(first) == 2 and {results.key(r) for r in first} == {results.key(cases[0].facts())}
    monkeypatch.setattr(
        runner,
        "run_case",
        lambda case, *rest, **more: pytest.fail("timed again") if case == cases[0] else real(case, *rest, **more),
    )
    rows = bench.run(output=path, candidates=["fused"], budget_s=0.1, resume=True)["rows"]
    assert rows[:2] == first and len(rows) == 2 * len(cases) and json.loads(path.read_text())["rows"] == rows
    with pytest.raises(ValueError, match="cannot be resumed: candidates must be .*'naive'.*; got"):
        bench.run(output=path, candidates=["naive"], budget_s=0.1, resume=True)
    with pytest.raises(ValueError, match="resume needs output"):
        bench.run(candidates=["fused"], resume=True)


@pytest.mark.parametrize(
    "content",
    [
        '{"environment": {}, "rows": [{"candidate": "fro',
        "",
        "\udcff",
        "[" * 100000,
        "7",
        '{"rows": []}',
        '{"environment": {}, "rows": [7]}',
        '{"environment": {}, "rows": [{"candidate": "fused", "dtype": "float32"}]}',
        '{"environment": {}, "rows": [{"candidate": "fused", "dtype": "float32", "fault": "wrong", "why": "y"}]}',
    ],
    ids=["cut", "empty", "no UTF-8", "deep", "number", "no environment", "no row", "no figures", "no case"],
)
def test_a_damaged_file_is_not_resumed(nothing_is_timed, tmp_path, content):
    path = tmp_path / "b.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=f"{path} cannot be resumed: it must be .*; got"):
        bench.run(output=path, candidates=["fused"], resume=True)
    assert path.read_bytes() == content.encode(errors="surrogateescape")


def test_an_installed_package_has_no_commit(monkeypatch, tmp_path):
    """Even if it lies in another project's checkout."""
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    author = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", "-C", tmp_path, *author, "commit", "-q", "--allow-empty", "-m", "another"], check=True)
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "machine.py"))
    assert machine.commit() == ""


def test_output_means_a_file_or_a_directory(tmp_path):
    document = dict(preset="quick", environment=dict(kind="cuda", cpu=""))
    target = lambda path: results.target(document, path, ".json", "output")
    (tmp_path / "v1.2").mkdir()
    (tmp_path / "busy" / "quick-cuda.json").mkdir(parents=True)
    assert target(tmp_path / "v1.2") == tmp_path / "v1.2" / "quick-cuda.json"
    assert target(tmp_path / "new") == tmp_path / "new" / "quick-cuda.json"
    assert target(str(tmp_path / "B.JSON")) == tmp_path / "B.JSON"
    for bad in ("", "/dev/stdout", __file__, tmp_path / "b.txt", tmp_path / "b.png", tmp_path / "busy"):
        with pytest.raises(ValueError, match="output must be a .json file or a directory; got"):
            target(bad)


def test_an_unwritable_file_is_found_before_the_timing(nothing_is_timed, tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("output", "plot"):
        suffix = {"output": "json", "plot": "png"}[name]
        with pytest.raises(OSError, match="file"):
            bench.run(candidates=["fused"], **{name: tmp_path / "file" / f"b.{suffix}"})
        with pytest.raises(OSError, match="/proc|nowhere"):
            bench.run(candidates=["fused"], **{name: Path("/proc") / f"b.{suffix}"})
    assert [f.name for f in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "package, options",
    [("matplotlib", ["--plot", "b.png"]), ("transformers", ["--train-step"]), ("gguf", ["--train-step"])],
)
def test_a_missing_package_is_found_before_the_timing(nothing_is_timed, monkeypatch, tmp_path, package, options):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["bench", "--device", "cpu", "--candidates", "fused", *options])
    assert done.exit_code == 1 and f"error: {package} is not installed" in done.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options, message",
    [
        ("--device tpu", "device must be cpu, cuda or cuda:<index>; got 'tpu'"),
        ("--device cuda:999", "device 'cuda:999' needs a GPU that PyTorch sees; there are "),
        ("--preset slow", "preset must be one of quick, readme, full, variants, latency; got 'slow'"),
        ("--candidates fast", "candidates must be among .*; got fast"),
        ("--candidates slow:around", "candidates must be among .*; got slow:around"),
        ("--candidates=", "candidates must be among .*; got ''"),
        ("--candidates fused,,", "candidates must be among .*; got '', ''"),
        ("--threads 0", "threads must be from 1 to [0-9]+, the CPUs of this machine; got 0"),
        ("--threads -3", "threads must be .*; got -3"),
        ("--threads 1000000", "threads must be .*; got 1000000"),
        ("--budget nan", "budget must be a finite number of seconds, 0 or more; got nan"),
        ("--budget inf", "budget must be .*; got inf"),
        ("--budget 1e999", "budget must be .*; got inf"),
        ("--budget -1", "budget must be .*; got -1.0"),
        ("--output=", "output must be a .json file or a directory; got an empty path"),
        ("--output b.txt", "output must be a .json file or a directory; got 'b.txt'"),
        ("--plot=", "plot must be a .png file or a directory; got an empty path"),
        ("--plot b.jpg", "plot must be a .png file or a directory; got 'b.jpg'"),
        ("--resume", "resume needs output"),
        ("--preset variants --plot .", "plot must be left out with preset 'variants'; got '.'"),
        ("--preset latency --resume", "resume must be left out with preset 'latency'"),
        ("--preset latency --train-step", "train_step must be left out with preset 'latency'"),
    ],
)
def test_bad_arguments(nothing_is_timed, monkeypatch, tmp_path, options, message):
    """One line, exit code 2, nothing timed, nothing written."""
    monkeypatch.chdir(tmp_path)
    defaults = "--device cpu" if "device" not in options else ""
    done = CliRunner().invoke(app, ["bench", *defaults.split(), *options.split()])
    (line,) = done.stderr.splitlines()
    assert done.exit_code == 2 and re.search(f"error: {message}", line), line
    assert not list(tmp_path.iterdir())


def test_an_index_chooses_the_gpu(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert suite._kind("cuda:1") == suite._kind("cuda") == "cuda" and chosen == [1]
