"""Settings that papers have found to work: an adapter's configuration, the learning rate, the optimizer's settings."""

import math
from typing import Any, NamedTuple

from torch import nn

from fused_lora.adapters.experts import experts_per_token
from fused_lora.config import LoraConfig, unknown_name

# Exponents of (2000 / hidden size) by family, and the constants: fits of tinker-cookbook's hyperparam_utils.py.
_POWERS = {"llama": 0.781, "qwen": 0.0775}
_BASE_LR, _OVER_FULL, _OVER_FULL_SHORT, _SHORT = 5e-5, 10.0, 15.0, 100
_BITS_A_PARAMETER = 2.0


class Recipe(NamedTuple):
    """What to hand to `apply_lora`, and what to train with."""

    config: LoraConfig
    lr: float
    training: dict[str, Any]  # names as in the paper: schedule, warmup, optimizer, betas, max_grad_norm, lr_range, …


def recommended_lr(hidden_size: int, family: str, full_ft_lr: float | None = None, steps: int | None = None) -> float:
    """The learning rate of LoRA with lora_alpha = 32 by "LoRA Without Regret".

    Equivalent to ``10 * full_ft_lr``, 15 times in runs of fewer than 100 steps, where full fine-tuning's own best is
    known; else with ``5e-5 * (2000 / hidden_size) ** power`` in its place, power being 0.781 for "llama" and 0.0775 for
    "qwen".

    Args:
        hidden_size: of the model.
        family: "llama" or "qwen"; only read where full_ft_lr is None.
        full_ft_lr: the best learning rate of full fine-tuning.
        steps: of the run.
    Raises: ValueError naming the argument.
    Source: Schulman and Thinking Machines, LoRA Without Regret, 2025; fits over 14 models, good to a factor of 2.
    """
    for name, value in (("hidden_size", hidden_size), ("full_ft_lr", full_ft_lr), ("steps", steps)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be a finite number > 0; got {value!r}")
    factor = _OVER_FULL_SHORT if steps is not None and steps < _SHORT else _OVER_FULL
    if full_ft_lr is not None:
        return factor * full_ft_lr
    if family not in _POWERS:
        raise unknown_name("family", family, _POWERS)
    return factor * _BASE_LR * (2000 / hidden_size) ** _POWERS[family]


def lora_capacity(parameters: int, tokens: int = 0, episodes: int = 0) -> float:
    """How many times the bits that an adapter holds are the bits that its data can teach: below 1 it is too small.

    Equivalent to ``2 * parameters / (tokens + episodes)``: two bits a parameter, one bit a token of supervised data,
    one bit an episode of reinforcement learning.

    Args: parameters that train; tokens that are predicted, and episodes, of the whole data set.
    Raises: ValueError for numbers below 0, or no data.
    Source: LoRA Without Regret; rules of thumb.
    """
    if parameters < 0 or tokens < 0 or episodes < 0 or not tokens + episodes:
        raise ValueError(
            f"parameters, tokens and episodes must be >= 0, with data; got {parameters}, {tokens}, {episodes}"
        )
    return _BITS_A_PARAMETER * parameters / (tokens + episodes)


def lora_without_regret(
    model: nn.Module, r: int = 32, full_ft_lr: float | None = None, steps: int | None = None
) -> Recipe:
    """lora_alpha = 32 at every rank, all layers, one constant learning rate.

    In a mixture of experts with fused expert weights each expert gets its own adapter of rank r / n_active, at least 1,
    which keeps the share of parameters that trains for a token.

    Args:
        model: a causal language model of transformers.
        r: the rank.
        full_ft_lr, steps: as in `recommended_lr`; a family without a fit gets Llama's, and needs a sweep around it.
    Raises: ValueError as `recommended_lr`.
    Source: Schulman and Thinking Machines, LoRA Without Regret, 2025.
    """
    text: Any = _text_config(model)
    family = "qwen" if "qwen" in str(text.model_type) else "llama"
    lr = recommended_lr(text.hidden_size, family, full_ft_lr, steps)
    active = experts_per_token(model) or 1
    experts = sorted({name.rpartition(".")[2] for name, p in model.named_parameters() if _is_of_experts(name, p)})
    ranks = {rf".*experts\.{name}": max(1, r // active) for name in experts}
    config = LoraConfig(
        r=r,
        lora_alpha=32,
        target_modules="all-linear",
        target_parameters=[f"experts.{name}" for name in experts],
        rank_pattern=ranks,
        alpha_pattern=dict.fromkeys(ranks, 32),  # "all-linear" would double that of two layers in one parameter
    )
    return Recipe(config, lr, {"schedule": "constant", "warmup": 0, "optimizer": "adamw"})


def biderman(model: nn.Module, r: int = 256, full_ft_lr: float | None = None) -> Recipe:
    """lora_alpha = 2 r, all linear layers of attention and MLP, the highest stable learning rate of a sweep.

    Args:
        model: a causal language model of transformers; its configuration changes nothing.
        r: 16, 64 or 256 in the paper, 256 where memory allows.
        full_ft_lr: the best learning rate of full fine-tuning; LoRA's starts at ten times that, else at the paper's
            2e-4, at r = 256 1e-4.
    Source: Biderman et al., LoRA Learns Less and Forgets Less, arXiv 2405.09673, instruction tuning.
    """
    _text_config(model)
    lr = 10 * full_ft_lr if full_ft_lr is not None else 1e-4 if r >= 256 else 2e-4
    training = {"schedule": "cosine", "final_share": 0.01, "warmup_ratio": 0.1, "max_grad_norm": 1.0}
    training |= {"optimizer": "lion", "betas": (0.9, 0.95), "lr_range": (1e-5, 5e-4)}
    return Recipe(LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear"), lr, training)


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        raise ValueError(f"model must be a model of transformers with a configuration; got {type(model).__name__}")
    return config.get_text_config()


def _is_of_experts(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter holds the weights of all experts in one tensor."""
    return parameter.dim() == 3 and ".experts." in name
