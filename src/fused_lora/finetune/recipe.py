"""The settings of a recipe for a model that is not loaded yet."""

from pathlib import Path
from typing import Any

from torch import nn

from fused_lora import recipes
from fused_lora.config import unknown_name
from fused_lora.models import base_model, load_config

_RECIPES = ("without-regret", "biderman")


def recipe_values(name: str, values: dict[str, Any]) -> dict[str, Any]:
    """Alpha, target modules, learning rate, schedule, warm-up and optimizer of a recipe.

    Args:
        name: without-regret or biderman.
        values: the run's settings, of which model, rank where it is no default, and steps are read.
    Raises: ValueError for an unknown name; OSError if the model has no configuration.
    """
    if name not in _RECIPES:
        raise unknown_name("--recipe", name, _RECIPES)
    described, steps = _described(base_model(values["model"])), values["steps"]
    if name == "without-regret":
        recipe = recipes.lora_without_regret(described, r=values["rank"], steps=steps)
        warmup = 0
    else:
        recipe = recipes.biderman(described, r=values["rank"])
        warmup = min(round(steps * recipe.training["warmup_ratio"]), steps - 1)
    found = {"alpha": float(recipe.config.lora_alpha), "lr": recipe.lr, "warmup": warmup}
    known = ("schedule", "final_share", "optimizer", "max_grad_norm")
    found |= {key: value for key, value in recipe.training.items() if key in known}
    return found | {"target_modules": "all-linear"}


def _described(model: str | Path) -> nn.Module:
    """A module with the model's configuration and nothing else."""
    described = nn.Module()
    described.config = load_config(model)
    return described
