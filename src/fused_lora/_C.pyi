"""The compiled part (csrc/bindings.cpp): kernels that write into their arguments."""

from typing import Any

def __getattr__(name: str) -> Any: ...
