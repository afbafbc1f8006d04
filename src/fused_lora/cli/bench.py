"""fused-lora bench: the layer against the frozen one and its peers."""

from pathlib import Path
from typing import Annotated

import typer

from fused_lora.cli.console import Device, default_device, errors, fail


def bench(
    preset: Annotated[
        str, typer.Option(help="quick (about a minute on a CPU), readme (the published table) or full.")
    ] = "quick",
    device: Device = None,
    output: Annotated[Path | None, typer.Option(help="JSON file, or a directory for <preset>-<device>.json.")] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG file, or a directory.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: PyTorch's choice.")] = None,
    candidates: Annotated[
        str | None, typer.Option(help="Of naive, addmm, peft, compile, fused, with commas between; default: all.")
    ] = None,
    budget: Annotated[float, typer.Option(help="Seconds of timing a case.")] = 10.0,
    train_step: Annotated[
        bool | None, typer.Option(help="A SmolLM2 training step too; default: with readme and full on the CPU.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the output file of an interrupted run.")] = False,
) -> None:
    """Time the layer against the frozen one, plain PyTorch, PEFT and torch.compile; a wrong result is not timed."""
    with errors():
        from fused_lora import bench as job

        names = None if candidates is None else [name.strip() for name in candidates.split(",")]
        try:
            job.run(default_device(device), preset, output, plot, threads, names, budget, train_step, resume)
        except AssertionError as error:  # a candidate whose result is off
            fail(str(error), 1)
