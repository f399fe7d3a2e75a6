"""The MLA benchmark's yardsticks: its count of operations, and the results it compares with."""

from __future__ import annotations

import pytest
import torch

import headway
from headway.bench import mla
from headway.errors import InvalidInputError


def test_operations_are_those_of_visible_pairs() -> None:
    per_pair = 2 * (192 + 128) * 2
    causal = mla.Case("", (3, 1), (3, 5), 2)
    assert causal.flops == per_pair * (1 + 2 + 3 + 5)
    assert mla.Case("", (3,), (5,), 2, causal=False).flops == per_pair * 15


@pytest.mark.parametrize("causal", [False, True])
def test_the_exact_results_are_the_references(causal: bool) -> None:
    case = mla.Case("", (9, 70), (11, 90), 2, causal)
    inputs = mla.Inputs.of(case, torch.device("cpu"))
    out = headway.flash_attn_varlen_func(
        inputs.q.float(),
        inputs.k.float(),
        inputs.v.float(),
        inputs.cu_q,
        inputs.cu_k,
        70,
        90,
        causal=causal,
        backend="reference",
    )
    assert isinstance(out, torch.Tensor)
    torch.testing.assert_close(out[-64:].double(), inputs.exact(), atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(InvalidInputError, match="GPU"):
        mla.command()
