"""Float8 keys and values as 16-bit ones: what queries may see, where it was, and nothing else."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from headway.kernels.hopper import widen
from headway.problem import KVLayout, Problem, key_ends, query_lengths
from headway.reference import kv_rows
from tests.calls import Call, calls
from tests.kernels.portable_device import DEVICE, requires_device

pytestmark = requires_device

FLOAT8 = torch.float8_e4m3fn
UNWRITTEN = 1234.0


@pytest.fixture
def marked(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory holds a number that float8 has not."""

    def empty(shape: tuple[int, ...], **how: Any) -> Tensor:
        return torch.full(shape, UNWRITTEN, **how)

    monkeypatch.setattr(widen, "torch", SimpleNamespace(empty=empty, float32=torch.float32))


def in_float8(call: Call) -> Problem:
    call = call.copy(DEVICE)
    for name in ("k", "v", "k_cache", "v_cache"):
        given = call.kwargs.get(name)
        if given is not None and not (name in "kv" and "k_cache" in call.kwargs):
            call.kwargs[name] = given.to(FLOAT8)
    return call.problem()


def first_needed(p: Problem, b: int, end: int) -> int:
    """The first key that a query of a sequence sees, of those behind the padding."""
    position = end - int(query_lengths(p)[b])
    lo = 0
    if p.mask.window_left is not None:
        lo = position - p.mask.window_left
    if p.mask.attention_chunk:
        lo = max(lo, max(position, 0) // p.mask.attention_chunk * p.mask.attention_chunk)
    return max(lo, 0)


def check(p: Problem, dtype: torch.dtype) -> None:
    wide = widen.widen(p, dtype)
    ends = key_ends(p).tolist()
    ragged = p.kv_layout is KVLayout.RAGGED
    for source, copy in ((p.k, wide.k), (p.v, wide.v)):
        assert copy.is_contiguous()
        assert copy.dtype == dtype
        if ragged:
            torch.testing.assert_close(
                copy.double(), source.double(), rtol=0, atol=0, equal_nan=DEVICE == "cuda"
            )
            continue
        for b, end in enumerate(ends):
            pad = 0 if p.leftpad_k is None else int(p.leftpad_k[b])
            rows = kv_rows(p, source, b)
            lo = pad + first_needed(p, b, end - pad)
            torch.testing.assert_close(
                copy[b, lo:end].double(), rows[lo:end].double(), rtol=0, atol=0
            )
            assert (copy[b, end:] == UNWRITTEN).all()
            block = widen.BLOCK_KEYS.value
            begin = pad + max(lo - pad - block, 0)
            assert (copy[b, : min(begin, end)] == UNWRITTEN).all()
            seen = copy[b, begin:end]
            torch.testing.assert_close(
                seen.double(), rows[begin:end].double(), rtol=0, atol=0, equal_nan=True
            )
    given = p.descales.k, p.descales.v
    assert (wide.descales is None) == (given == (None, None))
    if wide.descales is not None:
        ones = torch.ones(p.batch_size, p.num_kv_heads, device=p.device)
        want = torch.stack([ones if t is None else t for t in given], -1)
        torch.testing.assert_close(wide.descales, want, rtol=0, atol=0)


@pytest.mark.usefixtures("marked")
def test_any_call() -> None:
    """Every layout, page size and length, with padding, windows, chunks and rows of other batches. What
    poison is written of ragged rows is behind the last sequence."""

    @settings(
        max_examples=40 if DEVICE == "cpu" else 12,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(
        call=calls(
            (torch.bfloat16, torch.float16),
            head_dims=(16, 48, 64, 96),
            mods=False,
            qv=False,
            float8=False,
        )
    )
    def matches(call: Call) -> None:
        p = in_float8(call)
        if p.kv_layout is KVLayout.RAGGED:
            used = int(call.kwargs["cu_seqlens_k"][-1])
            p.k[used:], p.v[used:] = 0, 0
        if p.k.numel():
            check(p, p.q.dtype)

    matches()


def cached(queries: int, keys: int, page_size: int = 64, **more: Any) -> Call:
    """Two sequences, the first of one key less and in other pages; what they do not own is NaN."""
    pages = -(-keys // page_size)
    generator = torch.Generator().manual_seed(keys)
    k, v = (torch.randn(2 * pages, page_size, 2, 16, generator=generator) for _ in range(2))
    lengths = torch.tensor([keys - 1, keys], dtype=torch.int32)
    table = torch.arange(2 * pages, dtype=torch.int32).flip(0).view(2, pages)
    for b, n in enumerate(lengths.tolist()):
        k[table[b, -1].long(), n - (pages - 1) * page_size :] = float("nan")
    kwargs: dict[str, Any] = {
        "q": torch.randn(2, queries, 4, 16, generator=generator).bfloat16(),
        "k_cache": k,
        "v_cache": v,
        "page_table": table,
        "cache_seqlens": lengths,
        "causal": True,
    }
    return Call("kvcache", kwargs | more, f"{queries} over {keys}")


@pytest.mark.usefixtures("marked")
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"window_size": (20, 0)},
        {"window_size": (20, 5), "causal": False},
        {"attention_chunk": 100},
        {"cache_leftpad": torch.tensor([37, 150], dtype=torch.int32), "window_size": (20, 0)},
    ],
    ids=lambda x: "-".join(x) or "plain",
)
@pytest.mark.parametrize("page_size", [1, 24, 256])
def test_far_keys_are_left_out(page_size: int, more: dict[str, Any]) -> None:
    check(in_float8(cached(30, 500, page_size, **more)), torch.bfloat16)


