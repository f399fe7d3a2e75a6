"""The Hopper kernels on the device: the feature tests of the portable ones, and what is their own."""

from __future__ import annotations

import random
from typing import Any

import hypothesis
import pytest
import torch
from torch import Tensor

import headway
from headway import dispatch, providers
from headway.kernels.hopper import decode, decode_plan, direct, forward
from tests import calls
from tests.calls import Call, assert_matches
from tests.gpu.captured import Planned, assert_decode_replays, captured
from tests.kernels import test_portable_attention as shared
from tests.kernels.portable_device import DEVICE, EXAMPLES
from tests.kernels.test_portable_attention import (  # noqa: F401
    long_decode,
    test_absorbed_mla,
    test_any_call_matches_the_reference,
    test_empty_batches_and_sequences,
    test_float8,
    test_long_caches_are_split_and_merged,
    test_prefill_of_every_head_dim,
    test_split_caches_with_modifiers,
    test_values_of_another_width,
)
from tests.providers import honoured


def _absent() -> str | None:
    if not torch.cuda.is_available():
        return "needs a GPU"
    return providers.get("hopper").unavailable(torch.device(DEVICE))


pytestmark = pytest.mark.skipif(_absent() is not None, reason=str(_absent()))


def check(call: Call) -> None:
    """Run as the reference does, or refused with reasons; without the LSE, if that was the reason."""
    if not honoured.honoured_or_refused(call, "hopper", DEVICE):
        honoured.honoured_or_refused(call, "hopper", DEVICE, with_lse=False)


def must_run(call: Call, with_lse: bool = True) -> None:
    assert honoured.honoured_or_refused(call, "hopper", DEVICE, with_lse=with_lse), call.label


@pytest.fixture(autouse=True)
def _shared_tests_run_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "check", check)


@pytest.mark.parametrize("seed", range(8))
def test_any_call_of_the_widths_that_models_have(seed: int) -> None:
    """As test_any_call_matches_the_reference, at full tiles and over several blocks of keys."""
    ran = honoured.RAN["hopper"]

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=EXAMPLES // 8,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(
        call=calls.calls(
            shared.DTYPES,
            head_dims=(64, 128, 192, 256),
            page_sizes=(1, 16, 24, 128),
            max_len=400,
            qv=False,
            mods=seed % 2 == 0,
        )
    )
    def matches(call: Call) -> None:
        check(call)

    matches()
    assert honoured.RAN["hopper"] - ran >= EXAMPLES // 32


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


@pytest.mark.parametrize("dtype", shared.DTYPES, ids=str)
@pytest.mark.parametrize("d", [64, 128, 192, 256])
def test_long_prefill(d: int, dtype: torch.dtype) -> None:
    """Several query tiles and blocks of keys, more keys than queries, lengths no multiple of anything."""
    q, k, v = (normal(1, n, 2, d, dtype=dtype) for n in (700, 1203, 1203))
    must_run(Call("dense", {"q": q, "k": k, "v": v, "causal": True}, f"long {d}"))


