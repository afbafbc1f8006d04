"""after_import(): what has to be told to a module that not everybody imports."""

import importlib.abc
import sys
from collections.abc import Callable
from importlib.machinery import PathFinder
from typing import Any

_waiting: dict[str, list[Callable[[], None]]] = {}  # by the module's name


def after_import(module: str, call: Callable[[], None]) -> None:
    """Run `call` once the module has been imported: now, or when somebody imports it."""
    if module in sys.modules:
        call()
        return
    _waiting.setdefault(module, []).append(call)
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds what is waited for as Python does, as often as somebody asks, who need not import it; and runs the calls
    after its code."""

    def find_spec(self, name, path, target=None):
        if name not in _waiting:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        loader: Any = spec.loader
        execute = loader.exec_module

        def exec_module(module):
            execute(module)
            for call in _waiting.pop(name, ()):
                call()

        loader.exec_module = exec_module
        return spec


_finder = _AfterImport()
