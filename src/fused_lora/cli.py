"""The command line: fused-lora info | finetune | merge | bench. Bad input is one red line on stderr: exit code 2 for
the input, 1 for the machine."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from fused_lora.training import DTYPES, Settings

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help="LoRA at the price of the frozen layer.",
)
_out, _err = Console(highlight=False), Console(stderr=True, highlight=False)

_Model = Annotated[
    str,
    typer.Option(help="Model directory, GGUF file or hub id; default: the packaged SmolLM2-135M.", show_default=False),
]
_Dtype = Annotated[str, typer.Option(help="Of the base model: fp32, bf16 or fp16.")]
_Device = Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.", show_default=False)]


@contextmanager
def _errors() -> Iterator[None]:
    """Expected failures as one red line and an exit code; anything else is a bug and keeps its traceback."""
    import torch

    try:
        yield
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except torch.OutOfMemoryError as error:
        _fail(str(error), 1)
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error), 1)
    except ModuleNotFoundError as error:
        _fail(f"{error.name} is not installed: pip install 'fused-lora[finetune,bench]'", 1)
    except ValueError as error:
        _fail(str(error), 2)


def _fail(message: str, code: int) -> None:
    _err.print(Text(f"error: {' '.join(message.split())}", style="bold red"), soft_wrap=True)
    raise typer.Exit(code)


def _default_device(device: str | None) -> str:
    import torch

    return device or ("cuda" if torch.cuda.is_available() else "cpu")


@app.command()
def info() -> None:
    """What is installed, what the compiled part holds, and which back end serves each device and dtype, and why."""
    import torch

    from fused_lora.backends import explain
    from fused_lora.bench.report import cpu_name

    facts = Table(box=None, show_header=False, pad_edge=False)
    for name in ("fused-lora", "torch", "triton", "transformers", "peft"):
        try:
            facts.add_row(name, metadata.version(name))
        except metadata.PackageNotFoundError:
            facts.add_row(name, "not installed")
    facts.add_row("compiled part", _compiled_part())
    devices = {"cpu": f"{cpu_name()}, {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        devices[f"cuda:{index}"] = torch.cuda.get_device_name(index)
    for device, name in devices.items():
        facts.add_row(device, name)
    _out.print(facts)
    table = Table(title="\nbackend='auto' for plain LoRA", title_justify="left", title_style="bold")
    for column in ("device", "dtype", "back end", "why"):
        table.add_column(column, no_wrap=column != "why")
    for device in devices:
        for dtype in (*DTYPES.values(), torch.float64):
            table.add_row(device, str(dtype).removeprefix("torch."), *explain(device, dtype))
    _out.print(table)


def _compiled_part() -> str:
    try:
        from fused_lora import _C
    except ImportError as error:
        return f"does not load ({error}): install again with a C++ compiler at hand"
    built = _C.build_info()
    names = ", ".join(f"sm_{name}" for name in built["cuda_archs"].replace(";", " ").replace(",", " ").split())
    cuda = f"CUDA kernels for {names}" if built["cuda"] else "no CUDA kernels (built without nvcc)"
    return f"CPU kernels and {cuda}, by compiler {built['compiler']}"


@app.command()
def finetune(
    model: _Model = Settings.model,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Text or JSONL file or directory, may be repeated; default: Python's own sources."),
    ] = None,
    eval_data: Annotated[
        list[str] | None, typer.Option(help="The same, held out; default: a twentieth of the data's files or lines.")
    ] = None,
    text_field: Annotated[str, typer.Option(help="Field of a JSONL line that holds its text.")] = Settings.text_field,
    output: Annotated[Path, typer.Option(help="Directory for the adapter, its figures and checkpoint.")] = Path(
        "fused-lora-finetune"
    ),
    rank: Annotated[int, typer.Option(help="Rank of the update.")] = Settings.rank,
    alpha: Annotated[float, typer.Option(help="The update is scaled by alpha / rank.")] = Settings.alpha,
    dropout: Annotated[float, typer.Option(help="Dropout on the low-rank path, in [0, 1).")] = Settings.dropout,
    target_modules: Annotated[
        str, typer.Option(help="all-linear, names with commas between, or a regular expression.")
    ] = Settings.target_modules,
    rslora: Annotated[bool, typer.Option("--rslora", help="Scale by alpha / sqrt(rank).")] = Settings.rslora,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = Settings.lr,
    warmup: Annotated[int, typer.Option(help="Steps of linear warm-up; a cosine follows.")] = Settings.warmup,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = Settings.steps,
    batch_size: Annotated[int, typer.Option(help="Blocks in a forward and backward pass.")] = Settings.batch_size,
    grad_accum: Annotated[int, typer.Option(help="Passes in an optimizer step.")] = Settings.grad_accum,
    seq_len: Annotated[int, typer.Option(help="Tokens in a block.")] = Settings.seq_len,
    max_grad_norm: Annotated[
        float, typer.Option(help="Gradients are clipped to this norm; 0 does not clip.")
    ] = Settings.max_grad_norm,
    weight_decay: Annotated[float, typer.Option(help="AdamW's.")] = Settings.weight_decay,
    seed: Annotated[
        int, typer.Option(help="Of the adapter's start, dropout and the order of the data.")
    ] = Settings.seed,
    dtype: _Dtype = Settings.dtype,
    device: _Device = None,
    eval_tokens: Annotated[
        int, typer.Option(help="Held-out tokens that the perplexity is of, at the most.")
    ] = Settings.eval_tokens,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints; 0: only at the start and the end.")] = 20,
    eval_every: Annotated[
        int, typer.Option(help="Steps between held-out losses; 0: only at the start and the end.")
    ] = 20,
    prompt: Annotated[str | None, typer.Option(help="Start of the sample completion.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the output's checkpoint, bit for bit.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run that the output holds.")] = False,
) -> None:
    """Train a LoRA adapter on text; perplexity on held-out text before and after. The defaults take a few minutes on
    two CPU cores."""
    given = locals()
    with _errors():
        from fused_lora import finetune as job

        values = {field.name: given[field.name] for field in dataclasses.fields(Settings)}
        values |= {"data": tuple(data or ()), "eval_data": tuple(eval_data or ()), "device": _default_device(device)}
        settings = Settings(**values)
        with _progress(settings.steps) as tick:
            summary = job.finetune(settings, output, resume, overwrite, save_every, eval_every, prompt, _say, tick)
        _print_summary(summary, output)


def _say(line: str) -> None:
    _out.print(line, markup=False, soft_wrap=True)


@contextmanager
def _progress(steps: int) -> Iterator[Callable[[dict], None]]:
    """A bar with loss, tokens/s and time left on a terminal, a line now and then elsewhere; yields what takes each
    step's row."""
    text = "step {step}/{steps}  loss {loss:.3f}  {rate:.0f} tokens/s"
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=_out, disable=not _out.is_terminal) as bar:
        task = bar.add_task("training", total=steps, figures="", start=False)

        def tick(row: dict) -> None:
            line = text.format(steps=steps, rate=row["tokens"] / row["seconds"], **row)
            if not bar.disable and not bar.tasks[0].started:
                bar.start_task(task)
            bar.update(task, completed=row["step"], figures=line.split("  ", 1)[1])
            if bar.disable and (row["step"] % max(1, steps // 10) == 0 or row["step"] == 1):
                _out.print(line)

        yield tick


def _print_summary(summary: dict, output: Path) -> None:
    for title, key in (("the base model", "completion_of_base"), ("with the adapter", "completion")):
        text = Text.assemble((_printable(summary["prompt"]), "dim"), _printable(summary[key]))
        _out.print(Panel(text, title=f"completion, {title}", title_align="left"))
    before, after = summary["perplexity_before"], summary["perplexity_after"]
    _out.print(
        f"held-out perplexity [bold]{before:.3f} -> {after:.3f}[/] ({summary['held_out_tokens']:,} tokens); "
        f"{summary['steps']} steps, {summary['train_tokens']:,} tokens at {summary['tokens_per_second']:.0f} tokens/s, "
        f"{summary['seconds']:.0f} s",
        soft_wrap=True,
    )
    _out.print(Text(f"adapter, metrics.jsonl, loss.png and summary.json are in {output}"), soft_wrap=True)


def _printable(text: str) -> str:
    """A model's words without control characters, which a terminal would obey."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in text)


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(help="Directory of an adapter, from fused-lora or PEFT.")],
    model: _Model = "",
    output: Annotated[Path, typer.Option(help="The new model directory.")] = Path("fused-lora-merged"),
    dtype: _Dtype = "fp32",
) -> None:
    """Fold an adapter into its base model: a directory that plain transformers loads."""
    with _errors():
        from fused_lora import merge as job
        from fused_lora.finetune import packaged_model

        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
        job.merge(model or packaged_model(), adapter, output, DTYPES[dtype])
        _out.print(Text(f"wrote {output}"), soft_wrap=True)


@app.command()
def bench(
    preset: Annotated[
        str, typer.Option(help="quick (about a minute on a CPU), readme (the published table) or full.")
    ] = "quick",
    device: _Device = None,
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
    with _errors():
        from fused_lora import bench as job

        names = None if candidates is None else [name.strip() for name in candidates.split(",")]
        try:
            job.run(_default_device(device), preset, output, plot, threads, names, budget, train_step, resume)
        except AssertionError as error:  # a candidate whose result is off
            _fail(str(error), 1)
