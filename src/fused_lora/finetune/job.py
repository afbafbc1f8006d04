"""`fused-lora finetune`: a LoRA adapter for a causal language model on text files, with checkpoints, figures and a
plot.

Into the output directory: adapter_config.json and adapter_model.safetensors (PEFT's format), checkpoint.safetensors,
metrics.jsonl (a line a step), summary.json, loss.png. After merges the adapter holds all stages; where the whole model
has trained, it stands in model/ instead of an adapter. Under torchrun or `accelerate launch` the processes train
together and the first one writes; settings, figures and files are those of one process.
"""

import math
import os
import platform
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from importlib import metadata
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fused_lora import data
from fused_lora.adapters import apply_lora, peft_format, save_adapter
from fused_lora.files import check_space, claimed, remove_leftovers, write_json, write_whole
from fused_lora.finetune import checkpoint, processes
from fused_lora.finetune.borders import check_kept_apart
from fused_lora.finetune.loop import Run, predicted
from fused_lora.finetune.settings import Settings
from fused_lora.models import DTYPES, check_name, context_of, is_text, load_model, packaged_model
from fused_lora.nn.layer import LoRALayer
from fused_lora.rows import first_text, inputs_of

PLOT, SUMMARY, WHOLE = "loss.png", "summary.json", "model"
_OURS = (checkpoint.NAME, checkpoint.METRICS, PLOT, SUMMARY, peft_format.CONFIG_NAME, peft_format.WEIGHTS_NAME)
_FIGURES = 2**20  # bytes of the small files, at the most of any run that people wait for
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
        resume: go on from the directory's checkpoint; in a directory without a run the run starts from the beginning.
        overwrite: replace another run's files, once model and data are loaded and the model has run on them.
        save_every, eval_every: steps between checkpoints and between held-out losses; 0 is none but at the start and
            the end.
        prompt: start of the sample completion; by default Python code with the default data, else the first held-out
            tokens.
        say, tick: get lines of text, and the row of metrics.jsonl of every step, as it is made.
    Returns: what summary.json holds.
    Raises: ValueError for bad input; OSError naming the file, with the last checkpoint whole, also if another run is
        at work in the directory.
    """
    began = time.perf_counter()
    _check_options(resume, overwrite, save_every, eval_every, prompt)
    _check_output(output, settings)
    data.check_output((*settings.data, *settings.eval_data), output, _OURS)
    import matplotlib  # noqa: F401  their lack shows here, not after the training
    import transformers  # noqa: F401

    with processes.joined(settings.device), ExitStack() as claim:
        processes.check_shares(settings.batch_size * settings.grad_accum)
        if processes.rank():
            say, tick = (lambda _: None), (lambda _: None)
        going_on = processes.by_first(lambda: _claim(claim, output, settings, resume, overwrite, say))
        model, tokenizer, blocks, measured = _load(settings, say)
        prompt = prompt or _default_prompt(tokenizer, measured, settings, context_of(model))
        of_base = complete(model, tokenizer, prompt)  # shows here whether the prompt and generate() serve
        torch.manual_seed(settings.seed)
        model.requires_grad_(True) if settings.full else apply_lora(model, settings.lora())
        processes.part_ways(settings.seed)
        run = Run(settings, output, model.train(), blocks, measured, say, tick)
        processes.by_first(lambda: _check_space(output, model, settings))
        if going_on:
            run.restore()
        else:
            run.start(output / name for name in _OURS)
        run.train(save_every, eval_every)

        def finish() -> dict:
            _save(run, model, tokenizer, output)
            summary = _summary(run, prompt, time.perf_counter() - began)
            summary |= {"completion": complete(model, tokenizer, prompt), "completion_of_base": of_base}
            write_json(output / SUMMARY, summary)
            write_whole({output / PLOT: plot(run.rows)})
            return summary

        return processes.by_first(finish)


def _claim(claim: ExitStack, output: Path, settings: Settings, resume: bool, overwrite: bool, say) -> bool:
    """Keep the output for this run, and say whether it has a checkpoint to resume from."""
    claim.enter_context(claimed(output, say))
    going_on = _going_on(output, settings, resume, overwrite)
    remove_leftovers(output, _OURS)
    if resume and not going_on:
        say(f"no checkpoint in {output}: the run starts from the beginning")
    return going_on


def _check_options(resume: bool, overwrite: bool, save_every: int, eval_every: int, prompt: str | None) -> None:
    for name, every in (("save_every", save_every), ("eval_every", eval_every)):
        if every < 0:
            raise ValueError(f"{name} must be an int >= 0; got {every}")
    if resume and overwrite:
        raise ValueError("--resume and --overwrite exclude each other; got both")
    if prompt is not None and (not prompt or not is_text(prompt)):
        raise ValueError(f"--prompt must be UTF-8 text that is not empty; got {prompt!r}")


def _check_output(output: Path, settings: Settings) -> None:
    """Raises ValueError if the output cannot be one, or is where the base model lies, which would then be loaded with
    the adapter."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output must be a directory; got the file {output}")
    base = settings.model or packaged_model()
    check_name(base)
    local = Path(base)
    if not local.exists():
        return
    own = os.path.realpath(local if local.is_dir() else local.parent)
    if own == os.path.realpath(output):
        raise ValueError(f"--output must not be the base model's own directory; got {output}")
    if settings.full and own == os.path.realpath(output / WHOLE):
        raise ValueError(f"--full writes {output / WHOLE}, which must not be the base model's own directory")


