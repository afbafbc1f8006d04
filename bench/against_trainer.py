"""The loss curve of `fused-lora finetune` beside that of PEFT in transformers' Trainer: SmolLM2-135M, R=16 on all
linears, fp32, on what installed Python packages say of themselves, which is no text of the package.

The same start, blocks and settings for both. What a curve differs by from one random start to another is shown by
Trainer from another A.

Usage: python bench/against_trainer.py [STEPS] [TOKENS]
"""

import sys
import tempfile
from importlib import metadata
from pathlib import Path

import torch

from fused_lora import apply_lora, data, save_adapter
from fused_lora.finetune import job
from fused_lora.finetune.settings import Settings
from fused_lora.models import load_bare_model, load_model, packaged_model

Curve = list[float]


def write_texts(directory: Path) -> None:
    """A file for each installed package: its README, where its metadata hold one."""
    for package in metadata.distributions():
        text = package.metadata.get_payload()
        if isinstance(text, str) and len(text) > 500:
            (directory / f"{package.metadata['Name']}.txt").write_text(text)


def write_starts(settings: Settings, directory: Path) -> list[Path]:
    """The adapter before the first step, the run's and one of other random numbers."""
    model, starts = load_bare_model(packaged_model(), torch.float32, "cpu"), []
    for seed in (settings.seed, settings.seed + 1):
        torch.manual_seed(seed)
        apply_lora(model, settings.lora(), adapter_name=f"start{seed}")
        starts.append(directory / f"start{seed}")
        save_adapter(model, starts[-1], f"start{seed}")
    return starts


def ours(settings: Settings, directory: Path) -> Curve:
    """What the command does."""
    rows: list[dict] = []
    job.finetune(settings, directory / "ours", save_every=0, eval_every=0, tick=rows.append)
    return [row["loss"] for row in rows]


def theirs(settings: Settings, start: Path, directory: Path) -> Curve:
    """PEFT and Trainer over the run's blocks in the run's order."""
    from peft import PeftModel
    from transformers import Trainer, TrainingArguments

    model, tokenizer = load_model(packaged_model(), torch.float32, "cpu")
    train, _ = data.read(settings.data, (), settings.text_field)
    blocks = data.to_blocks(train, tokenizer, settings.seq_len)
    order = data.shuffled(len(blocks), 0, settings.steps * settings.batch_size, settings.seed)
    arguments = TrainingArguments(
        str(directory / "trainer"),
        learning_rate=settings.lr,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        lr_scheduler_type=settings.schedule,
        max_grad_norm=settings.max_grad_norm,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    peft = PeftModel.from_pretrained(model, start, is_trainable=True)
    rows = [{"input_ids": block, "labels": block} for block in blocks[order]]
    trainer = Trainer(peft, arguments, train_dataset=rows)
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "grad_norm" in row]


def main(steps: int = 30, tokens: int = 128) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "texts").mkdir()
        write_texts(directory / "texts")
        settings = Settings(
            data=(str(directory / "texts"),), steps=steps, seq_len=tokens, batch_size=1, warmup=0, eval_tokens=tokens
        )
        starts = write_starts(settings, directory)
        curves = [ours(settings, directory), *(theirs(settings, start, directory) for start in starts)]
    print("step  finetune  PEFT + Trainer  from another A")
    for step, losses in enumerate(zip(*curves, strict=True), 1):
        print(f"{step:4}  {losses[0]:8.4f}  {losses[1]:14.4f}  {losses[2]:14.4f}")
    own, same, other = map(torch.tensor, curves)
    print(f"largest difference to PEFT + Trainer {(own - same).abs().max():.2g}, of Trainer's two starts ", end="")
    print(
        f"{(same - other).abs().max():.2g}; loss {same[0]:.3f} at first, mean of the last five {same[-5:].mean():.3f}"
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
