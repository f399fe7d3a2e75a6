"""Tensor parallel: processes that hold a part of every layer each and take the same steps together.

transformers lays the model out, and its modules talk to each other; attention is that of each process's
heads. Every process schedules for itself: told the same things in the same order, they decide alike.
:mod:`headway.engine.lead` is for servers, where one of them is told and the others are not.
"""

from __future__ import annotations

import datetime
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from headway.errors import InvalidInputError

#: Idle processes wait for the next step as long as it takes.
_FOREVER = datetime.timedelta(days=365)


def launched_rank() -> int | None:
    """Which of the processes that torchrun has started this is; None where it has not."""
    return int(os.environ["RANK"]) if "RANK" in os.environ else None


def launch(size: int) -> None:
    """Become torchrun with ``size`` processes of this very command, unless it has started this one."""
    if size == 1 or launched_rank() is not None:
        return
    runner = ["-m", "torch.distributed.run", "--nproc-per-node", str(size), "--module", "headway"]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *runner, *sys.argv[1:]])


def join(size: int, device: torch.device) -> torch.device:
    """Meet the other processes; the device of this one, which becomes the current one.

    Raises:
        InvalidInputError: there are not ``size`` of them.
    """
    if size == 1:
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # where Triton launches, wherever tensors are
        return device
    given = os.environ.get("WORLD_SIZE")
    if given != str(size):
        wanted = f"as many processes: torchrun --nproc-per-node {size} -m headway .."
        raise InvalidInputError("tensor_parallel_size", f"{size} of {given or 1} processes", wanted)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        kind = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(kind, timeout=_FOREVER)
    return device


def rank() -> int:
    """Which of the processes this is; 0 where there is one."""
    return dist.get_rank() if dist.is_initialized() else 0


def agreed(number: int, size: int, device: torch.device) -> int:
    """The least of the processes' numbers."""
    if size == 1:
        return number
    there = torch.tensor([number], dtype=torch.int64, device=device)
    dist.all_reduce(there, dist.ReduceOp.MIN)
    return int(there)


def share(tokens: Tensor) -> Tensor:
    """The first process's tokens, on all of them: what is rounded differently must not part them."""
    dist.broadcast(tokens, 0)
    return tokens


def same(value: Any) -> Any:
    """The first process's value, on all of them, which wait for each other here."""
    if not dist.is_initialized():
        return value
    held = [value]
    dist.broadcast_object_list(held, 0)
    dist.barrier()
    return held[0]


def command_group() -> Any:
    """For messages between hosts, whatever the devices talk through."""
    return dist.new_group(backend="gloo", timeout=_FOREVER)


def local(parameter: Tensor) -> Tensor:
    """This process's part of a parameter."""
    parts: Any = parameter
    return parts.to_local() if hasattr(parts, "to_local") else parameter
