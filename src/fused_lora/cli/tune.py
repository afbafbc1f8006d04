"""fused-lora tune: which back end and plan is right and fastest on this machine."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from fused_lora.cli.console import Device, default_device, errors, given, out, print_table, say


def tune(
    model: Annotated[
        str | None,
        typer.Option(
            help="Model directory, GGUF file or hub id, for its shapes, or 'packaged' for SmolLM2-135M; default: the "
            "shapes of the benchmark.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of fp32, bf16 and fp16, with commas between; default: fp32,bf16 on a CPU, bf16 on a GPU.",
            show_default=False,
        ),
    ] = None,
    rows: Annotated[
        str | None,
        typer.Option(
            help="Numbers of rows (tokens of a batch), with commas between; default: the usual ones.",
            show_default=False,
        ),
    ] = None,
    r: Annotated[str | None, typer.Option(help="Ranks, with commas between; default: 16.", show_default=False)] = None,
    dropout: Annotated[bool, typer.Option("--dropout/--no-dropout", help="With dropout as well.")] = True,
    device: Device = None,
    show: Annotated[bool, typer.Option("--show", help="Print what was found out, and measure nothing.")] = False,
    clear: Annotated[bool, typer.Option("--clear", help="Remove what was found out on this device.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Measure again what was found out already.")] = False,
    time_limit: Annotated[
        float | None,
        typer.Option(
            help="Seconds for one check of one candidate, which hangs if it takes longer; default: 20 on a CPU, 120 on "
            "a GPU.",
            show_default=False,
        ),
    ] = None,
    budget: Annotated[float, typer.Option(help="Seconds of timing a case, at the most.")] = 1.0,
) -> None:
    """Find out which back end and plan is right and fastest on this machine.

    Each is checked and timed in a process of its own; from then on backend="auto" takes the fastest. A stop keeps what
    is done.
    """
    with errors(rows="--rows", ranks="--r", time_limit_s="--time-limit", budget_s="--budget", device="--device"):
        given(model=model, dtype=dtype, rows=rows, r=r)
        from fused_lora.backends import tuned
        from fused_lora.models import DTYPES, base_model
        from fused_lora.tuning.job import chosen_device
        from fused_lora.tuning.job import tune as job

        measures = {"--model": model, "--dtype": dtype, "--rows": rows, "--r": r, "--time-limit": time_limit}
        others = [name for name, value in measures.items() if value is not None]
        others += [name for name, on in (("--again", again), ("--clear", show and clear)) if on]
        if (show or clear) and others:
            alone = "--show" if show else "--clear"
            raise ValueError(
                f"{alone} measures nothing and must be given alone, or with --device; got {others[0]}, too"
            )
        where = chosen_device(default_device(device))
        path = tuned.path_of(where)
        if clear:
            say(f"removed {path}" if path.exists() else f"there is no {path}")
            path.unlink(missing_ok=True)
        elif show:
            with warnings.catch_warnings(action="ignore"):  # of a damaged file: what is shown says so
                found = tuned.read(where)
            _show(found)
        else:
            options: dict[str, Any] = dict(
                dtypes=_listed("dtype", dtype, DTYPES.__getitem__, f"of {', '.join(DTYPES)}"),
                rows=_listed("rows", rows, int, "whole numbers"),
                ranks=_listed("r", r, int, "whole numbers"),
                dropouts=(0.0, 0.1) if dropout else (0.0,),
                time_limit_s=time_limit,
            )
            shapes = None if model is None else base_model(model)
            with _progress() as progress:
                document = job(
                    shapes, device=where, budget_s=budget, again=again, progress=progress, say=say, **options
                )
            _print_rows(document["rows"])
            _say_written(path)


def _listed(name: str, text: str | None, convert: Callable[[str], Any], expected: str) -> tuple:
    """The values of an option with commas between; none where it isn't given."""
    try:
        return () if text is None else tuple(convert(each.strip()) for each in text.split(","))
    except (ValueError, KeyError):
        raise ValueError(f"--{name} must be {expected}, with commas between; got {text!r}") from None


@contextmanager
def _progress() -> Iterator[Callable]:
    """A bar with the time left on a terminal, a line now and then elsewhere; yields what is called after each case."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[case]}"),
        TimeRemainingColumn(),
    )
    # twice a second: a bar that wants a CPU more often disturbs what is timed
    with Progress(*columns, console=out, disable=not out.is_terminal, refresh_per_second=2) as bar:
        task = bar.add_task("tuning", total=None, case="")

        def tick(done: int, total: int, case: Any, row: dict | None) -> None:
            if row is None:
                out.print(f"{case.name}: not tuned, PyTorch itself cannot compute it here in time and memory")
            bar.update(task, completed=done, total=total, case=case.name)
            if bar.disable and (done % max(1, total // 10) == 0 or done == 1):
                out.print(f"{done} of {total}: {case.name}")

        yield tick


def _show(found: Any) -> None:
    if found.ignored:
        say(f"{found.path}: {found.ignored}")
    rows = found.document.get("rows", []) if found.verdicts else []
    if rows:
        say(f"{found.path}, {found.document.get('date', '')}")
        _print_rows(rows)


def _say_written(path: Path) -> None:
    from fused_lora.backends import tuned

    say(f"wrote {path}" + (" (FUSED_LORA_TUNED is 0: it will not count)" if tuned.switched_off() else ""))


def _print_rows(rows: list[dict]) -> None:
    """A line a shape: what serves it, its time over the frozen layer's, and how much longer the next takes, over all
    dropouts together; then what failed."""
    from fused_lora.backends import tuned

    table = Table(box=None, pad_edge=False)
    for column in ("dtype", "M", "K->N", "R", "fastest", "x frozen", "next", "by", "failed"):
        left = column in ("dtype", "K->N", "fastest", "next")
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    for shape, verdict in sorted(tuned.verdicts(rows).items(), key=lambda pair: pair[0]):
        frozen = sum(row["frozen"].get("us", 0) for row in rows if tuned.shape_of(row) == shape)
        table.add_row(*(Text(cell) for cell in _cells(shape, verdict, frozen)), style="red" if verdict.failed else "")
    print_table(table)
    for row in rows:
        case = f"{row['dtype']} M={row['rows']} {row['K']}->{row['N']} R={row['R']} p={row['dropout']:g}"
        for name, figures in row["candidates"].items():
            if "fault" in figures:
                say(f"{name} at {case}: {figures['fault']}, {figures['why']}")


def _cells(shape: Any, verdict: Any, frozen_us: float) -> tuple[str, ...]:
    (first, first_us), (second, second_us) = [*verdict.times.items(), ("-", 0.0), ("-", 0.0)][:2]
    return (
        shape.dtype.replace("bfloat", "bf").replace("float", "fp"),
        f"{shape.M}",
        f"{shape.K}->{shape.N}",
        f"{shape.R}",
        first,
        f"{first_us / frozen_us:.3f}" if first_us and frozen_us else "-",
        second,
        f"{100 * (second_us / first_us - 1):.1f} %" if second_us else "-",
        f"{len(verdict.failed) or ''}",
    )