@pytest.mark.parametrize("count", [1, 130, 1000])
@pytest.mark.parametrize("page_size", [None, 16])
def test_ragged_batches(count: int, page_size: int | None) -> None:
    """Prefill of many sequences at once, most short and a few long."""
    draw = random.Random(count)
    lengths = [int(min(600, 2 + draw.paretovariate(0.7))) for _ in range(count)]
    total = sum(lengths)
    cu = torch.nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(torch.int32)
    kwargs: dict[str, Any] = {"q": normal(total, 4, 64), "cu_seqlens_q": cu, "causal": True}
    kwargs |= {"max_seqlen_q": max(lengths), "max_seqlen_k": max(lengths)}
    if page_size is None:
        kwargs |= {"k": normal(total, 2, 64, seed=1), "v": normal(total, 2, 64, seed=2)}
        kwargs["cu_seqlens_k"] = cu
    else:
        pages = [-(-n // page_size) for n in lengths]
        table = torch.full((count, max(pages)), 2147480000, dtype=torch.int32)
        order = torch.randperm(sum(pages), generator=torch.Generator().manual_seed(3)).int()
        used = torch.zeros(sum(pages), page_size, dtype=torch.bool)
        for b, mine in enumerate(order.split(pages)):
            table[b, : len(mine)] = mine
            at = torch.arange(lengths[b])
            used[mine[at // page_size].long(), at % page_size] = True
        k, v = (normal(sum(pages), page_size, 2, 64, seed=s) for s in (1, 2))
        k[~used], v[~used] = float("nan"), float("nan")
        kwargs |= {"k": k, "v": v, "page_table": table}
        kwargs["seqused_k"] = torch.tensor(lengths, dtype=torch.int32)
    must_run(Call("varlen", kwargs, f"{count} sequences, page {page_size}"))


@pytest.mark.parametrize("count", [1, 300, 1500])
def test_decode_of_many_sequences(count: int) -> None:
    draw = random.Random(count)
    drawn = (int(min(3000, draw.paretovariate(0.5))) - 1 for _ in range(count - 1))
    must_run(long_decode((2999, *drawn), 16))


@pytest.mark.parametrize("dims", [(64, 64), (96, 96), (128, 128), (192, 128), (256, 256)], ids=str)
@pytest.mark.parametrize("page_size", [1, 16, 64, 256])
def test_decode_of_every_width_and_page(dims: tuple[int, int], page_size: int) -> None:
    lengths = (1000, 3, 0, 257)
    table = torch.arange(-(-1000 // page_size) * 4, dtype=torch.int32).view(4, -1).flip(1)
    k, v = (normal(table.numel(), page_size, 2, d, seed=i) for i, d in enumerate(dims))
    kwargs = {
        "q": normal(4, 1, 8, dims[0]),
        "k_cache": k,
        "v_cache": v,
        "page_table": table,
        "cache_seqlens": torch.tensor(lengths, dtype=torch.int32),
    }
    must_run(Call("kvcache", kwargs, f"decode {dims} page {page_size}"))


@pytest.mark.parametrize("rotary", [None, False, True])
@pytest.mark.parametrize("sq", [1, 40])
def test_append_then_attend(rotary: bool | None, sq: int) -> None:
    call = long_decode((1500, 7, 0, 600), 16, sq)
    table, lengths = call.kwargs["page_table"], call.kwargs["cache_seqlens"]
    extra = torch.arange(call.kwargs["k_cache"].shape[0], call.kwargs["k_cache"].shape[0] + 16)
    for name in ("k_cache", "v_cache"):
        fresh = torch.full((16, 16, 2, 64), float("nan"), dtype=torch.bfloat16)
        call.kwargs[name] = torch.cat((call.kwargs[name], fresh))
    wide = torch.cat((table, torch.full((4, 4), 2147480000, dtype=torch.int32)), 1)
    for b in range(4):
        first = -(-int(lengths[b]) // 16)
        wide[b, first : first + 4] = extra[4 * b : 4 * b + 4].int()
    call.kwargs |= {"page_table": wide, "k": normal(4, sq, 2, 64), "v": normal(4, sq, 2, 64)}
    if rotary is not None:
        angle = torch.rand(1600, 32, generator=torch.Generator().manual_seed(6)) * 6
        cos, sin = angle.cos().to(torch.bfloat16), angle.sin().to(torch.bfloat16)
        call.kwargs |= {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": rotary}
    must_run(call)


@pytest.mark.parametrize("names", [("k_cache", "v_cache"), ("q", "k_cache", "v_cache")])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_float8_caches(names: tuple[str, ...], d: int) -> None:
    table = torch.arange(4 * 64, dtype=torch.int32).view(4, 64).flip(1)
    kwargs: dict[str, Any] = {
        "q": normal(4, 2, 8, d),
        "k_cache": normal(256, 16, 2, d, seed=1),
        "v_cache": normal(256, 16, 2, d, seed=2),
        "page_table": table,
        "cache_seqlens": torch.tensor([1000, 3, 0, 257], dtype=torch.int32),
        "causal": True,
    }
    for name in names:
        kwargs[name] = kwargs[name].to(torch.float8_e4m3fn)
        kwargs[f"{name[0]}_descale"] = torch.rand(4, 2, generator=torch.Generator()) + 0.5
    must_run(Call("kvcache", kwargs, f"float8 {d} {names}"), with_lse=False)


@pytest.mark.parametrize("sq", [1, 5])
@pytest.mark.parametrize("planned", [None, "copied", "kept", "new step"])
def test_a_captured_call_replays_with_other_lengths_and_pages(planned: Planned, sq: int) -> None:
    assert_decode_replays("hopper", planned, sq)


@pytest.mark.parametrize("warm", [True, False])
def test_captured_layers_share_one_plan(warm: bool) -> None:
    """Three layers with caches of their own; the graph plans once and replays follow the lengths."""
    from tests.gpu.captured import LARGE, SMALL, plan_of, step

    layers = [step(LARGE) for _ in range(3)]
    for i, layer in enumerate(layers):
        layer["q"] = layer["q"] * (1 + i)
    lengths, table = layers[0]["cache_seqlens"], layers[0]["page_table"]
    want = [headway.flash_attn_with_kvcache(**layer, backend="reference") for layer in layers]
    for layer in layers:
        layer |= {"cache_seqlens": lengths, "page_table": table}
    plan = plan_of("hopper", lengths)

    def call() -> Tensor:
        outs = [
            headway.flash_attn_with_kvcache(**layer, scheduler_metadata=plan, backend="hopper")
            for layer in layers
        ]
        return torch.stack(outs)  # type: ignore[arg-type]

    if not warm:  # what a capture cannot do is compile
        other = plan_of("hopper", lengths)
        headway.flash_attn_with_kvcache(**layers[0], scheduler_metadata=other, backend="hopper")
    true_lengths = lengths.clone()
    lengths.copy_(torch.tensor(SMALL))
    graph, out = captured(call, warm)
    lengths.copy_(true_lengths)
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    for got, expected in zip(out, want, strict=True):
        torch.testing.assert_close(got, expected, atol=2e-2, rtol=2e-2)


def test_a_captured_prefill_replays_with_other_lengths() -> None:
    """Ragged queries over ragged keys: tiles are ordered on the device, anew in every replay."""
    live: dict[str, Any] = {
        "q": normal(900, 4, 64).to(DEVICE),
        "k": normal(900, 2, 64, seed=1).to(DEVICE),
        "v": normal(900, 2, 64, seed=2).to(DEVICE),
        "cu_seqlens_q": torch.tensor([0, 1, 1, 1], dtype=torch.int32, device=DEVICE),
    }
    live["cu_seqlens_k"] = live["cu_seqlens_q"].clone()
    bounds: dict[str, Any] = {"max_seqlen_q": 900, "max_seqlen_k": 900, "causal": True}

    def call() -> Tensor:
        out = headway.flash_attn_varlen_func(**live, **bounds, backend="hopper")
        assert isinstance(out, Tensor)
        return out

    graph, out = captured(call)
    for ends in ([0, 300, 301, 900], [0, 0, 900, 900], [0, 64, 128, 192]):
        for name in ("cu_seqlens_q", "cu_seqlens_k"):
            live[name].copy_(torch.tensor(ends))
        graph.replay()
        torch.cuda.synchronize()
        want = headway.flash_attn_varlen_func(**live, **bounds, backend="reference")
        torch.testing.assert_close(out[: ends[-1]], want[: ends[-1]], atol=2e-2, rtol=2e-2)


def test_the_same_call_gives_the_same_bits() -> None:
    for call in (long_decode((1500, 7, 0, 640), 16), long_decode((1500, 7, 0, 640), 16, 40)):
        first, second = call.run("hopper", DEVICE), call.run("hopper", DEVICE)
        assert torch.equal(first.out, second.out)
        assert_matches(first, call.run("reference"), call)


def _own_calls() -> list[Call]:
    """One for each kernel: prefill and its order of tiles, pieces and their merge, planning and decode."""
    torch.manual_seed(0)
    ragged: dict[str, Any] = {
        "cu_seqlens_q": torch.tensor([0, 70, 200], dtype=torch.int32),
        "cu_seqlens_k": torch.tensor([0, 90, 400], dtype=torch.int32),
        "max_seqlen_q": 130,
        "max_seqlen_k": 310,
        "causal": True,
    }
    for name, rows, heads in (("q", 200, 8), ("k", 400, 2), ("v", 400, 2)):
        ragged[name] = torch.randn(rows, heads, 128).bfloat16()
    return [
        Call("varlen", ragged, "ragged"),
        long_decode((3000,), 16, 100),
        long_decode((1500, 7, 0, 640), 16),
        long_decode((1500, 7, 640), 1),
    ]


def test_triton_starts_them_if_its_launcher_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    directly = [call.run("hopper", DEVICE) for call in _own_calls()]
    _forget_kernels()
    monkeypatch.setattr(direct, "_c_function", lambda kernel: None)
    try:
        for call, wanted in zip(_own_calls(), directly, strict=True):
            got = call.run("hopper", DEVICE)
            assert torch.equal(got.out, wanted.out), call.label
            assert_matches(got, call.run("reference"), call)
    finally:
        _forget_kernels()


def _forget_kernels() -> None:
    dispatch.forget()
    forward._LAUNCHES.clear()
    direct._STARTED.clear()
    for cache in (decode._kernel_for, decode_plan._launches_for, decode_plan._planner):
        cache.cache_clear()


def test_small_tensors_at_odd_addresses_behind_aligned_ones() -> None:
    def shifted(t: Tensor) -> Tensor:
        flat = torch.empty(t.numel() + 1, dtype=t.dtype, device=DEVICE)
        return flat[1:].view(t.shape).copy_(t)

    torch.manual_seed(1)
    q = torch.randn(3, 1, 8, 128, dtype=torch.bfloat16, device=DEVICE)
    k, v = torch.randn(2, 200, 16, 2, 128, dtype=torch.bfloat16, device=DEVICE)
    table = torch.randperm(200, device=DEVICE)[:150].view(3, 50).int()
    lengths = torch.tensor([800, 17, 300], dtype=torch.int32, device=DEVICE)
    sinks = torch.randn(8, device=DEVICE)

    def run(turn: Any) -> Any:
        arguments = {
            "cache_seqlens": turn(lengths),
            "page_table": turn(table),
            "sinks": turn(sinks),
        }
        return headway.flash_attn_with_kvcache(
            q, k, v, **arguments, causal=True, return_lse=True, backend="hopper"
        )

    for _ in range(2):
        for got, wanted in zip(run(shifted), run(torch.clone), strict=True):
            assert torch.equal(got, wanted)


def test_it_is_what_hopper_chooses() -> None:
    q = torch.empty(4, 1, 8, 128, dtype=torch.bfloat16, device=DEVICE)
    k = torch.empty(4, 64, 2, 128, dtype=torch.bfloat16, device=DEVICE)
    explanation = headway.explain(headway.flash_attn_with_kvcache, q, k, k, cache_seqlens=64)
    assert explanation.chosen == "hopper"
    assert "decode kernel" in str(explanation)
