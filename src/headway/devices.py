"""What a device is, as far as the choice of a provider depends on it."""

from __future__ import annotations

import contextlib
import functools
import re
from dataclasses import dataclass
from typing import Any, Literal

import torch

from headway.errors import InvalidInputError

Vendor = Literal["nvidia", "amd", "moore-threads", "other"]


@dataclass(frozen=True)
class Device:
    """``kind`` names the architecture as its vendor does: cpu, sm90, gfx950, mp31."""

    vendor: Vendor
    kind: str
    capability: tuple[int, int] = (0, 0)  # compute capability, NVIDIA and Moore Threads

    def __str__(self) -> str:
        return self.kind


def of(device: torch.device) -> Device:
    """What this device is. Asked of the driver once per device index."""
    if device.type not in ("cuda", "musa"):
        return _of(device.type, 0)
    index = device.index
    return _of(device.type, _namespace(device.type).current_device() if index is None else index)


@functools.cache
def _of(device_type: str, index: int) -> Device:
    if device_type == "musa":
        major, minor = _namespace(device_type).get_device_capability(index)
        return Device("moore-threads", f"mp{major}{minor}", (major, minor))
    if device_type != "cuda":
        return Device("other", device_type)
    if torch.version.hip is not None:
        name = torch.cuda.get_device_properties(index).gcnArchName
        return Device("amd", name.partition(":")[0])
    major, minor = torch.cuda.get_device_capability(index)
    return Device("nvidia", f"sm{major}{minor}", (major, minor))


def _namespace(device_type: str) -> Any:
    """``torch.cuda``, or what torch_musa adds beside it."""
    return getattr(torch, device_type)


def choose(name: str) -> torch.device:
    """The device of a name as torch writes it; ``auto`` is the first GPU, or the CPU where there is none.

    Raises:
        InvalidInputError: there is no such device, or torch cannot use it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        wanted = f"auto, cpu or a GPU that is there: torch {torch.__version__} {_gpus()}"
        raise InvalidInputError("device", name, wanted) from error
    return device


def _gpus() -> str:
    if not torch.backends.cuda.is_built():
        return "is built without GPUs"
    return f"sees {torch.cuda.device_count()}"


def use(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make a device the current one of its kind; nothing on devices that have no such notion."""
    if device.type in ("cuda", "musa"):
        return _namespace(device.type).device(device)
    return contextlib.nullcontext()


def toolkit_version() -> tuple[int, ...] | None:
    """The CUDA version that torch was built for, (12, 8); None on other builds."""
    text = torch.version.cuda
    if text is None:
        return None
    return tuple(int(number) for number in re.findall(r"\d+", text)[:2])


def resolved(device: int | str | torch.device | None = None) -> torch.device:
    """A device by name or by index among accelerators; None: the current accelerator, else the CPU."""
    if device is not None and not isinstance(device, int):
        return torch.device(device)
    kind = next((kind for kind in ("cuda", "musa") if _has(kind)), "cpu")
    return torch.device(kind) if device is None or kind == "cpu" else torch.device(kind, device)


def is_present(device: torch.device) -> bool:
    """Whether this build of torch sees such a device at all."""
    return device.type not in ("cuda", "musa") or _has(device.type)


def _has(device_type: str) -> bool:
    namespace = getattr(torch, device_type, None)
    return namespace is not None and namespace.is_available()
