"""A benchmark from arguments to files: what can be refused is refused before the first measurement."""

import importlib.util
import math
import os
import re
from pathlib import Path
from typing import Any

import torch

from fused_lora.bench import plot as picture
from fused_lora.bench import report, results, runner
from fused_lora.bench.candidates import candidates_on, import_peft, is_plan
from fused_lora.bench.cases import Case
from fused_lora.bench.cases import preset as cases_of
from fused_lora.bench.latency import run_latency
from fused_lora.bench.machine import environment
from fused_lora.bench.mixed import mixed_cases, run_mixed
from fused_lora.bench.steps import run_steps, smollm2_steps, variants_on
from fused_lora.files import write_json
from fused_lora.hardware import gpu_clocks
from fused_lora.models import packaged_model

_WITHOUT_LAYERS = ("variants", "latency")
# By option, the presets that it says nothing to.
_USELESS = dict.fromkeys(("candidates", "plot", "resume"), _WITHOUT_LAYERS) | {"train_step": ("latency",)}


def run(
    device: str = "cpu",
    preset: str = "quick",
    output: str | Path | None = None,
    plot: str | Path | None = None,
    threads: int | None = None,
    candidates: list[str] | None = None,
    budget_s: float = 10.0,
    train_step: bool | None = None,
    resume: bool = False,
) -> dict:
    """Time a preset, printing a table a case; returns the document that the JSON file holds, which is complete after
    every case, so that a stop loses one at most.

    Args:
        device: cpu, cuda or cuda:<index>.
        preset: quick, readme or full; readme and full add a SmolLM2 training step on the CPU, in fp32 and, where the
            CPU has AVX-512, in bf16. Or variants, that step in fp32 with LoRA's variants. Or latency, a forward of
            SmolLM2 merged, unmerged and with adapters of other kinds. These two take neither candidates nor plot nor
            resume, latency no train_step either.
        output: JSON file to write, or a directory for <preset>-cpu-<vendor>-<family>-<model>.json or
            <preset>-cuda.json; written aside and renamed after every case.
        plot: PNG file to write, or a directory.
        threads: CPU threads; torch's choice where None.
        candidates: names out of `candidates_on(device)`, all of them where None, but PEFT where it is not installed; or
            a back end with a plan, "cpu:around". frozen is always timed. A wrong or failing candidate is reported and
            dropped from a case, see `results.faults`.
        budget_s: seconds of timing a case.
        train_step: time a SmolLM2 training step too; by default with readme, full and variants, on the CPU.
        resume: keep the cases that are in `output` already, if it comes from this device, these versions and this
            commit.
    Raises: ValueError for a bad argument or a file that cannot be resumed, OSError or ModuleNotFoundError if output or
        plot could not be written; WrongResult if the frozen layer is off.
    """
    kind = _kind(device)
    names = _names(kind, candidates)
    cases = cases_of(preset, kind)
    _check_numbers(threads, budget_s)
    latency, layers = preset == "latency", preset not in _WITHOUT_LAYERS
    _check_options(preset, candidates=candidates, plot=plot, resume=resume, train_step=train_step)
    steps = train_step if train_step is not None else (preset not in ("quick", "latency") and kind == "cpu")
    if steps or latency:
        _check_steps()
    if threads is not None:
        torch.set_num_threads(threads)
    document: dict = dict(environment=environment(kind), preset=preset, candidates=names)
    document |= dict(rows=[], host=[], train_step=[], mixed=[], latency=[])
    output, plot = _targets(document, output, plot)
    if resume:
        if output is None:
            raise ValueError("resume needs output, the file to go on with; got None")
        document["rows"] = results.rows_to_resume(document, output)
    for path in (output, plot):
        if path is not None:
            results.check_writable(path)
    report.print_environment(document["environment"], layers)
    if "peft" not in names and candidates is None:
        report.say("without PEFT, which is not installed: pip install 'fused-lora[peft]'\n")
    if steps or not layers or "peft" in names:
        import_peft()
    _time_cases(document, cases, budget_s, output)
    if layers and (candidates is None or "peft" in names):
        document["host"] = runner.host_cost(kind, min(budget_s, 10.0), [n for n in names if n != "compile"])
        report.print_host(document["host"])
    _time_models(document, steps, budget_s, output)
    if output is not None:
        write_json(output, document)
        report.print_written(output)
    if plot is not None:
        picture.write_plot(document, plot)
        report.print_written(plot)
    return document


