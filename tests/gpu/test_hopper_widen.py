"""Prefill of 16-bit queries over float8 keys on Hopper: widened, and given to the forward kernel."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import hypothesis
import pytest
import torch
from torch import Tensor

import headway
from headway import providers
from headway.kernels.hopper import widen
from headway.providers import base, hopper
from tests import calls
from tests.calls import Call
from tests.gpu.captured import captured
from tests.kernels.portable_device import DEVICE, EXAMPLES
from tests.providers import honoured

FLOAT8 = torch.float8_e4m3fn


def _absent() -> str | None:
    if not torch.cuda.is_available():
        return "needs a GPU"
    return providers.get("hopper").unavailable(torch.device(DEVICE))


pytestmark = pytest.mark.skipif(_absent() is not None, reason=str(_absent()))


@pytest.fixture(autouse=True)
def _small_calls_are_widened_too(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without LEAST_QUERIES, and into memory that is NaN before it is written."""

    def empty(shape: tuple[int, ...], **how: Any) -> Tensor:
        return torch.full(shape, float("nan"), **how)

    monkeypatch.setattr(widen, "LEAST_QUERIES", 0)
    monkeypatch.setattr(widen, "torch", SimpleNamespace(empty=empty, float32=torch.float32))
    base.forget()
    yield
    base.forget()


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def in_float8(call: Call) -> Call:
    """The call over float8 keys and values, new ones aside, with descales of every sequence and head."""
    call = call.copy()
    names = ("k_cache", "v_cache") if "k_cache" in call.kwargs else ("k", "v")
    for name in names:
        call.kwargs[name] = call.kwargs[name].to(FLOAT8)
    p = call.problem()
    generator = torch.Generator().manual_seed(p.batch_size)
    for name in ("k_descale", "v_descale"):
        drawn = torch.rand(p.batch_size, p.num_kv_heads, generator=generator)
        call.kwargs[name] = 2 ** (4 * drawn - 3)
    return call


def must_run(call: Call) -> None:
    problem = call.copy(DEVICE).problem()
    assert hopper.work_of(problem) == "prefill"
    assert "widened" in hopper.PROVIDER.note(problem)
    assert honoured.honoured_or_refused(call, "hopper", DEVICE), call.label


