"""fused-lora finetune: options, progress and the summary that people see."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from fused_lora.cli.console import Device, Dtype, Model, default_device, errors, given, out, printable, say
from fused_lora.finetune.settings import Settings


def finetune(
    context: typer.Context,
    model: Model = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Text or JSONL file or directory, may be repeated; default: Python's own sources."),
    ] = None,
    eval_data: Annotated[
        list[str] | None, typer.Option(help="The same, held out; default: a twentieth of the data's files or lines.")
    ] = None,
    text_field: Annotated[
        str,
        typer.Option(
            help="Field of a JSONL line that holds its text; lines without it are a prompt and a completion, or "
            "messages, and only the answers are learned."
        ),
    ] = Settings.text_field,
    cut: Annotated[
        bool, typer.Option("--cut", help="Cut examples that are longer than --seq-len, rather than refuse them.")
    ] = Settings.cut,
    packing: Annotated[
        bool,
        typer.Option(
            "--packing/--no-packing",
            help="Fill blocks with several documents or examples, none of which sees another. Without it documents "
            "follow each other in one row and an example is a row.",
        ),
    ] = Settings.packing,
    output: Annotated[
        str, typer.Option(help="Directory for the adapter, its figures and checkpoint.")
    ] = "fused-lora-finetune",
    rank: Annotated[int, typer.Option(help="Rank of the update.")] = Settings.rank,
    alpha: Annotated[
        float, typer.Option(help="The update is scaled by alpha / rank; by 1 with --variant allora.")
    ] = Settings.alpha,
    dropout: Annotated[float, typer.Option(help="Dropout on the low-rank path, in [0, 1).")] = Settings.dropout,
    target_modules: Annotated[
        str, typer.Option(help="all-linear, names with commas between, or a regular expression.")
    ] = Settings.target_modules,
    rslora: Annotated[bool, typer.Option("--rslora", help="Scale by alpha / sqrt(rank).")] = Settings.rslora,
    variant: Annotated[str, typer.Option(help="lora, rslora, dora or allora.")] = Settings.variant,
    allora_eta: Annotated[float, typer.Option(help="Of --variant allora, which has no alpha.")] = Settings.allora_eta,
    allora_mode: Annotated[
        str, typer.Option(help="Of --variant allora: gradient, the paper's, or update, ours.")
    ] = Settings.allora_mode,
    full: Annotated[bool, typer.Option("--full", help="Train the whole model, without an adapter.")] = Settings.full,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="without-regret or biderman: alpha, layers, learning rate, schedule and optimizer where not given."
        ),
    ] = None,
    optimizer: Annotated[
        str, typer.Option(help="adamw, loraplus, rite, pro, riemannian, lora-fa or lion.")
    ] = Settings.optimizer,
    merge_every: Annotated[
        int, typer.Option(help="Steps between merges into the weights, each with a fresh adapter after it; 0: none.")
    ] = Settings.merge_every,
    schedule: Annotated[str, typer.Option(help="cosine, linear or constant after the warm-up.")] = Settings.schedule,
    final_share: Annotated[
        float, typer.Option(help="Of the peak learning rate, to which cosine and linear fall.")
    ] = Settings.final_share,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = Settings.lr,
    warmup: Annotated[
        int | None, typer.Option(help="Steps of linear warm-up; default: 5, or half of --steps under 10.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = Settings.steps,
    batch_size: Annotated[
        int, typer.Option(help="Blocks or examples in a forward and backward pass.")
    ] = Settings.batch_size,
    grad_accum: Annotated[int, typer.Option(help="Passes in an optimizer step.")] = Settings.grad_accum,
    seq_len: Annotated[int, typer.Option(help="Tokens in a block; what an example may have.")] = Settings.seq_len,
    max_grad_norm: Annotated[
        float, typer.Option(help="Gradients are clipped to this norm; 0 does not clip.")
    ] = Settings.max_grad_norm,
    weight_decay: Annotated[float, typer.Option(help="The optimizer's.")] = Settings.weight_decay,
    seed: Annotated[
        int, typer.Option(help="Of the adapter's start, dropout and the order of the data.")
    ] = Settings.seed,
    dtype: Dtype = Settings.dtype,
    device: Device = None,
    eval_tokens: Annotated[
        int,
        typer.Option(
            help="Held-out tokens that the perplexity is of, in whole blocks: as many as fit, one at the least."
        ),
    ] = Settings.eval_tokens,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints; 0: only at the start and the end.")] = 20,
    eval_every: Annotated[
        int, typer.Option(help="Steps between held-out losses; 0: only at the start and the end.")
    ] = 20,
    prompt: Annotated[str | None, typer.Option(help="Start of the sample completion.")] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue from the output's checkpoint, bit for bit; begin where it has none."),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run that the output holds.")] = False,
) -> None:
    """Train a LoRA adapter on text; perplexity on held-out text before and after.

    The defaults take a few minutes on two CPU cores. Under torchrun or accelerate launch the processes share each
    step's blocks, and the run is the one that a single process makes.
    """
    options = locals()
    with errors():
        given(model=model, output=output)
        from fused_lora.finetune import job, processes

        out.quiet = processes.launched()[0] > 0  # one of several speaks

        values = {field.name: options[field.name] for field in dataclasses.fields(Settings)}
        values |= {"data": tuple(data or ()), "eval_data": tuple(eval_data or ()), "device": default_device(device)}
        values["model"] = model or ""
        if recipe is not None:
            from fused_lora.finetune.recipe import recipe_values

            if full:
                raise ValueError(f"--full and --recipe {recipe}, whose learning rate is LoRA's, exclude each other")

            sources = {name: context.get_parameter_source(name) for name in values}
            chosen = {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
            if "schedule" in chosen:  # whose end the recipe does not know
                chosen.add("final_share")
            values |= {name: v for name, v in recipe_values(recipe, values).items() if name not in chosen}
        settings = Settings(**values)
        directory = Path(output)
        with _progress(settings.steps) as tick:
            summary = job.finetune(settings, directory, resume, overwrite, save_every, eval_every, prompt, say, tick)
        _print_summary(summary, output)


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
    with Progress(*columns, console=out, disable=not out.is_terminal) as bar:
        task = bar.add_task("training", total=steps, figures="", start=False)

        def tick(row: dict) -> None:
            line = text.format(steps=steps, rate=row["tokens"] / row["seconds"], **row)
            if not bar.disable and not bar.tasks[0].started:
                bar.start_task(task)
            bar.update(task, completed=row["step"], figures=line.split("  ", 1)[1])
            if bar.disable and (row["step"] % max(1, steps // 10) == 0 or row["step"] == 1):
                out.print(line)

        yield tick


def _print_summary(summary: dict, output: str) -> None:
    full = summary["settings"]["full"]
    for title, key in (
        ("the base model", "completion_of_base"),
        ("trained in full" if full else "with the adapter", "completion"),
    ):
        text = Text.assemble((printable(summary["prompt"]), "dim"), printable(summary[key]))
        out.print(Panel(text, title=f"completion, {title}", title_align="left"))
    before, after = summary["perplexity_before"], summary["perplexity_after"]
    out.print(
        f"held-out perplexity [bold]{before:.3f} -> {after:.3f}[/] ({summary['held_out_tokens']:,} tokens); "
        f"{summary['steps']} steps, {summary['train_tokens']:,} tokens at {summary['tokens_per_second']:.0f} tokens/s, "
        f"{summary['seconds']:.0f} s",
        soft_wrap=True,
    )
    what = "model/" if full else "adapter"
    say(f"{what}, metrics.jsonl, loss.png and summary.json are in {output}")
