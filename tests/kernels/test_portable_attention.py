"""The portable kernels against the reference: on a GPU, or under Triton's interpreter on a CPU."""

from __future__ import annotations

from typing import Any

import hypothesis
import pytest
import torch
from torch import Tensor

import headway
from headway.providers import portable
from tests import calls
from tests.kernels.covering import covering_calls
from tests.kernels.portable_device import DEVICE, EXAMPLES, requires_device

pytestmark = requires_device

DTYPES = (torch.bfloat16, torch.float16)
FLOAT8 = torch.float8_e4m3fn

#: Random calls to choose from, and the cost (programs times tiles of keys) of the dearest that is chosen.
CANDIDATES, MOST_COST = 300, 24


def check(call: calls.Call) -> None:
    calls.assert_matches(call.run("portable", DEVICE), call.run("reference"), call)


def small_calls() -> Any:
    """Calls of every kind, few tiles long."""
    return calls.calls(DTYPES, (8, 40, 64, 80, 96), (1, 7, 16, 64), max_len=40)


@pytest.mark.parametrize("share", range(4))
def test_features_in_pairs(share: int) -> None:
    """Every two values of two features that go together, together in some call."""
    for call in covering_calls(small_calls, CANDIDATES, 0, MOST_COST)[share::4]:
        check(call)


@pytest.mark.parametrize("softcap", calls.CAPS)
def test_a_cap_of_any_size(softcap: float) -> None:
    check(calls.capped(softcap))


@pytest.mark.parametrize("seed", range(8))
def test_any_call_matches_the_reference(seed: int) -> None:
    """Features drawn together, in shares that can run side by side."""

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=EXAMPLES // 8,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(
        call=calls.calls(DTYPES, head_dims=(8, 40, 64, 80, 96), page_sizes=(1, 7, 16, 64))
    )
    def matches(call: calls.Call) -> None:
        check(call)

    matches()


