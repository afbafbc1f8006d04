"""Optimizers for LoRA: what knows that A and B are two factors of one update, and Lion, which a recipe wants."""

from fused_lora.optim.lion import Lion
from fused_lora.optim.lora_fa import create_lorafa_optimizer
from fused_lora.optim.loraplus import create_loraplus_optimizer, lora_param_groups
from fused_lora.optim.pairs import Pair, lora_pairs
from fused_lora.optim.pro import LoRAProAdamW
from fused_lora.optim.riemannian import create_riemannian_optimizer
from fused_lora.optim.rite import LoRARite

__all__ = [
    "Lion",
    "LoRAProAdamW",
    "LoRARite",
    "Pair",
    "create_lorafa_optimizer",
    "create_loraplus_optimizer",
    "create_riemannian_optimizer",
    "lora_pairs",
    "lora_param_groups",
]
