"""One run of the study: a fresh copy of the model trains, and is measured."""

import copy
import datetime
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import study_measures as measures
import torch
from study_plan import SEEDS, SEQ_LEN, Condition, Run
from torch import Tensor, nn

from fused_lora import apply_lora, data
from fused_lora.bench.machine import commit
from fused_lora.finetune.loop import learning_rate
from fused_lora.finetune.optimizers import make_optimizer
from fused_lora.finetune.settings import Settings
from fused_lora.hardware import cpu_name
from fused_lora.jsonl import Document
from fused_lora.schedules import MergeSchedule

ENGLISH = Path(__file__).resolve().with_name("study_english.txt")
MEASURED = {"validation": 1024, "code": 1536, "english": 1024}  # tokens
EVERY = 10  # one in so many of the documents to train on is read
CLIP, WARMUP_SHARE = 1.0, 8  # gradient norm; one step in so many warms up


class Study:
    """The pristine model, the data, and what they say before any training.

    Args:
        model, tokenizer: which no run changes.
        documents: those to train on, and held-out ones, which are dealt out to the choice of rates and the figures.
    """

    def __init__(self, model: Any, tokenizer: Any, documents: tuple[data.Data, data.Data]):
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        model.set_attn_implementation("eager")  # faster than PyTorch's fused one at this length on CPUs
        train, held_out = documents
        english = Document(ENGLISH.name, ENGLISH.read_text(encoding="utf-8"))
        self.train = self._blocks(train[::EVERY])
        texts: dict[str, data.Data] = {"validation": held_out[::2], "code": held_out[1::2], "english": [english]}
        self.texts = {name: data.spread(self._blocks(t), MEASURED[name]) for name, t in texts.items()}
        self.sha = data.fingerprint(self.train, *self.texts.values())[:16]
        self.before = self.losses(model)
        self.before["diversity"] = measures.diversity(model, tokenizer)
        self.weights = {n: model.get_submodule(n).weight.detach().float() for n in measures.watched(model)}
        self.bases: dict[str, Tensor] = {}
        self.commit = commit()  # of what this process has loaded

    def _blocks(self, documents: data.Data) -> Tensor:
        blocks = data.to_blocks(documents, self.tokenizer, SEQ_LEN)
        return blocks[(blocks != data.IGNORED).all(1)]

    def losses(self, model: nn.Module) -> dict[str, float]:
        """By text."""
        return {name: measures.measured_loss(model, blocks) for name, blocks in self.texts.items()}

    def execute(self, run: Run) -> dict[str, Any]:
        """The row of a run, with None for the losses of one that diverged."""
        began = time.perf_counter()
        condition, seed = run.condition, run.seed
        row: dict[str, Any] = dict(condition=condition.name, lr=run.lr, seed=seed, rank=condition.rank)
        row |= dict(alpha=condition.alpha, targets=condition.targets, variant=condition.variant, full=condition.full)
        row |= dict(optimizer=condition.optimizer, batch=condition.batch, steps=condition.steps)
        row |= dict(tokens=condition.steps * condition.batch * SEQ_LEN, merges=list(condition.merges))
        row |= dict(validation=None, code=None, english=None)
        try:
            trained = train(copy.deepcopy(self.model), run, self.train)
            row |= dict(parameters=trained.parameters, training_loss=trained.losses)
            losses = self.losses(trained.model.eval())
            if all(map(math.isfinite, losses.values())):
                row |= losses
                row |= self._closer(trained) if seed != SEEDS[0] else {}
        except (FloatingPointError, torch.linalg.LinAlgError) as error:
            row["diverged"] = str(error)
        row |= {f"{name}_before": value for name, value in self.before.items()}
        row |= dict(seconds=round(time.perf_counter() - began, 1), device=cpu_name(), threads=torch.get_num_threads())
        return row | dict(
            commit=self.commit, date=datetime.date.today().isoformat(), torch=torch.__version__, data=self.sha
        )

    def _closer(self, trained: "Trained") -> dict[str, float]:
        after = measures.tuned_weights(trained.model, trained.kept)
        figures = measures.weight_figures(self.weights, after, self.bases)
        return figures | {"diversity": measures.diversity(trained.model, self.tokenizer)}


class Trained(NamedTuple):
    model: nn.Module
    kept: Mapping[str, Tensor]  # fp32 values of weights by the name of their layer
    parameters: int
    losses: list[float]


def settings_of(condition: Condition, lr: float, seed: int) -> Settings:
    """The condition as the fine-tuning command has it: a constant rate after the warm-up."""
    chosen = dict(rank=condition.rank, alpha=condition.alpha, target_modules=condition.targets)
    chosen |= dict(variant=condition.variant, optimizer=condition.optimizer, dtype="bf16")
    if condition.full:
        chosen = dict(full=True, dtype="fp32")
    warmup = max(1, condition.steps // WARMUP_SHARE)
    return Settings(
        **chosen, lr=lr, seed=seed, steps=condition.steps, warmup=warmup, batch_size=condition.batch, seq_len=SEQ_LEN,
        schedule="constant", max_grad_norm=CLIP,
    )  # fmt: skip


def train(model: nn.Module, run: Run, blocks: Tensor) -> Trained:
    """Train all of a model, or an adapter on it.

    Raises: FloatingPointError for a loss or a gradient that is not finite.
    """
    condition = run.condition
    settings = settings_of(condition, run.lr, run.seed)
    torch.manual_seed(run.seed)
    model.requires_grad_(True) if condition.full else apply_lora(model, settings.lora())
    weights = dict(model.named_parameters()) if condition.full else {}
    masters = {name: nn.Parameter(w.detach().to(torch.float32, copy=True)) for name, w in weights.items()}
    optimizer = make_optimizer(nn.ParameterList(masters.values()) if masters else model, settings)
    trained = [*masters.values()] or [p for p in model.parameters() if p.requires_grad]
    schedule = MergeSchedule.chain(model, condition.merges, warmup=condition.rewarm) if condition.merges else None
    losses = []
    for step in range(condition.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings) * group["initial_lr"] / settings.lr
        numbers = data.shuffled(len(blocks), step * condition.batch, condition.batch, run.seed)
        loss = measures.loss_of(model.train(), blocks[numbers])
        loss.backward()
        losses.append(round(loss.item(), 4))
        for name, master in masters.items():  # AdamW acts on fp32 weights, whose rounding the model computes with
            master.grad, weights[name].grad = weights[name].grad.float(), None
        clip = math.inf if condition.optimizer == "rite" else CLIP  # which clips by itself
        norm = nn.utils.clip_grad_norm_(trained, clip)
        if not (math.isfinite(losses[-1]) and torch.isfinite(norm)):
            raise FloatingPointError(f"step {step + 1}: loss {losses[-1]}, gradient norm {norm.item()}")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if schedule is not None:
            schedule.step(optimizer)
        with torch.no_grad():
            for name, master in masters.items():
                weights[name].copy_(master)
    state = masters if schedule is None else schedule.state_dict()
    kept = {name.removeprefix("weight.").removesuffix(".weight"): t for name, t in state.items()}
    return Trained(model, kept, sum(p.numel() for p in trained), losses)