def _time_models(document: dict, steps: bool, budget_s: float, output: Path | None) -> None:
    """Steps of a language model and what else the preset has, batch by batch."""
    kind, preset = document["environment"]["kind"], document["preset"]

    def add(name: str, rows: list[dict]) -> None:
        document[name] += rows
        if output is not None:
            write_json(output, document)

    if steps:
        for workload in variants_on(kind) if preset == "variants" else smollm2_steps(kind):
            for rows in run_steps(workload, budget_s=6 * budget_s):
                report.print_steps(workload.title, rows)
                add("train_step", rows)
    if preset == "variants":
        for rows in run_mixed(mixed_cases(), kind, budget_s):
            report.print_mixed(rows)
            add("mixed", rows)
    if preset == "latency":
        for rows in run_latency(kind, budget_s=6 * budget_s):
            report.print_latency(rows)
            add("latency", rows)


def _time_cases(document: dict, cases: list[Case], budget_s: float, output: Path | None) -> None:
    """Fill the document's rows, and its file, case by case."""
    names, kind = document["candidates"], document["environment"]["kind"]
    done = {results.key(r) for r in document["rows"]}
    for case in cases:
        if results.key(case.facts()) in done:
            continue
        # bf16 on a CPU without AVX-512 takes minutes a call: three rounds there, and no compiled candidate
        slow = kind == "cpu" and case.dtype != torch.float32
        timed = [n for n in names if not (slow and n == "compile")]
        rows = runner.run_case(case, kind, timed, budget_s, least=3 if slow else 5)
        if kind == "cuda":
            clocks = gpu_clocks(torch.cuda.current_device())
            rows = [row | clocks for row in rows]
        report.print_case(case, rows)
        document["rows"] += rows
        if output is not None:
            write_json(output, document)


def _kind(device: str) -> str:
    """cpu or cuda; cuda:<index> becomes the current GPU."""
    if not re.fullmatch(r"cpu|cuda(:[0-9]{1,4})?", device):
        raise ValueError(f"device must be cpu, cuda or cuda:<index>; got {device!r}")
    kind, _, index = device.partition(":")
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count <= int(index or 0):
            raise ValueError(f"device {device!r} needs a GPU that PyTorch sees; there are {count}")
        if index:
            torch.cuda.set_device(int(index))
    return kind


def _names(kind: str, candidates: list[str] | None) -> list[str]:
    known = candidates_on(kind)
    if candidates is None:
        return [n for n in known if n != "peft" or importlib.util.find_spec("peft")]
    unknown = [n for n in candidates if n not in known and not is_plan(n, kind)]
    if unknown or not candidates:
        raise ValueError(
            f"candidates must be among {', '.join(known)}; got {', '.join(n or repr(n) for n in unknown) or 'none'}"
        )
    return list(dict.fromkeys(["frozen", *candidates]))


def _check_numbers(threads: int | None, budget_s: float) -> None:
    most = os.cpu_count() or 1
    if threads is not None and not 1 <= threads <= most:
        raise ValueError(f"threads must be from 1 to {most}, the CPUs of this machine; got {threads}")
    if not (math.isfinite(budget_s) and budget_s >= 0):
        raise ValueError(f"budget must be a finite number of seconds, 0 or more; got {budget_s}")


def _check_steps() -> None:
    """Says before hours of timing, not after, that the training step's model cannot be loaded."""
    for package in ("transformers", "gguf"):
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    packaged_model()


def _check_options(preset: str, **options: Any) -> None:
    """Raises ValueError for an option that a preset has no use for: without layers, or for latency without steps."""
    for name, value in options.items():
        if value and preset in _USELESS.get(name, ()):
            raise ValueError(f"{name} must be left out with preset {preset!r}; got {value!r}")


def _targets(document: dict, output: str | Path | None, plot: str | Path | None) -> tuple[Path | None, Path | None]:
    if plot is not None:
        picture.pyplot()
    return (
        None if output is None else results.target(document, output, ".json", "output"),
        None if plot is None else results.target(document, plot, ".png", "plot"),
    )
