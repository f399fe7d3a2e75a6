"""Packages that stand in for the ones providers call: the same signatures, computed with the reference.

Each folder is what pip would put on the path. A stand-in checks what it is handed as strictly as the
package does, refuses what the package would read as something else, leaves NaN where the package leaves
memory uninitialised, and records its calls in :data:`CALLS`.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from headway import devices, dispatch
from headway.devices import Device

HERE = Path(__file__).parent
_MODULES = {
    "aiter",
    "fa3_fwd_interface",
    "flash_attn",
    "flash_attn_interface",
    "flashinfer",
    "mate",
    "sgl_kernel",
    "vllm",
}

#: (function, arguments) of every call of a stand-in, in order.
CALLS: list[tuple[str, dict[str, Any]]] = []
_LOCK = threading.Lock()

DEVICES = {
    "sm80": Device("nvidia", "sm80", (8, 0)),
    "sm90": Device("nvidia", "sm90", (9, 0)),
    "sm100": Device("nvidia", "sm100", (10, 0)),
    "sm120": Device("nvidia", "sm120", (12, 0)),
    "gfx942": Device("amd", "gfx942"),
    "gfx950": Device("amd", "gfx950"),
    "mp31": Device("moore-threads", "mp31", (3, 1)),
    "cpu": Device("other", "cpu"),
}


def record(function: str, arguments: dict[str, Any]) -> None:
    with _LOCK:
        CALLS.append((function, arguments))


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="stand-ins-")


@functools.cache
def _folder(package: str) -> Path:
    """What pip would put on the path. ``fa4_public``: FlashAttention 4 with another inner function."""
    if package != "fa4_public":
        return HERE / package
    folder = Path(_scratch().name) / package
    shutil.copytree(HERE / "fa4", folder, ignore=shutil.ignore_patterns("__pycache__"))
    source = folder / "flash_attn" / "cute" / "interface.py"
    text = source.read_text().replace("fa4._flash_attn_fwd", "fa4.public")
    source.write_text(text.replace("_flash_attn_fwd", "_forward"))
    return folder


@contextlib.contextmanager
def installed(kind: str, *packages: str) -> Iterator[None]:
    """Inside, every device is of this kind, and these stand-ins (folders) are installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "of", lambda device: DEVICES[kind])
        others = [path for path in sys.path if not path.startswith(str(HERE))]
        patch.setattr(sys, "path", [str(_folder(package)) for package in packages] + others)
        _unload()
        CALLS.clear()
        yield
        _unload()
    _unload()


def _unload() -> None:
    """Forget the stand-ins that were imported, and what providers found."""
    for name in list(sys.modules):
        if name.partition(".")[0] in _MODULES:
            del sys.modules[name]
    dispatch.forget()
