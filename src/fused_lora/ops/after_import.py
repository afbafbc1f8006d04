"""after_import(): what has to be told to a module that not everybody imports."""

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from typing import Any


def after_import(module: str, call: Callable[[], None]) -> None:
    """Run `call` once the module has been imported: now, or when somebody imports it."""
    if module in sys.modules:
        call()
    else:
        sys.meta_path.insert(0, _AfterImport(module, call))


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds one module as Python does, and runs something after its code."""

    def __init__(self, module: str, call: Callable[[], None]):
        self.module, self.call = module, call

    def find_spec(self, name, path, target=None):
        if name != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)  # by the other finders, of which some may be of this kind
        if spec is None or spec.loader is None:
            return spec
        loader: Any = spec.loader
        execute = loader.exec_module

        def exec_module(module):
            execute(module)
            self.call()

        loader.exec_module = exec_module
        return spec
