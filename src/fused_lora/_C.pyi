"""The compiled part (csrc/bindings.cpp): addresses, sizes and strides in, nothing out."""

from typing import Any

def __getattr__(name: str) -> Any: ...
