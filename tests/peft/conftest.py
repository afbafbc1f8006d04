"""Counts the calls of the op that fused layers make."""

import pytest

from fused_lora.peft import layer


@pytest.fixture
def calls(monkeypatch) -> list[dict]:
    """The keyword arguments of every call of `lora_linear` and `lora_around` from a fused layer; `op` is its name."""
    seen: list[dict] = []

    def counted(name, op):
        def call(*args, **kwargs):
            seen.append(dict(kwargs, op=name))
            return op(*args, **kwargs)

        return call

    for name in ("lora_linear", "lora_around"):
        monkeypatch.setattr(layer, name, counted(name, getattr(layer, name)))
    return seen