def test_more_sequences_than_a_launch_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portable, "MOST_SEQUENCES", 1)
    solve, parts = portable._solve, []
    monkeypatch.setattr(portable, "_solve", lambda *given: (parts.append(1), solve(*given)))

    @hypothesis.seed(0)
    @hypothesis.settings(
        max_examples=24,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(call=calls.calls(DTYPES, (8, 64), (1, 16), max_len=20))
    def matches(call: calls.Call) -> None:
        parts.clear()
        check(call)
        assert len(parts) == call.problem().batch_size

    matches()


def _normal(seed: int, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("d", [32, 40, 64, 80, 96, 112, 128, 192, 256])
@pytest.mark.parametrize("causal", [False, True])
def test_prefill_of_every_head_dim(d: int, causal: bool) -> None:
    q, k, v = _normal(1, 1, 40, 2, d), _normal(2, 1, 71, 1, d), _normal(3, 1, 71, 1, d)
    check(calls.Call("dense", {"q": q, "k": k, "v": v, "causal": causal}, f"head_dim {d}"))


@pytest.mark.parametrize(("d", "dv"), [(192, 128), (64, 256), (128, 64), (96, 40)])
def test_values_of_another_width(d: int, dv: int) -> None:
    q, k, v = _normal(1, 1, 40, 2, d), _normal(2, 1, 71, 2, d), _normal(3, 1, 71, 2, dv)
    check(calls.Call("dense", {"q": q, "k": k, "v": v, "causal": True}, f"head_dim {d}/{dv}"))


def long_decode(seqlens: tuple[int, ...], page_size: int, sq: int = 1, **more: Any) -> calls.Call:
    """Ragged caches, long enough to be split; pages shuffled, everything unused NaN."""
    batch, pages = len(seqlens), [-(-n // page_size) for n in seqlens]
    k, v = (
        _normal(4, sum(pages) + 1, page_size, 2, 64),
        _normal(5, sum(pages) + 1, page_size, 2, 64),
    )
    order = torch.randperm(sum(pages), generator=torch.Generator().manual_seed(6)).to(torch.int32)
    table = torch.full((batch, max(pages)), 2147480000, dtype=torch.int32)
    used = torch.zeros(k.shape[:2], dtype=torch.bool)
    for b, mine in enumerate(order.split(pages)):
        table[b, : len(mine)] = mine
        at = torch.arange(seqlens[b])
        used[mine[at // page_size].long(), at % page_size] = True
    k[~used], v[~used] = float("nan"), float("nan")
    kwargs = {"q": _normal(7, batch, sq, 6, 64), "k_cache": k, "v_cache": v, "page_table": table}
    kwargs |= {"cache_seqlens": _int32(*seqlens), "causal": True} | more
    return calls.Call("kvcache", kwargs, f"decode {seqlens} page {page_size} {sorted(more)}")


#: Keys of sequences: cut into pieces, in one piece, none.
LENGTHS = (780, 7, 0, 300)


@pytest.mark.parametrize("page_size", [1, 16, 24, 64])
@pytest.mark.parametrize("sq", [1, 3])
def test_long_caches_are_split_and_merged(page_size: int, sq: int) -> None:
    check(long_decode(LENGTHS, page_size, sq))


@pytest.mark.parametrize(
    "more",
    [
        {"sinks": _normal(8, 6)},
        {"window_size": (200, 0)},
        {"window_size": (500, 30), "causal": False},
        {"attention_chunk": 300},
        {"softcap": 5.0},
        {"num_splits": 1},
        {"num_splits": 3},
        {"softmax_scale": -0.1},
        {"softmax_scale": 0.0},
    ],
    ids=str,
)
def test_split_caches_with_modifiers(more: dict[str, Any]) -> None:
    check(long_decode(LENGTHS, 16, **more))


def latent(
    heads: int, form: str, sq: int = 2, kv_dtype: torch.dtype = torch.bfloat16
) -> calls.Call:
    """Absorbed MLA at DeepSeek's widths, in the three ways a call can put it."""
    cache, page = _normal(9, 16, 16, 1, 576), 16
    cache[13:] = float("nan")
    cache = cache.to(kv_dtype)
    table = torch.randperm(13, generator=torch.Generator().manual_seed(1)).to(torch.int32)
    table = torch.cat((table[:12], _int32(*[99999] * 2))).view(2, 7)
    lengths = _int32(7 * page - 3, 5 * page - 5)
    q = _normal(10, 2, sq, heads, 576)
    kwargs: dict[str, Any] = {"page_table": table, "cache_seqlens": lengths, "causal": True}
    if form == "one":
        kwargs |= {"q": q, "k_cache": cache, "v_cache": cache[..., :512]}
    elif form == "qv":
        kwargs |= {"q": q[..., 512:], "qv": q[..., :512]}
        kwargs |= {"k_cache": cache[..., 512:], "v_cache": cache[..., :512]}
    else:
        kwargs |= {"q": q[..., 512:], "qv": q[..., :512], "only_qv": True}
        kwargs |= {"k_cache": cache[..., 512:], "v_cache": cache[..., :512]}
    return calls.Call("kvcache", kwargs, f"latent {form} {heads} heads")


@pytest.mark.parametrize("form", ["qv", "only_qv"])
@pytest.mark.parametrize("heads", [5, 16, 128])
def test_absorbed_mla(heads: int, form: str) -> None:
    check(latent(heads, form))


@pytest.mark.parametrize("form", ["qv", "only_qv"])
@pytest.mark.parametrize("heads", [5, 16, 64])
def test_absorbed_mla_of_float8_caches(heads: int, form: str) -> None:
    call = latent(heads, form, 1, FLOAT8)
    descales = {"v_descale": 0.7} if form == "only_qv" else {"k_descale": 1.3, "v_descale": 0.7}
    call.kwargs |= {name: torch.full((2, 1), scale) for name, scale in descales.items()}
    check(call)


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, FLOAT8])
@pytest.mark.parametrize("heads", [16, 128])
def test_absorbed_mla_from_one_cache(heads: int, kv_dtype: torch.dtype) -> None:
    """k is the whole cache and v a view of its first columns."""
    call = latent(heads, "one", 2, kv_dtype).copy(DEVICE)
    call.kwargs["v_cache"] = call.kwargs["k_cache"][..., :512]
    out, lse = headway.flash_attn_with_kvcache(**call.kwargs, backend="portable", return_lse=True)
    problem = call.problem()
    got = calls.Result(out.cpu(), lse.cpu(), (), calls._used_rows(problem).cpu())
    want = latent(heads, "one", 2, kv_dtype).run("reference")
    calls.assert_matches(got, _without_caches(want), call.copy())


def _without_caches(result: calls.Result) -> calls.Result:
    return calls.Result(result.out, result.lse, (), result.used)


def test_values_beyond_256_need_the_latent_form() -> None:
    q, k, v = (_normal(1, 1, 4, 2, 512, dtype=torch.bfloat16).to(DEVICE) for _ in range(3))
    with pytest.raises(headway.UnsupportedError, match="absorbed MLA"):
        headway.flash_attn_func(q, k, v, backend="portable")


@pytest.mark.parametrize("kinds", ["cache", "all"])
@pytest.mark.parametrize("sq", [1, 40])
def test_float8(kinds: str, sq: int) -> None:
    call = long_decode((300, 7, 0, 120), 16, sq)
    names = ("k_cache", "v_cache") if kinds == "cache" else ("k_cache", "v_cache", "q")
    for i, name in enumerate(names):
        call.kwargs[name] = call.kwargs[name].to(FLOAT8)
        scale = torch.rand(4, 2, generator=torch.Generator().manual_seed(i)) + 0.5
        call.kwargs[f"{name[0]}_descale"] = scale
    check(call)


@pytest.mark.parametrize("dims", [(40, 40), (64, 64), (96, 96), (192, 128), (256, 256), (64, 8)])
def test_float8_caches_of_every_width(dims: tuple[int, int]) -> None:
    """Long enough to be split; the window begins and ends within tiles."""
    (d, dv), lengths = dims, (333, 90)
    kwargs: dict[str, Any] = {
        "q": _normal(1, 2, 1, 6, d),
        "k_cache": _normal(2, 2, 350, 2, d).to(FLOAT8),
        "v_cache": _normal(3, 2, 350, 2, dv).to(FLOAT8),
        "cache_seqlens": _int32(*lengths),
        "window_size": (299, 0),
    }
    check(calls.Call("kvcache", kwargs, f"float8 cache {d}/{dv}"))


def test_heads_of_a_cache_may_lie_further_apart_than_32_bits_reach() -> None:
    """As in a pool that has them outermost. Memory that nobody touches costs nothing on a CPU."""
    call, step = long_decode((40, 17), 16), 1_100_000_000
    small = {name: call.kwargs[name].to(FLOAT8) for name in ("k_cache", "v_cache")}
    k = torch.cat((small["k_cache"], small["k_cache"][:, :, :1]), 2)
    v = torch.cat((small["v_cache"], small["v_cache"][:, :, :1]), 2)
    far = torch.empty(2 * step + k.numel(), dtype=FLOAT8, device=DEVICE)
    far = far.as_strided(k.shape, (16 * 64, 64, step, 1)).copy_(k)
    new = _normal(1, 2, 1, 3, 64).to(FLOAT8)
    call.kwargs |= {"k_cache": k, "v_cache": v, "k": new, "v": new}
    call.kwargs["q"] = call.kwargs["q"].repeat(1, 1, 2, 1)[:, :, :9]
    want, here = call.run("reference"), call.copy(DEVICE)
    here.kwargs["k_cache"] = far
    out, lse = headway.flash_attn_with_kvcache(**here.kwargs, backend="portable", return_lse=True)
    caches = far.cpu(), here.kwargs["v_cache"].cpu()
    calls.assert_matches(calls.Result(out.cpu(), lse.cpu(), caches, want.used), want, call)


@pytest.mark.parametrize("step", [64, 68])
def test_float8_values_that_are_no_pairs(step: int) -> None:
    """At odd addresses, or in rows whose strides tell the compiler little, they are read one by one."""
    q, k, v = _normal(1, 2, 1, 4, 64), _normal(2, 2, 50, 1, 64), _normal(3, 2, 50, 1, 64)
    call = calls.Call("dense", {"q": q, "k": k.to(FLOAT8), "v": v.to(FLOAT8)}, f"rows of {step}")
    want, here = call.run("reference"), call.copy(DEVICE)
    room = torch.zeros(2 * 50 * step + 1, dtype=torch.uint8, device=DEVICE).view(FLOAT8)
    apart = room[1:].view(2, 50, 1, step)[..., :64]
    apart.copy_(here.kwargs["v"])
    here.kwargs["v"] = apart
    out, lse = headway.flash_attn_func(**here.kwargs, backend="portable", return_lse=True)
    calls.assert_matches(calls.Result(out.cpu(), lse.cpu(), (), want.used), want, call)


def test_float8_bits_of_every_value() -> None:
    """All 256 float8 values as values of one-key sequences come out as they are."""
    codes = torch.arange(256, dtype=torch.uint8).view(FLOAT8).view(16, 1, 1, 16)
    finite = codes.float().isfinite()
    k = torch.zeros(16, 1, 1, 16).to(FLOAT8)
    q = torch.zeros(16, 1, 1, 16, dtype=torch.float16)
    out = headway.flash_attn_func(
        q.to(DEVICE), k.to(DEVICE), codes.to(DEVICE), backend="portable", num_splits=1
    )
    assert torch.equal(out.cpu()[finite].float(), codes.float()[finite])


@pytest.mark.parametrize("rotary", [None, False, True])
@pytest.mark.parametrize("page_size", [None, 5, 16])
def test_append_quantises_like_the_reference(rotary: bool | None, page_size: int | None) -> None:
    batch, new, capacity = 3, 4, 80
    if page_size is None:
        cache_shape: tuple[int, ...] = (batch, capacity, 2, 64)
        where: dict[str, Any] = {}
    else:
        pages = capacity // page_size
        cache_shape = (batch * pages, page_size, 2, 64)
        order = torch.randperm(batch * pages, generator=torch.Generator().manual_seed(3))
        where = {"page_table": order.view(batch, pages).to(torch.int32)}
    kwargs: dict[str, Any] = {
        "q": _normal(1, batch, new, 4, 64),
        "k_cache": _normal(2, *cache_shape).to(FLOAT8),
        "v_cache": _normal(3, *cache_shape).to(FLOAT8),
        "k": _normal(4, batch, new, 2, 64) * 300,
        "v": _normal(5, batch, new, 2, 64) * 0.01,
        "cache_seqlens": _int32(0, 33, capacity - new),
        "k_descale": torch.tensor([[1.0, 2.0], [0.5, 1.5], [3.0, 1.0]]),
        "v_descale": torch.full((batch, 2), 1.0),
        "softmax_scale": 0.001,
        "causal": True,
    }
    if rotary is not None:
        angle = torch.rand(100, 16, generator=torch.Generator().manual_seed(6)) * 6
        kwargs |= {"rotary_cos": angle.cos(), "rotary_sin": angle.sin()}
        kwargs["rotary_interleaved"] = rotary
    call = calls.Call("kvcache", kwargs | where, f"append float8 rotary {rotary} page {page_size}")
    got, want = call.run("portable", DEVICE), call.run("reference")
    if rotary is None:
        for mine, theirs in zip(got.caches, want.caches, strict=True):
            assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))
    calls.assert_matches(got, want, call)


def test_empty_batches_and_sequences() -> None:
    for batch, sq, sk in ((0, 3, 3), (2, 0, 3), (2, 3, 0)):
        q, k, v = (
            _normal(1, batch, sq, 4, 64),
            _normal(2, batch, sk, 2, 64),
            _normal(3, batch, sk, 2, 64),
        )
        check(calls.Call("dense", {"q": q, "k": k, "v": v}, f"{batch}x{sq}x{sk}"))
