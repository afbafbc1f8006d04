"""fused-lora bench: the layer against the frozen one and its peers."""

from typing import Annotated

import typer

from fused_lora.cli.console import Device, default_device, errors, fail


def bench(
    preset: Annotated[
        str,
        typer.Option(
            help="quick (about a minute on a CPU), readme (the published table) or full; variants (SmolLM2's step with "
            "each) or latency (prompts and generated tokens, merged, unmerged, with other adapters)."
        ),
    ] = "quick",
    device: Device = None,
    output: Annotated[
        str | None, typer.Option(metavar="PATH", help="JSON file, or a directory for <preset>-<device>.json.")
    ] = None,
    plot: Annotated[str | None, typer.Option(metavar="PATH", help="PNG file, or a directory.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: PyTorch's choice.")] = None,
    candidates: Annotated[
        str | None,
        typer.Option(
            help="Of naive, addmm, peft, compile, fused (and triton, cuda on a GPU), or a back end's plan such as "
            "cuda:h_shrink+wgrad_apart, with commas between; default: all the former."
        ),
    ] = None,
    budget: Annotated[float, typer.Option(help="Seconds of timing a case.")] = 10.0,
    train_step: Annotated[
        bool | None, typer.Option(help="A SmolLM2 training step too; default: with readme and full on the CPU.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the output file of an interrupted run.")] = False,
) -> None:
    """Time the layer against the frozen one, plain PyTorch, PEFT and torch.compile.

    A wrong or failing candidate is reported and dropped, and the exit code is 1.
    """
    with errors():
        from fused_lora import bench as job
        from fused_lora.bench.results import faults

        names = None if candidates is None else [name.strip() for name in candidates.split(",")]
        try:
            document = job.run(default_device(device), preset, output, plot, threads, names, budget, train_step, resume)
        except AssertionError as error:  # the frozen layer's result is off
            fail(str(error), 1)
        dropped = {f"{row['candidate']} ({row['fault']})": None for row in faults(document)}
        if dropped:
            fail(f"dropped from the run: {', '.join(dropped)}; the reasons are above", 1)
