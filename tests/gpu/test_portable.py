"""The portable kernels on a real device: the tests of tests/kernels, and what only a device can show."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import headway
from tests.gpu.captured import Planned, assert_decode_replays
from tests.kernels.portable_device import DEVICE
from tests.kernels.test_portable_attention import *  # noqa: F403
from tests.kernels.test_portable_schedule import *  # noqa: F403

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("planned", [None, "copied", "kept"])
def test_a_captured_call_replays_with_other_lengths_and_pages(planned: Planned) -> None:
    assert_decode_replays("portable", planned)


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


def test_a_compiled_step_appends_in_place_and_merges() -> None:
    """torch.compile with code generation keeps the operators, and what they write in place is there."""
    lengths = torch.tensor([5, 170], dtype=torch.int32, device=DEVICE)
    table = torch.randperm(24, device=DEVICE).to(torch.int32).view(2, 12)

    def step(q: Any, new: Any, k: Any, v: Any) -> Any:
        out, lse = headway.flash_attn_with_kvcache(
            q * 2,
            k,
            v,
            new,
            new + 1,
            cache_seqlens=lengths,
            page_table=table,
            causal=True,
            return_lse=True,
            backend="portable",
        )
        again, lse_again = headway.flash_attn_with_kvcache(
            q,
            k,
            v,
            cache_seqlens=lengths + 1,
            page_table=table,
            return_lse=True,
            backend="portable",
        )
        return headway.merge_states([out, again], [lse, lse_again])

    def inputs() -> tuple[torch.Tensor, ...]:
        generator = torch.Generator().manual_seed(1)
        shapes = ((2, 1, 8, 64), (2, 1, 2, 64), (24, 16, 2, 64), (24, 16, 2, 64))
        made = (torch.randn(shape, generator=generator).bfloat16().to(DEVICE) for shape in shapes)
        return tuple(made)

    mine, theirs = inputs(), inputs()
    got, want = torch.compile(step, fullgraph=True)(*mine), step(*theirs)
    torch.testing.assert_close(got, want)
    assert torch.equal(mine[2], theirs[2])
    assert torch.equal(mine[3], theirs[3])
    assert not torch.equal(mine[2], inputs()[2])
