"""Import this before SGLang's modules where torchvision cannot be: it has no build for every torch.

SGLang imports it in modules that all others need. Here nothing of it is used, so a module of mocks takes
its place. Raises ImportError where SGLang itself is missing.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from typing import Any
from unittest.mock import MagicMock


class _Mocks(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__version__ = "0.28.0"  # type: ignore[attr-defined]
        module.__getattr__ = _mock  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def _mock(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return MagicMock(name=name)


if importlib.util.find_spec("sglang") is None:
    raise ModuleNotFoundError("No module named 'sglang'", name="sglang")
if importlib.util.find_spec("torchvision") is None:
    sys.meta_path.append(_Mocks())
