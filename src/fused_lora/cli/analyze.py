"""fused-lora analyze: the spectra of an adapter, or of what full training has changed."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from fused_lora.cli.console import errors, given, print_table, printable, say


def analyze(
    tuned: Annotated[str, typer.Argument(help="Directory of an adapter, or of a whole model trained from --model.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="The model before: directory, GGUF file, hub id or 'packaged'; needed for intruders and whole models."
        ),
    ] = None,
    plot: Annotated[str | None, typer.Option(help="PNG file to draw the spectra into.")] = None,
    energy: Annotated[float, typer.Option(help="Share of the energy that the rank holds.")] = 0.9,
    top: Annotated[int, typer.Option(help="How many of the largest directions may be intruders.")] = 10,
    eps: Annotated[float, typer.Option(help="An intruder's cosine with all directions before is below this.")] = 0.5,
) -> None:
    """A line a layer: norm of the update, its rank (of how many directions hold a share of the energy), its effective
    rank, and how many of its largest directions are intruders."""
    with errors():
        given(TUNED=tuned, model=model, plot=plot)
        if plot is not None and Path(plot).suffix.lower() != ".png":
            raise ValueError(f"--plot must be a .png file; got {plot}")
        if top < 1:
            raise ValueError(f"--top must be >= 1; got {top}")
        import torch

        from fused_lora.adapters.peft_config import CONFIG_NAME
        from fused_lora.analysis.report import changed, lying_turned, read_adapter, rows
        from fused_lora.files import write_whole
        from fused_lora.models import base_model, load_bare_model

        if plot is not None:
            import matplotlib  # noqa: F401  its lack shows here, not after the work
        directory = Path(tuned)
        if not directory.is_dir():
            raise FileNotFoundError(2, "No such directory", tuned)
        is_adapter = (directory / CONFIG_NAME).exists()
        if not is_adapter and model is None:
            raise ValueError(
                f"{tuned} must hold an adapter ({CONFIG_NAME}), or --model be given to compare a whole model with"
            )
        base = None if model is None else load_bare_model(base_model(model), torch.float32, "cpu")
        weights = None if base is None else base.state_dict()
        notes: list[str] = []
        if is_adapter:
            updates, notes = read_adapter(directory, weights, lying_turned(base) if base is not None else ())
        else:
            assert weights is not None
            updates = changed(weights, load_bare_model(tuned, torch.float32, "cpu").state_dict())
        found = list(rows(updates, weights, energy, top, eps))
        _print(found, energy)
        for note in notes:
            say(note)
        if plot is not None:
            from fused_lora.analysis.plot import plot as drawn

            write_whole({Path(plot): drawn(found)})
            say(f"wrote {plot}")


def _print(found: list, energy: float) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("weight", overflow="fold")
    with_intruders = found[0].intruders is not None
    for title in ["shape", "norm", f"rank {energy:.0%}", "effective"] + ["intruders"] * with_intruders:
        table.add_column(title, justify="right", no_wrap=True)
    for row in found:
        cells = [f"{row.shape[0]} x {row.shape[1]}", f"{row.norm:.4g}", str(row.rank), f"{row.effective_rank:.1f}"]
        table.add_row(printable(row.name), *cells, *([str(row.intruders)] if with_intruders else []))
    print_table(table)
    n = len(found)
    rank, effective = sum(row.rank for row in found) / n, sum(row.effective_rank for row in found) / n
    ranks = f"mean rank {rank:.1f}, effective {effective:.1f}"
    intruders = f", {sum(row.intruders for row in found)} intruders" if with_intruders else ""
    say(f"{n} weights, {ranks}{intruders}")
