"""Schedules that fold LoRA into the weights while it trains: PeriodicLoRA, Chain of LoRA, ReLoRA."""

from fused_lora.schedules.merge_schedule import MergeSchedule

__all__ = ["MergeSchedule"]
