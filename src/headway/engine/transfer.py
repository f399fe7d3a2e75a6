"""Moving small tensors between host and device without waiting for either.

A plain copy of a tensor in pageable memory waits until everything queued on the device has run. Copies
through pinned memory are queued like kernels; torch's allocator keeps the memory until they are done.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def upload(
    values: np.ndarray | Sequence[object], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The values as a tensor on the device; it may still be on its way, in the order of the stream."""
    tensor = torch.as_tensor(values, dtype=dtype)
    if device.type == "cpu":
        return tensor.clone() if isinstance(values, np.ndarray) else tensor
    if device.type == "meta":  # nothing is computed there, only compiled
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Download:
    """Device tensors on their way to the host. ``wait`` returns them, in order."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._event: torch.cuda.Event | None = None
        self._tensors = list(tensors)
        if not tensors or tensors[0].device.type != "cuda":
            return
        self._tensors = [
            torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True)
            for t in tensors
        ]
        self._event = torch.cuda.Event()
        self._event.record()

    def wait(self) -> list[Tensor]:
        if self._event is not None:
            self._event.synchronize()
        return self._tensors
