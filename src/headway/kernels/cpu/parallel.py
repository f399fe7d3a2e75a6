"""Runs a compiled function on all threads of torch's own pool.

A second thread pool beside torch's would cost more than it brings: OpenMP threads spin for a while
after each region, so two pools on the same cores take turns waiting for each other. torch's wheels
on Linux carry GNU OpenMP, whose entry point is callable from Python, and the compiled functions
here run on exactly the threads that torch's operators use. Where that entry point is missing
(macOS, Windows) a pool of Python threads takes its place: the functions hold no interpreter lock,
so it works the same with a larger cost per call.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch

_BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@cache
def _openmp_entry() -> Any | None:
    """``GOMP_parallel(function, data, num_threads, flags)`` of the runtime here, or None."""
    try:
        entry = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    entry.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    entry.restype = None
    return entry


@cache
def _thread_pool(num_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_threads, thread_name_prefix="headway-cpu")


@cache
def _callable(function: int) -> Any:
    return _BODY(function)


def run_on_threads(function: int, data: int, num_threads: int) -> None:
    """Call ``function(data)`` once on each of ``num_threads`` threads and wait for all.

    ``function`` is the address of a C function taking one pointer, ``data`` the pointer. The function
    shares out its work by itself and must be correct on one thread: fewer threads than asked for may
    run it.
    """
    if num_threads == 1:
        _callable(function)(data)
        return
    entry = _openmp_entry()
    if entry is not None:
        entry(function, data, num_threads, 0)
        return
    body = _callable(function)
    others = [_thread_pool(num_threads).submit(body, data) for _ in range(num_threads - 1)]
    body(data)
    for other in others:
        other.result()


def thread_count() -> int:
    """Threads that torch's operators use in this thread of the program (``torch.set_num_threads``)."""
    return torch.get_num_threads()