@pytest.mark.usefixtures("marked")
@pytest.mark.parametrize("names", ["k", "v", "kv"])
def test_descales_of_any_strides(names: str) -> None:
    for scales in (torch.rand(2, 2), torch.rand(2).expand(2, 2), torch.rand(1, 1).expand(2, 2)):
        given = {f"{name}_descale": scales.to(DEVICE) for name in names}
        call = cached(30, 100)
        for name in ("k_cache", "v_cache"):
            call.kwargs[name] = call.kwargs[name].to(FLOAT8)
        call.kwargs |= given
        check(call.copy(DEVICE).problem(), torch.float16)


def test_every_number_is_exact() -> None:
    """All 254 of them; under the interpreter, which converts bits, what is no number is one."""
    bits = torch.arange(256, dtype=torch.uint8)
    numbers = bits[bits & 0x7F != 0x7F].view(FLOAT8)
    k = torch.zeros(1, 16, 1, 16).to(FLOAT8)
    k.view(torch.uint8).view(-1)[: len(numbers)] = numbers.view(torch.uint8)
    for dtype in (torch.bfloat16, torch.float16):
        q = torch.randn(1, 16, 1, 16).to(dtype)
        wide = widen.widen(Call("dense", {"q": q, "k": k, "v": k}).copy(DEVICE).problem(), dtype)
        assert torch.equal(wide.k.double().cpu(), k.double())
        assert torch.equal(wide.v.double().cpu(), k.double())


def chunk(
    new: int, context: int, batch: int = 1, heads: tuple[int, int] = (16, 8), **more: Any
) -> Problem:
    """New tokens behind a cached beginning, in pages of 16, as tensors without memory."""
    pages = -(-(context + new) // 16)

    def meta(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    cache = meta(9, 16, heads[1], 128, dtype=FLOAT8)
    kwargs: dict[str, Any] = {
        "q": meta(batch * new, heads[0], 128, dtype=torch.bfloat16),
        "k": cache,
        "v": cache,
        "cu_seqlens_q": meta(batch + 1),
        "seqused_k": meta(batch),
        "page_table": meta(batch, pages),
        "max_seqlen_q": new,
        "max_seqlen_k": context + new,
        "causal": True,
    }
    return Call("varlen", kwargs | more).problem()


@pytest.mark.parametrize(
    ("batch_size", "keys", "at_once"),
    [(16, 8192, 16), (17, 8192, 12), (64, 8192, 16), (4, 40000, 2), (3, 40000, 3), (1, 131073, 0)],
)
def test_as_many_sequences_at_once_as_there_is_room_for(
    batch_size: int, keys: int, at_once: int
) -> None:
    assert widen.sequences_at_once(chunk(keys, 0, batch_size)) == at_once


@pytest.mark.parametrize(
    ("problem", "against"),
    [
        (chunk(8000, 0, 2), None),
        (chunk(1000, 0, 16), None),
        (chunk(2048, 30000), None),
        (chunk(512, 8192, 8), None),
        (chunk(64, 8192, 8), "128 queries and heads to a key"),
        (chunk(16, 131056), "32 queries and heads to a key"),
        (chunk(128, 32000), "256 queries and heads to a key"),
        (chunk(256, 32000), None),
        (chunk(128, 0, 64), "256 queries and heads to a key"),
        (chunk(128, 0, 16, (32, 8)), None),
        (chunk(256, 0, 64), None),
        (chunk(2048, 0, window_size=(63, 0)), "256 queries and heads to a key"),
        (chunk(2048, 0, window_size=(127, 0)), None),
        (chunk(2048, 0, window_size=(1023, 0)), None),
        (chunk(2048, 0, attention_chunk=64), "256 queries and heads to a key"),
        (chunk(2048, 131072), "16-bit copies of the keys and values would take more than 512 MiB"),
        (chunk(2048, 32768, 16), None),
        (
            chunk(2048, 32768, 16, mask_mod=lambda b, h, i, j: i >= j),
            "score_mod and mask_mod know all 16 sequences, of which 3 fit",
        ),
    ],
    ids=lambda x: "" if isinstance(x, Problem) else str(x)[:12],
)
def test_what_is_better_not_widened(problem: Problem, against: str | None) -> None:
    reason = widen.reason_against(problem)
    if against is None:
        assert reason is None
    else:
        assert reason is not None
        assert against in reason
