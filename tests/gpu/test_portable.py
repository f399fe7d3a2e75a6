"""The portable kernels on a real device: the tests of tests/kernels, and what only a device can show."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.captured import Planned, assert_decode_replays
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