def test_any_call() -> None:
    """Every feature of small calls, drawn together: few, for each compiles a kernel of its own."""

    @hypothesis.settings(
        max_examples=max(EXAMPLES // 40, 2),
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(
        call=calls.calls(
            (torch.bfloat16, torch.float16),
            head_dims=(64, 128),
            page_sizes=(1, 7, 16, 128),
            max_len=400,
            qv=False,
            float8=False,
            mods=False,
        )
    )
    def matches(call: Call) -> None:
        call = in_float8(call)
        hypothesis.assume(hopper.work_of(call.problem()) == "prefill")
        must_run(call)

    matches()


def paged(
    queries: tuple[int, ...],
    keys: tuple[int, ...],
    page_size: int,
    dims: tuple[int, int] = (128, 128),
    heads: tuple[int, int] = (8, 2),
    **more: Any,
) -> Call:
    """Ragged queries behind cached keys; pages and rows that no sequence owns are NaN."""
    pages = [-(-n // page_size) for n in keys]
    order = torch.randperm(sum(pages) + 2, generator=torch.Generator().manual_seed(3)).int()
    table = torch.full((len(keys), max(pages) + 1), 2147480000, dtype=torch.int32)
    used = torch.zeros(sum(pages) + 2, page_size, dtype=torch.bool)
    for b, mine in enumerate(order[: sum(pages)].split(pages)):
        table[b, : len(mine)] = mine
        at = torch.arange(keys[b])
        used[mine[at // page_size].long(), at % page_size] = True
    k, v = (normal(len(used), page_size, heads[1], d, seed=d + i) for i, d in enumerate(dims))
    k[~used], v[~used] = float("nan"), float("nan")
    ends = torch.tensor(queries).cumsum(0)
    kwargs: dict[str, Any] = {
        "q": normal(sum(queries), heads[0], dims[0]),
        "k": k,
        "v": v,
        "cu_seqlens_q": torch.nn.functional.pad(ends, (1, 0)).to(torch.int32),
        "seqused_k": torch.tensor(keys, dtype=torch.int32),
        "page_table": table,
        "max_seqlen_q": max(queries),
        "max_seqlen_k": max(keys),
        "causal": True,
    }
    return in_float8(Call("varlen", kwargs | more, f"{queries} over {keys}, pages of {page_size}"))


@pytest.mark.parametrize(
    ("dims", "page_size"),
    [
        *(((128, 128), size) for size in (1, 16, 24, 256)),
        *((dims, 16) for dims in ((64, 64), (96, 80), (192, 128), (256, 256))),
    ],
    ids=str,
)
def test_chunks_of_every_width_and_page(dims: tuple[int, int], page_size: int) -> None:
    must_run(paged((200, 1, 0, 77, 300), (900, 1, 5, 77, 1111), page_size, dims))


@pytest.mark.parametrize(
    "more",
    [
        {"window_size": (100, 0), "sinks": normal(4).float()},
        {"attention_chunk": 300, "softcap": 20.0, "causal": False},
        {"score_mod": lambda s, b, h, i, j: s - 0.01 * (b + h) * (i - j), "softmax_scale": -0.05},
    ],
    ids=lambda x: "-".join(x),
)
def test_long_chunks(more: dict[str, Any]) -> None:
    """Several query tiles and blocks of keys, of which windows hide many."""
    must_run(paged((400, 130), (1500, 900), 16, heads=(4, 2), **more))


def test_keys_cut_into_pieces() -> None:
    """One tile over many keys: descales are applied once, before the merge."""
    call = paged((60,), (6000,), 16, heads=(2, 1), num_splits=0)
    call.kwargs["q"] = call.kwargs["q"].half()
    must_run(call)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 448.0])
def test_extreme_descales(scale: float) -> None:
    call = paged((300, 100), (800, 100), 16)
    call.kwargs["k_descale"] = torch.tensor([[scale, 1.0], [1.0, scale]]).clamp(max=1.0)
    call.kwargs["v_descale"] = torch.tensor([[scale, 1.0], [1.0, scale]])
    must_run(call)


def test_new_tokens_are_written_in_float8_first() -> None:
    table = torch.arange(3 * 40, dtype=torch.int32).view(3, 40).flip(1)
    angle = torch.rand(900, 32, generator=torch.Generator().manual_seed(6)) * 6
    kwargs: dict[str, Any] = {
        "q": normal(3, 150, 8, 64),
        "k_cache": normal(120, 16, 2, 64, seed=1),
        "v_cache": normal(120, 16, 2, 64, seed=2),
        "k": normal(3, 150, 2, 64, seed=3),
        "v": normal(3, 150, 2, 64, seed=4),
        "page_table": table,
        "cache_seqlens": torch.tensor([400, 0, 77], dtype=torch.int32),
        "rotary_cos": angle.cos().bfloat16(),
        "rotary_sin": angle.sin().bfloat16(),
        "causal": True,
    }
    must_run(in_float8(Call("kvcache", kwargs, "append")))


def test_a_captured_call_replays_with_other_lengths() -> None:
    """The copies are made anew in every replay."""
    live = paged((200, 100, 300), (900, 400, 300), 16).copy(DEVICE).kwargs
    names = ("k_descale", "v_descale", "seqused_k", "cu_seqlens_q")
    given = [live[name] for name in names]
    true = [t.clone() for t in given]
    want = headway.flash_attn_varlen_func(**live, backend="reference")
    live["seqused_k"].copy_(torch.tensor([10, 1, 20]))
    live["cu_seqlens_q"].copy_(torch.tensor([0, 10, 11, 20]))
    live["k_descale"].fill_(1.0)

    def call() -> Tensor:
        out = headway.flash_attn_varlen_func(**live, backend="hopper")
        assert isinstance(out, Tensor)
        return out

    graph, out = captured(call)
    for tensor, value in zip(given, true, strict=True):
        tensor.copy_(value)
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(out, want, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("at_once", [1, 4])
def test_sequences_take_turns(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = (900, 400, 300, 1, 1024, 77)
    call = paged((200, 100, 300, 1, 60, 77), keys, 16, window_size=(500, 0))
    monkeypatch.setattr(widen, "MOST_BYTES", at_once * 1024 * 2 * 2 * 256)
    must_run(call)
    dense = {name: normal(6, 130, 4, 64, seed=i) for i, name in enumerate("qkv")}
    monkeypatch.setattr(widen, "MOST_BYTES", at_once * 130 * 2 * 4 * 128)
    must_run(in_float8(Call("dense", dense | {"causal": True}, "dense")))


def test_few_queries_run_on_the_portable_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widen, "LEAST_QUERIES", 10**9)
    base.forget()
    call = paged((200, 100), (900, 400), 16)
    assert "portable" in hopper.PROVIDER.note(call.copy(DEVICE).problem())
    assert honoured.honoured_or_refused(call, "hopper", DEVICE)