def _going_on(output: Path, settings: Settings, resume: bool, overwrite: bool) -> bool:
    """Whether there is a checkpoint to resume from.

    Raises: ValueError if the output holds another run that may not be replaced, or one of other settings;
        load_checkpoint compares the data too.
    """
    path, metrics = output / checkpoint.NAME, output / checkpoint.METRICS
    present = [name for name in (*_OURS, *[WHOLE] * settings.full) if (output / name).exists()]
    if present and not (resume or overwrite):
        raise ValueError(
            f"--output must hold no other run, or give --resume or --overwrite; got {output} with {', '.join(present)}"
        )
    if not resume:
        return False
    if path.exists():
        state = checkpoint.read_state(path)
        before = state["settings"]
        checkpoint.check_settings(path, {name: before.get(name) for name in settings.plain()}, settings.plain())
        checkpoint.read_metrics(metrics, state["step"])
        return True
    if present == [checkpoint.METRICS] and len(metrics.read_bytes().splitlines()) <= 1:
        return False  # killed before its first checkpoint
    if present:
        raise ValueError(
            f"--resume needs the checkpoint {path}, which is gone; got {output} with {', '.join(present)}, which "
            "--overwrite would replace"
        )
    return False


def _load(settings: Settings, say: Callable[[str], None]) -> tuple[Any, Any, Tensor, Tensor]:
    """(model, tokenizer, blocks to train on, held-out blocks that are measured)."""
    train, held_out = data.read(settings.data, settings.eval_data, settings.text_field, say)
    model, tokenizer = load_model(settings.model or packaged_model(), DTYPES[settings.dtype], settings.device)
    if settings.packing:
        check_kept_apart(model)
    blocks, measured = (
        data.to_blocks(documents, tokenizer, settings.seq_len, settings.cut, settings.packing)
        for documents in (train, held_out)
    )
    measured = data.spread(measured, settings.eval_tokens)
    known, largest = (
        model.get_input_embeddings().num_embeddings,
        int(max(inputs_of(b).max() for b in (blocks, measured))),
    )
    if largest >= known:
        raise ValueError(f"the tokenizer must be the model's, which knows {known} tokens; got token {largest}")
    say(
        f"{len(train)} documents, {predicted(blocks):,} tokens; held out {len(held_out)}, of which "
        f"{predicted(measured):,} tokens are measured"
    )
    context = context_of(model)
    if context is not None and settings.seq_len > context:
        say(f"blocks of {settings.seq_len} tokens are longer than the model's context of {context}")
    return model, tokenizer, blocks, measured


def _save(run: Run, model: Any, tokenizer: Any, output: Path) -> None:
    """Write what was trained."""
    if run.settings.full:
        model.save_pretrained(output / WHOLE)
        tokenizer.save_pretrained(output / WHOLE)
    elif run.schedule is not None:
        run.schedule.save_stack(output)
    else:
        save_adapter(model, output)


def _check_space(output: Path, model: nn.Module, settings: Settings) -> None:
    """Raises OSError unless the disk has room for what lies there at once: the last checkpoint (values and moments,
    after merges the weights in fp32 and every stage) beside the one that it replaces, what was trained, and figures."""
    every, size = settings.merge_every, checkpoint.bytes_of(checkpoint.kept(model))
    moments = (1 if settings.optimizer == "lion" else 2) * checkpoint.bytes_of(checkpoint.trained(model))
    stages = (settings.steps - 1) // every if every else 0  # a merge after the last step leaves no moments
    layers = [m for m in model.modules() if isinstance(m, LoRALayer)] if 0 < every <= settings.steps else []
    last = (1 + stages) * size + moments + sum(4 * layer.weight.numel() for layer in layers)
    there = sum((output / name).stat().st_size for name in _OURS if (output / name).exists())
    check_space(output, 2 * last + (1 + stages) * size + _FIGURES - there)


def _default_prompt(tokenizer, measured: Tensor, settings: Settings, context: int | None) -> str:
    """The first held-out tokens, of an example those before its answer; Python code where that is the data, and where
    the tokens are no words."""
    before = int((measured[0] >= 0).nonzero()[0])
    first = first_text(measured[0])[: min(before or 32, (context or 64) // 2)]
    words = tokenizer.decode(inputs_of(first[first != data.IGNORED]))
    return words if settings.data and words.strip() else _PYTHON_PROMPT


@torch.no_grad()
def complete(model, tokenizer, prompt: str, tokens: int = 48) -> str:
    """The likeliest continuation of a prompt, at most `tokens` tokens and what the model's context has room for; the
    model is left in eval mode.

    Raises: ValueError for a prompt without a token or beyond the context.
    """
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False, verbose=False).to(model.device)
    inputs.pop("token_type_ids", None)
    length, context = inputs["input_ids"].shape[1], context_of(model) or sys.maxsize
    if not 0 < length < context:
        raise ValueError(f"prompt must have at least one token and less than the model's context; got {length} tokens")
    tokens = min(tokens, context - length)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    out = model.eval().generate(**inputs, do_sample=False, max_new_tokens=tokens, pad_token_id=pad)
    return tokenizer.decode(out[0, length:], skip_special_tokens=True)


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
        "versions": _versions() | {"python": platform.python_version()},
        "prompt": prompt,
    }


def _versions() -> dict[str, str]:
    versions = {}
    for name in ("fused-lora", "torch", "transformers", "peft", "safetensors"):
        with suppress(metadata.PackageNotFoundError):  # peft is not needed
            versions[name] = metadata.version(name)
    return versions


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
