"""`fused-lora finetune`: a LoRA adapter for a causal language model on text files, with checkpoints, figures and a
plot.

Into the output directory: adapter_config.json and adapter_model.safetensors (PEFT's format), checkpoint.safetensors,
    metrics.jsonl (a line
a step), loss.png, summary.json.
"""

import json
import math
import platform
import time
from collections.abc import Callable
from importlib import metadata
from io import BytesIO
from pathlib import Path

import torch
from torch import nn

from fused_lora import data
from fused_lora.adapters import apply_lora, peft_format, save_adapter, set_adapter
from fused_lora.files import write_whole
from fused_lora.finetune import checkpoint
from fused_lora.finetune.loop import Run, predicted
from fused_lora.finetune.settings import Settings
from fused_lora.models import DTYPES, load_model, packaged_model

PLOT, SUMMARY = "loss.png", "summary.json"
_OURS = (checkpoint.NAME, checkpoint.METRICS, PLOT, SUMMARY, peft_format.CONFIG_NAME, peft_format.WEIGHTS_NAME)
_PYTHON_PROMPT = 'def read_lines(path):\n    """'


def finetune(
    settings: Settings,
    output: Path,
    resume: bool = False,
    overwrite: bool = False,
    save_every: int = 20,
    eval_every: int = 20,
    prompt: str | None = None,
    say: Callable[[str], None] = print,
    tick: Callable[[dict], None] = lambda row: None,
) -> dict:
    """Train an adapter and write it, its figures and its plot.

    Args:
        settings, output: what decides the numbers; directory for the files that this module's head names, other files
            in it stay.
        resume: go on from the directory's checkpoint; without one the run starts from the beginning.
        overwrite: replace another run's files, once model and data are loaded.
        save_every, eval_every: steps between checkpoints and between held-out losses; 0 is none but at the start and
            the end.
        prompt: start of the sample completion; by default Python code with the default data, else the first held-out
            tokens.
        say, tick: get lines of text, and the row of metrics.jsonl of every step, as it is made.
    Returns: what summary.json holds.
    Raises: ValueError for bad input; OSError naming the file, with the last checkpoint whole.
    """
    began, path = time.perf_counter(), output / checkpoint.NAME
    _check_options(output, resume, overwrite, save_every, eval_every)
    import matplotlib  # noqa: F401  its lack shows here, not after the training

    going_on = resume and path.exists()
    if going_on:  # before anything that takes long; load_checkpoint compares the data too
        before = checkpoint.read_state(path)["settings"]
        checkpoint.check_settings(path, {name: before.get(name) for name in settings.plain()}, settings.plain())
    output.mkdir(parents=True, exist_ok=True)
    train, held_out = data.read(settings.data, settings.eval_data, settings.text_field)
    model, tokenizer = load_model(settings.model or packaged_model(), DTYPES[settings.dtype], settings.device)
    blocks = data.to_blocks(train, tokenizer, settings.seq_len)
    measured = data.spread(data.to_blocks(held_out, tokenizer, settings.seq_len), settings.eval_tokens)
    torch.manual_seed(settings.seed)
    apply_lora(model, settings.rank, settings.alpha, settings.targets(), settings.dropout, settings.rslora)
    say(
        f"{len(train)} documents, {predicted(blocks):,} tokens; held out {len(held_out)}, of which "
        f"{predicted(measured):,} tokens are measured"
    )
    run = Run(settings, output, model.train(), blocks, measured, say, tick)
    if going_on:
        run.restore()
    else:
        for name in _OURS:
            (output / name).unlink(missing_ok=True)
        run.start()
    run.train(save_every, eval_every)
    save_adapter(model, output)
    if prompt is None:
        first = measured[0, :32]
        prompt = tokenizer.decode(first[first != data.IGNORED]) if settings.data else _PYTHON_PROMPT
    summary = _summary(run, prompt, time.perf_counter() - began) | {"completion": complete(model, tokenizer, prompt)}
    set_adapter(model, None)
    summary["completion_of_base"] = complete(model, tokenizer, prompt)
    write_whole({output / PLOT: plot(run.rows)})
    write_whole({output / SUMMARY: (json.dumps(summary, indent=1) + "\n").encode()})
    return summary


def _check_options(output: Path, resume: bool, overwrite: bool, save_every: int, eval_every: int) -> None:
    for name, every in (("save_every", save_every), ("eval_every", eval_every)):
        if every < 0:
            raise ValueError(f"{name} must be an int >= 0; got {every}")
    if resume and overwrite:
        raise ValueError("--resume and --overwrite exclude each other; got both")
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output must be a directory; got the file {output}")
    present = [name for name in _OURS if (output / name).exists()]
    if present and not (resume or overwrite):
        raise ValueError(
            f"--output must hold no other run, or give --resume or --overwrite; got {output} with {', '.join(present)}"
        )


@torch.no_grad()
def complete(model: nn.Module, tokenizer, prompt: str, tokens: int = 48) -> str:
    """The likeliest continuation of a prompt, at most `tokens` tokens; the model is left in eval mode."""
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(model.device)
    inputs.pop("token_type_ids", None)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    out = model.eval().generate(**inputs, do_sample=False, max_new_tokens=tokens, pad_token_id=pad)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _summary(run: Run, prompt: str, seconds: float) -> dict:
    first, steps, last = run.rows[0], run.rows[1:], run.rows[-1]
    tokens, training = sum(row["tokens"] for row in steps), sum(row["seconds"] for row in steps)
    return {
        "perplexity_before": math.exp(min(first["held_out_loss"], 700)),
        "perplexity_after": math.exp(min(last["held_out_loss"], 700)),
        "held_out_tokens": predicted(run.held_out),
        "steps": len(steps),
        "train_tokens": tokens,
        "tokens_per_second": tokens / training,
        "seconds": seconds,
        "settings": run.identity,
        "versions": {
            name: metadata.version(name) for name in ("fused-lora", "torch", "transformers", "peft", "safetensors")
        }
        | {"python": platform.python_version()},
        "prompt": prompt,
    }


def plot(rows: list[dict]) -> bytes:
    """A PNG of the rows of metrics.jsonl: every step's loss, its moving average over a sixth of the run, the held-out
    loss."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps, losses = [row["step"] for row in rows[1:]], [row["loss"] for row in rows[1:]]
    window = max(1, len(losses) // 6)
    average = [sum(losses[max(0, i + 1 - window) : i + 1]) / min(window, i + 1) for i in range(len(losses))]
    measured = [(row["step"], row["held_out_loss"]) for row in rows if "held_out_loss" in row]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(steps, losses, color="#bbbbbb", linewidth=1, label="training, each step")
    axes.plot(steps, average, color="#d7301f", label=f"training, mean of {window} steps")
    axes.plot(*zip(*measured), "o--", color="#2b5c8a", label="held out")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss, nats a token")
    axes.grid(alpha=0.3)
    axes.legend()
    image = BytesIO()
    figure.savefig(image, dpi=130, format="png")
    pyplot.close(figure)
    return image.getvalue()
