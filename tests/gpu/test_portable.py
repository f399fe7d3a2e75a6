"""The portable kernels on a real device: the tests of tests/kernels, and what only a device can show."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import headway
from tests.kernels.portable_device import DEVICE
from tests.kernels.test_portable_attention import *  # noqa: F403
from tests.kernels.test_portable_attention import long_decode
from tests.kernels.test_portable_schedule import *  # noqa: F403

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SMALL, LARGE = (3, 0, 0, 40), (1500, 7, 333, 640)


def _step(lengths: tuple[int, ...], capacity: int) -> dict[str, Any]:
    """A decode step whose page table has room for ``capacity`` keys of each sequence."""
    kwargs = long_decode(lengths, 16).copy(DEVICE).kwargs
    table = kwargs["page_table"]
    wide = torch.full((len(lengths), capacity // 16), 2147480000, dtype=torch.int32, device=DEVICE)
    wide[:, : table.shape[1]] = table
    return kwargs | {"page_table": wide}


def _expected(kwargs: dict[str, Any]) -> torch.Tensor:
    out = headway.flash_attn_with_kvcache(**kwargs, backend="reference")
    assert isinstance(out, torch.Tensor)
    return out


@pytest.mark.parametrize("planned", [False, True])
def test_a_captured_call_replays_with_other_lengths_and_pages(planned: bool) -> None:
    """Captured while most sequences are empty; replayed with all of them, longer, on other pages."""
    large = _step(LARGE, 2048)
    live = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in large.items()}
    small = _step(SMALL, 2048)
    live["cache_seqlens"].copy_(small["cache_seqlens"])
    live["page_table"].zero_()

    def plan(lengths: torch.Tensor) -> Any:
        return headway.get_scheduler_metadata(
            4, 1, 2048, 6, 2, 64, lengths, page_size=16, causal=True
        )

    schedule = plan(live["cache_seqlens"]) if planned else None

    def call() -> torch.Tensor:
        out = headway.flash_attn_with_kvcache(
            **live, scheduler_metadata=schedule, backend="portable"
        )
        assert isinstance(out, torch.Tensor)
        return out

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for kwargs in (large, _step((9, 1999, 0, 64), 2048), large):
        for name, value in kwargs.items():
            if isinstance(value, torch.Tensor) and value.shape == live[name].shape:
                live[name].copy_(value)
            elif isinstance(value, torch.Tensor):  # another number of pages: put them behind
                pool = live[name]
                pool[: value.shape[0]].copy_(value[: pool.shape[0]])
        if schedule is not None:
            schedule.copy_(plan(live["cache_seqlens"]))
        graph.replay()
        torch.cuda.synchronize()
        torch.testing.assert_close(out, _expected(kwargs), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("dv", [8, 16, 24, 32])
@pytest.mark.parametrize("d", [8, 32, 64])
@pytest.mark.parametrize("float8", [False, True])
def test_narrow_values(d: int, dv: int, float8: bool) -> None:
    """Widths whose tiles are narrower than what tensor cores like."""
    from tests.calls import Call
    from tests.kernels.test_portable_attention import _normal, check

    q, k, v = _normal(1, 2, 150, 4, d), _normal(2, 2, 193, 2, d), _normal(3, 2, 193, 2, dv)
    if float8:
        k, v = k.to(torch.float8_e4m3fn), v.to(torch.float8_e4m3fn)
    check(Call("dense", {"q": q, "k": k, "v": v, "causal": True}, f"{d}/{dv} float8 {float8}"))
