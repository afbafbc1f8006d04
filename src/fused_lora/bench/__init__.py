"""Benchmarks of the layer for people and for CI: `fused-lora bench`, and the pytest-benchmark suites in bench/.

timing      the interleaving timer        cases       named sizes            candidates  who is timed
runner      check, time, count one case   steps       a SmolLM2 step         report      lines, JSON, plot, README table
"""

import datetime
import platform
from pathlib import Path

import torch

from fused_lora.bench import report, runner
from fused_lora.bench.candidates import CANDIDATES, candidates_on
from fused_lora.bench.cases import Case
from fused_lora.bench.cases import preset as cases_of

__all__ = ["CANDIDATES", "Case", "cases_of", "environment", "run"]


def environment(device: str) -> dict:
    """Device, versions and date: what every file of figures says of its origin."""
    name = report.cpu_name() if device == "cpu" else torch.cuda.get_device_name()
    return dict(
        device=name,
        kind=device,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        python=platform.python_version(),
        fused_lora=report.version(),
        commit=report.commit(),
        date=datetime.date.today().isoformat(),
    )


def run(
    device: str = "cpu",
    preset: str = "quick",
    output: Path | None = None,
    plot: Path | None = None,
    threads: int | None = None,
    candidates: list[str] | None = None,
    budget_s: float = 10.0,
    train_step: bool | None = None,
    resume: bool = False,
) -> list[dict]:
    """Time a preset, printing a table a case; returns the rows. The JSON file is complete after every case, so that a
    stop loses one at most.

    Args:
        device: cpu or cuda.
        preset: quick, readme or full; readme and full add the SmolLM2 training step.
        output: JSON file to write (or a folder, for <preset>-<device>.json), written aside and renamed after every
            case.
        plot: PNG file to write (or a folder).
        threads: CPU threads; torch's choice where None.
        candidates: names out of `candidates_on(device)`; all where None. frozen is always timed.
        budget_s: seconds of timing a case.
        train_step: time a SmolLM2 training step too; by default with every preset but quick, on the CPU.
        resume: keep the cases that are in `output` already, if it comes from this device, these versions and this
            commit.
    Raises: ValueError for an unknown name, an absent device or a file that cannot be resumed; WrongResult if a
        candidate is off.
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda; got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' needs a GPU that PyTorch sees; there is none")
    known = candidates_on(device)
    names = list(dict.fromkeys(["frozen", *(candidates or known)]))
    unknown = [n for n in names if n not in known]
    if unknown:
        raise ValueError(f"candidates must be among {', '.join(known)}; got {', '.join(unknown)}")
    cases = cases_of(preset, device)
    if threads is not None:
        torch.set_num_threads(threads)
    env = environment(device)
    report.print_environment(env)
    document = dict(environment=env, preset=preset, candidates=names, rows=[], host=[], train_step=[])
    if resume:
        document["rows"] = report.rows_to_resume(document, output)
    rows, done = document["rows"], {report.key(r) for r in document["rows"]}
    for case in cases:
        if report.key(vars(case) | {"dtype": str(case.dtype)[6:]}) in done:
            continue
        # bf16 on a CPU without AVX-512 takes minutes a call: three rounds there, and no compiled candidate
        slow = device == "cpu" and case.dtype != torch.float32
        timed = [n for n in names if not (slow and n == "compile")]
        rows += report.print_case(case, runner.run_case(case, device, timed, budget_s, least=3 if slow else 5))
        if output is not None:
            report.write_json(document, output)
    host = document["host"] = (
        runner.host_cost(device, min(budget_s, 10.0), [n for n in names if n != "compile"]) if "peft" in names else []
    )
    report.print_host(host)
    if train_step if train_step is not None else (preset != "quick" and device == "cpu"):
        from fused_lora.bench.steps import run_steps

        document["train_step"] = report.print_steps(run_steps(budget_s=6 * budget_s))
    if output is not None:
        report.print_written(report.write_json(document, output))
    if plot is not None:
        report.print_written(report.write_plot(document, plot))
    return rows
