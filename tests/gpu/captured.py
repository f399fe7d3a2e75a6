"""Calls captured in CUDA graphs and replayed after their inputs have changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

import headway
from headway import providers
from headway.plan import Plan, PlanKey
from tests.kernels.portable_device import DEVICE
from tests.kernels.test_portable_attention import long_decode

SMALL, LARGE = (3, 0, 0, 40), (1500, 7, 333, 640)
CAPACITY = 2048

#: How the plan of a captured call is treated before a replay; None: the call is not planned.
Planned = Literal["copied", "kept", "new step"] | None


def step(lengths: tuple[int, ...], sq: int = 1) -> dict[str, Any]:
    """A decode step whose page table has room for ``CAPACITY`` keys of each sequence."""
    kwargs = long_decode(lengths, 16, sq).copy(DEVICE).kwargs
    table = kwargs["page_table"]
    wide = torch.full((len(lengths), CAPACITY // 16), 2147480000, dtype=torch.int32, device=DEVICE)
    wide[:, : table.shape[1]] = table
    return kwargs | {"page_table": wide}


def plan_of(backend: str, lengths: Tensor, sq: int = 1) -> Plan:
    key = PlanKey(
        device=lengths.device,
        batch_size=4,
        max_seqlen_q=sq,
        max_seqlen_k=CAPACITY,
        num_q_heads=6,
        num_kv_heads=2,
        head_dim=64,
        head_dim_v=64,
        page_size=16,
        causal=True,
        window_left=None,
        window_right=0,
        attention_chunk=0,
    )
    return providers.get(backend).plan(key, lengths)


def captured(call: Callable[[], Tensor], warm: bool = True) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """The call in a graph, and the tensor that replays write."""
    if warm:
        call()
        torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph, out


def replace(live: dict[str, Any], kwargs: dict[str, Any]) -> None:
    """Copy a step into the tensors of a captured call; a smaller page pool goes to the front."""
    for name, value in kwargs.items():
        if isinstance(value, Tensor):
            pool = live[name]
            if value.shape != pool.shape:
                pool = pool[: value.shape[0]]
            pool.copy_(value[: pool.shape[0]])


def assert_decode_replays(backend: str, planned: Planned, sq: int = 1) -> None:
    """Captured while most sequences are empty; replayed with all of them, longer, on other pages."""
    large: dict[str, Any] = step(LARGE, sq)
    live: dict[str, Any] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in large.items()}
    live["cache_seqlens"].copy_(step(SMALL, sq)["cache_seqlens"])
    live["page_table"].zero_()
    plan = None if planned is None else plan_of(backend, live["cache_seqlens"], sq)

    def call() -> Tensor:
        out = headway.flash_attn_with_kvcache(**live, scheduler_metadata=plan, backend=backend)
        assert isinstance(out, Tensor)
        return out

    graph, out = captured(call)
    for kwargs in (large, step((9, 1999, 0, 64), sq), large):
        replace(live, kwargs)
        if plan is not None and planned == "copied":
            plan.copy_(plan_of(backend, live["cache_seqlens"], sq))
        elif plan is not None and planned == "new step":
            plan.new_step()
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        want = headway.flash_attn_with_kvcache(**kwargs, backend="reference")
        torch.testing.assert_close(out, want, atol=2e-2, rtol=2e-2)
        if plan is not None:  # outside the graph, by the same plan
            plan.new_step()
            torch.testing.assert_close(call(), want, atol=2e-2, rtol=2e-2)
