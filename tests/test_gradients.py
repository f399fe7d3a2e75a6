"""Without torch.no_grad calls run as within it, and only a backward pass is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import headway
from headway import InvalidInputError, UnsupportedError


def tensors(trained: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (2, 3, 4, 8), "k": (2, 5, 2, 8), "v": (2, 5, 2, 8), "sinks": (4,)}
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return made | {trained: torch.nn.Parameter(made[trained])}


def shifted(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return score - kv_idx


@pytest.mark.parametrize("more", [{}, {"score_mod": shifted}, {"return_lse": True}])
@pytest.mark.parametrize("trained", ["q", "k", "v", "sinks"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_backward_pass_says_that_there_is_none(
    backend: str, trained: str, more: dict[str, Any]
) -> None:
    given = tensors(trained)
    result = headway.flash_attn_func(**given, **more, backend=backend)
    out = result[0] if isinstance(result, tuple) else result
    with torch.no_grad():
        want = headway.flash_attn_func(**given, **more, backend=backend)
    want = want[0] if isinstance(want, tuple) else want
    assert torch.equal(out, want)
    assert not want.requires_grad
    with pytest.raises(UnsupportedError, match="no gradients"):
        out.sum().backward()


def test_a_cache_that_requires_gradients_is_appended_to() -> None:
    q, k = torch.randn(1, 1, 2, 8), torch.nn.Parameter(torch.zeros(1, 4, 2, 8))
    new = torch.ones(1, 1, 2, 8)
    out = headway.flash_attn_with_kvcache(q, k, k.detach().clone(), new, new, cache_seqlens=2)
    assert (k[0, 2] == 1).all()
    with pytest.raises(UnsupportedError, match="no gradients"):
        out.sum().backward()


def test_out_is_refused_as_torch_refuses_it() -> None:
    given = tensors("q")
    out = torch.empty(2, 3, 4, 8)
    with pytest.raises(InvalidInputError, match=r"^out: .*no_grad"):
        headway.flash_attn_func(**given, out=out)
    with torch.no_grad():
        assert headway.flash_attn_func(**given, out=out) is out
