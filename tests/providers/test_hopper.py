"""The provider of the Hopper kernels: what it takes, where it sends it, and what its plans keep."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

pytest.importorskip("triton")

import headway
from headway import UnsupportedError, dispatch, providers
from headway.plan import Plan, PlanKey
from headway.problem import check
from headway.providers import base, hopper
from tests.calls import UNWRITTEN, Call, Result, assert_matches, calls
from tests.providers import honoured
from tests.stand_ins import hopper_kernels
from tests.stand_ins.hopper_kernels import RAN


@pytest.fixture
def kernels() -> Iterator[None]:
    with hopper_kernels.installed():
        yield


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def dense(sq: int = 40, sk: int = 50, heads: tuple[int, int] = (4, 2), **more: Any) -> Call:
    q, k, v = normal(2, sq, heads[0], 64), normal(2, sk, heads[1], 64), normal(2, sk, heads[1], 64)
    return Call("dense", {"q": q, "k": k, "v": v, "causal": True} | more, "dense")


def cached(sq: int = 1, page_size: int = 16, **more: Any) -> Call:
    kwargs: dict[str, Any] = {
        "q": normal(3, sq, 8, 64),
        "k_cache": normal(12, page_size, 2, 64),
        "v_cache": normal(12, page_size, 2, 64),
        "cache_seqlens": int32(2 * page_size, 1, 0),
        "page_table": torch.arange(12, dtype=torch.int32).flip(0).view(3, 4),
        "causal": True,
    }
    return Call("kvcache", kwargs | more, f"cached {sq} page {page_size}")


def test_any_call_is_honoured_or_refused(kernels: None) -> None:
    honoured.RAN.clear()
    honoured.REFUSED.clear()

    @settings(honoured.many, max_examples=150, database=None)
    @given(
        call=calls(
            (torch.bfloat16, torch.float16), head_dims=(8, 40, 64, 96), page_sizes=(1, 7, 16)
        )
    )
    def check(call: Call) -> None:
        honoured.honoured_or_refused(call, "hopper")

    check()
    honoured.enough_ran("hopper", 40)
    assert {"forward", "decode", "appending decode", "plan"} <= set(RAN)


def test_problems_of_one_signature_share_what_is_ready(kernels: None) -> None:
    """The second of two such problems is solved from its own tensors, wherever they lie."""
    shared = 0

    @settings(honoured.many, max_examples=60, database=None)
    @given(call=calls((torch.bfloat16,), head_dims=(8, 64), page_sizes=(1, 16), mods=False))
    def check(call: Call) -> None:
        nonlocal shared
        if hopper.refusals(call.problem()):
            return
        other = call.copy()
        for name in ("q", "qv", "sinks", "k", "v"):
            given = other.kwargs.get(name)
            if isinstance(given, Tensor) and given.dtype == torch.bfloat16:
                other.kwargs[name] = -given.flip(-1)
        base.forget()
        for one in (call, other, call):
            assert_matches(_run_as_problem(one), one.run("reference"), one)
        shared += len(hopper._RUNNERS._made)
        assert len(hopper._RUNNERS._made) <= 1

    check()
    assert shared > 20


def _run_as_problem(call: Call) -> Result:
    mine = call.copy()
    problem = mine.problem()
    out = torch.full(problem.out_shape, UNWRITTEN, dtype=problem.out_dtype)
    _, lse = hopper.PROVIDER.run(dataclasses.replace(problem, out=out, return_lse=True))
    assert lse is not None
    caches = tuple(mine.kwargs[n] for n in ("k_cache", "v_cache") if n in mine.kwargs)
    return Result(out, lse, caches, call.run("reference").used)


@pytest.mark.parametrize("call", [dense(), cached()], ids=["prefill", "decode"])
def test_caps_that_would_lose_scores_digits_are_refused(kernels: None, call: Call) -> None:
    """Before and after one that is taken: what was chosen for that one does not count."""
    for softcap in (1e6, 50.0, 1000.0, 1e6, 1e30):
        call.kwargs["softcap"] = softcap
        problem = dataclasses.replace(call.copy().problem(), backend="hopper")
        if softcap <= 1000:
            assert dispatch.choose(problem) is hopper.PROVIDER
            continue
        with pytest.raises(UnsupportedError, match="softcap above 1000"):
            dispatch.choose(problem)


@pytest.mark.parametrize(
    ("tokens", "float8", "d", "fused"),
    [(1, False, 64, True), (16, True, 64, True), (17, False, 64, False), (1, False, 56, False)],
)
def test_few_new_tokens_are_written_by_the_decode_kernel(
    kernels: None, tokens: int, float8: bool, d: int, fused: bool
) -> None:
    """The cases of 56 have rows of cos and sin that do not start at multiples of 16 bytes."""
    angle = normal(100, 28) if d == 56 else normal(100, 32)
    call = cached(
        k=normal(3, tokens, 2, 64),
        v=normal(3, tokens, 2, 64, dtype=torch.bfloat16),
        rotary_cos=angle,
        rotary_sin=angle,
    )
    if float8:
        for name in ("k_cache", "v_cache"):
            call.kwargs[name] = call.kwargs[name].to(torch.float8_e4m3fn)
    got = _run_as_problem(call)
    assert ("appending decode" in RAN) == fused
    assert_matches(got, call.run("reference"), call)


def test_new_tokens_at_odd_addresses_are_appended_first(kernels: None) -> None:
    call = cached(k=normal(3, 1, 2, 64), v=normal(3, 1, 2, 64))
    run = hopper.PROVIDER.runner(call.copy().problem())
    odd = torch.zeros(3 * 2 * 64 + 1, dtype=torch.bfloat16)[1:].view(3, 1, 2, 64)
    odd.copy_(call.kwargs["k"])
    call.kwargs["k"] = odd
    mine = call.copy()
    mine.kwargs["k"] = odd
    out, _ = run(mine.problem())
    assert RAN == ["plan", "decode"]
    torch.testing.assert_close(out, call.run("reference").out, atol=1e-2, rtol=1e-2)


def test_queries_at_odd_addresses_are_run_by_what_is_ready_for_others(kernels: None) -> None:
    call = dense(sq=1)
    problem = call.problem()
    flat = torch.zeros(problem.q.numel() + 1, dtype=problem.q.dtype)
    odd = flat[1:].view(problem.q.shape)
    odd.copy_(problem.q)
    run = hopper.PROVIDER.runner(problem)
    expected, _ = run(problem)
    assert odd.data_ptr() % 16
    out, _ = run(dataclasses.replace(problem, q=odd))
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(
    ("call", "kernel"),
    [
        (dense(sq=1), "decode"),
        (dense(sq=32), "decode"),
        (dense(sq=33), "forward"),
        (dense(sq=1, heads=(80, 1)), "decode"),
        (cached(sq=16), "decode"),
        (cached(sq=17), "forward"),
    ],
    ids=lambda x: x if isinstance(x, str) else f"{tuple(x.kwargs['q'].shape)}",
)
def test_queries_of_one_tile_are_decode(kernels: None, call: Call, kernel: str) -> None:
    assert_matches(call.run("hopper"), call.run("reference"), call)
    assert RAN[-1] == kernel


def test_ragged_keys_are_prefill_however_few_the_queries(kernels: None) -> None:
    kwargs = {
        "q": normal(3, 4, 64),
        "k": normal(30, 2, 64),
        "v": normal(30, 2, 64),
        "cu_seqlens_q": int32(0, 1, 3),
        "cu_seqlens_k": int32(0, 10, 30),
        "max_seqlen_q": 2,
        "max_seqlen_k": 20,
    }
    call = Call("varlen", kwargs, "ragged")
    assert_matches(call.run("hopper"), call.run("reference"), call)
    assert RAN == ["forward"]


def _alibi(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return score - 0.1 * (q_idx - kv_idx)


FLOAT8 = torch.float8_e4m3fn


def float8(call: Call, *names: str) -> Call:
    for name in names:
        call.kwargs[name] = call.kwargs[name].to(FLOAT8)
    return call


def latent(sq: int = 1, whole: bool = False, **more: Any) -> Call:
    """Absorbed MLA: rope and latent caches apart, or rows of both."""
    cache = normal(12, 16, 1, 576)
    q = normal(3, sq, 8, 576)
    kwargs: dict[str, Any] = {
        "cache_seqlens": int32(32, 1, 0),
        "page_table": torch.arange(12, dtype=torch.int32).flip(0).view(3, 4),
        "causal": True,
    }
    if whole:
        kwargs |= {"q": q, "k_cache": cache, "v_cache": cache[..., :512]}
    else:
        kwargs |= {"q": q[..., 512:], "qv": q[..., :512]}
        kwargs |= {"k_cache": cache[..., 512:], "v_cache": cache[..., :512]}
    return Call("kvcache", kwargs | more, f"latent {sq} {whole}")


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (cached(qv=normal(3, 1, 8, 64)), "head_dim=64/64 with qv: takes 8..64/264..512"),
        (latent(sq=17), "max_seqlen_q=17: takes up to 16 (in absorbed MLA)"),
        (
            latent(whole=True, v_cache=normal(12, 16, 1, 512)),
            "values apart from the keys with head_dim 576/512: v must be the first columns of k",
        ),
        (
            float8(cached(sq=20), "q", "k_cache", "v_cache"),
            "dtype float8_e4m3fn: takes bfloat16, bfloat16 with float8_e4m3fn k / v, float16, ",
        ),
        (
            dense(q=normal(2, 40, 4, 264), k=normal(2, 9, 2, 264), v=normal(2, 9, 2, 264)),
            "head_dim=264: takes 576/512 (in absorbed MLA)",
        ),
        (dense(k=normal(2, 50, 2, 68)[..., :64]), "they would be copied"),
    ],
    ids=lambda x: x[:24] if isinstance(x, str) else "",
)
def test_what_the_kernels_do_not_do_is_refused_with_a_reason(
    kernels: None, call: Call, reason: str
) -> None:
    with pytest.raises(UnsupportedError) as caught:
        headway_function(call)(**call.kwargs, backend="hopper")
    assert any(reason in said for said in caught.value.reasons["hopper"]), caught.value.reasons
    assert not RAN


def headway_function(call: Call) -> Any:
    from tests.calls import FUNCTIONS

    return FUNCTIONS[call.function]


@pytest.mark.parametrize("sq", [1, 20])
def test_odd_pages_and_left_padding(kernels: None, sq: int) -> None:
    for call in (cached(sq=sq, page_size=3), cached(sq=sq, cache_leftpad=int32(3, 0, 0))):
        assert_matches(call.run("hopper"), call.run("reference"), call)
        assert RAN[-1] == ("decode" if sq == 1 else "forward")


def _tree(b: Any, h: Any, i: Any, j: Any) -> Any:
    return (j < 20) | (i >= j) & ((i - j) % 3 != 1)


@pytest.mark.parametrize("sq", [1, 4, 20])
def test_mods_run_where_calls_without_them_do(kernels: None, sq: int) -> None:
    for call in (cached(sq=sq, score_mod=_alibi), cached(sq=sq, causal=False, mask_mod=_tree)):
        assert_matches(call.run("hopper"), call.run("reference"), call)
    assert (["forward"] * 2 if sq == 20 else ["plan", "decode"] * 2) == RAN


def test_mods_of_float8_and_latent_caches(kernels: None) -> None:
    for call in (
        float8(cached(mask_mod=_tree), "k_cache", "v_cache"),
        latent(2, score_mod=_alibi, mask_mod=_tree),
    ):
        assert honoured.honoured_or_refused(call, "hopper")
    assert RAN == ["plan", "decode"] * 2


def test_steps_of_single_heads_do_not_count(kernels: None) -> None:
    """Views of one latent cache may differ in the stride of a dimension of one."""
    call = latent(whole=True)
    v = call.kwargs["v_cache"]
    pages, rows, _, columns = v.stride()
    call.kwargs["v_cache"] = v.as_strided(v.shape, (pages, rows, 512, columns))
    assert not hopper.refusals(call.problem())
    call.kwargs["v_cache"] = v.as_strided(v.shape, (pages, rows - 64, 576, columns))
    assert "v of other strides" in hopper.refusals(call.problem())[0]


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("more", [{}, {"softmax_scale": -0.1}, {"window_size": (9, 0)}], ids=str)
def test_absorbed_mla_is_decode(kernels: None, whole: bool, more: dict[str, Any]) -> None:
    call = latent(2, whole, **more)
    assert honoured.honoured_or_refused(call, "hopper")
    assert RAN == ["plan", "decode"]


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("float8_queries", [False, True])
@pytest.mark.parametrize("descales", ["", "kv", "v"])
def test_float8_latents_are_decoded(
    kernels: None, whole: bool, float8_queries: bool, descales: str
) -> None:
    """Keys and values may have unlike descales, and rope parts other ones than latents."""
    call = latent(2, whole)
    if float8_queries:
        float8(call, *({"q", "qv"} & call.kwargs.keys()))
        call.kwargs["q_descale"] = torch.rand(3, 1) + 0.5
    float8(call, "k_cache", "v_cache")
    if whole:
        call.kwargs["v_cache"] = call.kwargs["k_cache"][..., :512]
    for name in descales:
        call.kwargs[f"{name}_descale"] = torch.rand(3, 1) + 0.5
    assert honoured.honoured_or_refused(call, "hopper")
    assert RAN == ["plan", "decode"]


@pytest.mark.parametrize("names", [("k_cache", "v_cache"), ("q", "k_cache", "v_cache")])
def test_float8_caches_are_decoded(kernels: None, names: tuple[str, ...]) -> None:
    call = float8(cached(), *names)
    for name in names:
        call.kwargs[f"{name[0]}_descale"] = torch.rand(3, 2) + 0.5
    assert honoured.honoured_or_refused(call, "hopper")


RAGGED_FLOAT8 = {
    "q": normal(70, 4, 64),
    "k": normal(60, 2, 64).to(FLOAT8),
    "v": normal(60, 2, 64).to(FLOAT8),
    "cu_seqlens_q": int32(0, 20, 70),
    "cu_seqlens_k": int32(0, 10, 60),
    "max_seqlen_q": 50,
    "max_seqlen_k": 50,
    "causal": True,
}


@pytest.mark.parametrize("descales", ["", "k", "v", "kv"])
@pytest.mark.parametrize(
    "call",
    [
        cached(20),
        cached(20, page_size=3, window_size=(9, 0), softcap=20.0),
        cached(20, cache_leftpad=int32(3, 0, 0), sinks=normal(8), score_mod=_alibi),
        cached(20, attention_chunk=7, cache_batch_idx=int32(2, 0, 1), softmax_scale=-0.1),
        cached(20, causal=False, mask_mod=_tree),
        dense(),
        dense(sk=0),
        Call("varlen", RAGGED_FLOAT8),
    ],
    ids=lambda call: "-".join([call.label, *list(call.kwargs)[4:]]),
)
def test_float8_keys_are_widened_for_prefill(kernels: None, call: Call, descales: str) -> None:
    call = call.copy()
    if call.function == "kvcache":
        call.kwargs["q"] = call.kwargs["q"].half()
    float8(call, *({"k", "v", "k_cache", "v_cache"} & call.kwargs.keys()))
    for name in descales:
        call.kwargs[f"{name}_descale"] = torch.rand(call.problem().batch_size, 2) + 0.5
    assert honoured.honoured_or_refused(call, "hopper")
    assert RAN == ["widen", "forward"]


def test_new_tokens_in_a_float8_cache_are_widened_with_it(kernels: None) -> None:
    call = cached(20, k=normal(3, 20, 2, 64), v=normal(3, 20, 2, 64))
    call.kwargs["k_descale"] = torch.rand(3, 2) + 1
    float8(call, "k_cache", "v_cache")
    assert honoured.honoured_or_refused(call, "hopper")
    assert RAN == ["widen", "forward"]


@pytest.mark.parametrize("sequences", [1, 2])
@pytest.mark.parametrize(
    "call",
    [
        cached(20),
        cached(20, cache_leftpad=int32(3, 0, 0), cache_batch_idx=int32(2, 0, 1)),
        cached(20, k=normal(3, 20, 2, 64), v=normal(3, 20, 2, 64), cache_seqlens=int32(5, 1, 0)),
        cached(q=normal(90, 8, 64), cu_seqlens_q=int32(0, 20, 70, 90), max_seqlen_q=50),
        Call("dense", {name: normal(5, 50, n, 64) for name, n in (("q", 4), ("k", 2), ("v", 2))}),
    ],
    ids=lambda call: "-".join([call.label, *list(call.kwargs)[6:]]),
)
def test_sequences_take_turns_where_copies_of_all_would_be_too_large(
    kernels: None, call: Call, sequences: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from headway.kernels.hopper import widen

    call = call.copy()
    names = ("k", "v") if call.function == "dense" else ("k_cache", "v_cache")
    float8(call, *names)
    count = call.problem().batch_size
    for name in ("k_descale", "v_descale"):
        call.kwargs[name] = torch.rand(count, 2) + 0.5
    rows = 50 if call.function == "dense" else 64
    monkeypatch.setattr(widen, "MOST_BYTES", sequences * rows * 2 * 2 * 128)
    assert honoured.honoured_or_refused(call, "hopper")
    assert ["widen", "forward"] * -(-count // sequences) == RAN


def test_float8_keys_of_few_queries_are_left_to_the_portable_kernels(
    kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is better is for lengths to say, and so no refusal."""
    from headway.kernels.hopper import widen

    monkeypatch.setattr(hopper._kernels(), "reason_against_widening", widen.reason_against)
    call = float8(cached(20), "k_cache", "v_cache")
    assert honoured.honoured_or_refused(call, "hopper")
    problem = call.problem()
    out, _ = hopper.PROVIDER.runner(problem)(problem)
    torch.testing.assert_close(out, call.run("reference").out, atol=1e-2, rtol=1e-2)
    assert not RAN
    nothing = dense(sk=0, k=normal(2, 0, 2, 64).to(FLOAT8), v=normal(2, 0, 2, 64).to(FLOAT8))
    assert honoured.honoured_or_refused(nothing, "hopper")
    assert hopper.PROVIDER.note(problem).startswith("portable prefill kernel: 80 queries")
    monkeypatch.setattr(widen, "LEAST_QUERIES", 60)
    base.forget()
    assert "widened" in hopper.PROVIDER.note(problem)
    assert honoured.honoured_or_refused(call, "hopper")
    assert RAN == ["widen", "forward"]


@pytest.mark.parametrize("scale", [-0.3, 0.0])
@pytest.mark.parametrize("sq", [1, 40])
def test_scales_that_are_not_positive(kernels: None, scale: float, sq: int) -> None:
    call = dense(sq=sq, softmax_scale=scale)
    assert_matches(call.run("hopper"), call.run("reference"), call)


@pytest.mark.parametrize("sq", [1, 40])
def test_no_keys_at_all(kernels: None, sq: int) -> None:
    none = normal(2, 0, 2, 64)
    for sinks in (None, normal(4)):
        call = dense(sq=sq, sk=0, sinks=sinks)
        assert_matches(call.run("hopper"), call.run("reference"), call)
    ragged = Call(
        "varlen",
        {
            "q": normal(2 * sq, 4, 64),
            "k": none[0],
            "v": none[0],
            "cu_seqlens_q": int32(0, sq, sq),
            "cu_seqlens_k": int32(0, 0, 0),
        },
        "ragged, no keys, rows behind the last sequence",
    )
    assert_matches(ragged.run("hopper"), ragged.run("reference"), ragged)


@pytest.mark.parametrize("sq", [1, 40])
def test_rows_at_odd_addresses_and_outputs_of_other_dtypes(kernels: None, sq: int) -> None:
    call = dense(sq=sq, q=normal(2, sq, 4, 70)[..., 3:67])
    want = call.run("reference").out
    assert_matches(call.run("hopper"), call.run("reference"), call)
    odd = torch.empty(2, sq, 4, 66, dtype=torch.bfloat16)[..., :64]
    for out in (odd, torch.empty(2, sq, 4, 64)):
        got = headway.flash_attn_func(**call.kwargs, out=out, backend="hopper")
        assert got is out
        torch.testing.assert_close(got, want.to(out.dtype), atol=1e-2, rtol=1e-2)


# --- plans ----------------------------------------------------------------------------------------------


def step_plan(new: int = 0, kv_dtype: torch.dtype = torch.bfloat16) -> Plan:
    key = PlanKey(
        device=torch.device("cpu"),
        batch_size=3,
        max_seqlen_q=1,
        max_seqlen_k=64,
        num_q_heads=8,
        num_kv_heads=2,
        head_dim=64,
        head_dim_v=64,
        page_size=16,
        causal=True,
        window_left=None,
        window_right=0,
        attention_chunk=0,
    )
    return providers.get("hopper").plan(key, int32(32 + new, 1 + new, new), kv_dtype=kv_dtype)


def run_planned(call: Call, plan: Plan) -> Tensor:
    out = headway.flash_attn_with_kvcache(**call.kwargs, scheduler_metadata=plan, backend="hopper")
    assert isinstance(out, Tensor)
    return out


def test_layers_share_what_the_first_one_planned(kernels: None) -> None:
    call, plan = cached(), step_plan()
    want = headway.flash_attn_with_kvcache(**call.kwargs, backend="reference")
    for _ in range(3):
        torch.testing.assert_close(run_planned(call, plan), want)
    assert RAN == ["plan", "decode", "decode", "decode"]


def test_a_new_step_plans_anew_in_the_same_memory(kernels: None) -> None:
    call, plan = cached(), step_plan()
    run_planned(call, plan)
    call.kwargs["cache_seqlens"].copy_(int32(5, 60, 17))
    plan.new_step()
    got = run_planned(call, plan)
    want = headway.flash_attn_with_kvcache(**call.kwargs, backend="reference")
    torch.testing.assert_close(got, want)
    plan.copy_(step_plan())
    run_planned(call, plan)
    assert RAN.count("plan") == 3
    assert len(plan._parts) == 1


def test_lengths_from_elsewhere_are_planned_for(kernels: None) -> None:
    """A plan changes no result, even if it is handed to a call with other lengths."""
    call, plan = cached(), step_plan()
    run_planned(call, plan)
    call.kwargs["cache_seqlens"] = int32(5, 60, 17)
    want = headway.flash_attn_with_kvcache(**call.kwargs, backend="reference")
    torch.testing.assert_close(run_planned(call, plan), want)


def test_appended_keys_count(kernels: None) -> None:
    new: dict[str, Any] = {"k": normal(3, 1, 2, 64), "v": normal(3, 1, 2, 64)}
    mine, theirs = cached(**new).copy(), cached(**new).copy()
    plan = step_plan(new=1)
    for _ in range(2):
        want = headway.flash_attn_with_kvcache(**theirs.kwargs, backend="reference")
        torch.testing.assert_close(run_planned(mine, plan), want)
    assert torch.equal(mine.kwargs["k_cache"], theirs.kwargs["k_cache"])
    assert RAN.count("plan") == 1


def test_a_layer_that_appends_and_one_that_reads_share_a_plan(kernels: None) -> None:
    """Over the same lengths, of which one counts the new token and the other does not."""
    plan = step_plan(new=1)
    new: dict[str, Any] = {"k": normal(3, 1, 2, 64), "v": normal(3, 1, 2, 64)}
    reading = cached()
    appending = Call("kvcache", reading.kwargs | new).copy()
    appending.kwargs["cache_seqlens"] = reading.kwargs["cache_seqlens"]
    for call in (appending, reading, appending):
        want = headway.flash_attn_with_kvcache(**call.kwargs, backend="reference")
        torch.testing.assert_close(run_planned(call, plan), want)


def test_what_is_captured_plans_itself(kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call of a captured graph plans inside it, the warm-up before and eager calls behind too."""
    call, plan = cached(), step_plan()
    for capturing in (False, True, True, False, False):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda c=capturing: c)
        run_planned(call, plan)
    assert RAN == ["plan", "decode", "plan", "decode", "decode", "plan", "decode", "decode"]


def test_prepare_fills_the_plan_before_a_call(kernels: None) -> None:
    call, plan = cached(), step_plan()
    call.kwargs["scheduler_metadata"] = plan
    providers.get("hopper").prepare(call.problem())
    assert RAN == ["plan"]
    headway.flash_attn_with_kvcache(**call.kwargs, backend="hopper")
    assert RAN == ["plan", "decode"]


@pytest.mark.parametrize("call", [cached(sq=3, window_size=(7, 0)), dense(), cached(page_size=5)])
def test_a_plan_compares_the_geometry_that_its_key_has(call: Call) -> None:
    problem = call.problem()
    assert problem.plan_key.geometry == problem.plan_geometry
    check(dataclasses.replace(problem, plan=Plan(problem.plan_key, int32(1))))


def test_buffers_are_made_for_caches_that_decode_takes(kernels: None) -> None:
    for kv_dtype, count in ((torch.float16, 1), (FLOAT8, 1), (torch.float32, 0)):
        assert len(step_plan(kv_dtype=kv_dtype)._parts) == count


def test_long_queries_are_planned_for_the_portable_kernels(kernels: None) -> None:
    lengths = int32(32, 1, 0)
    key = dataclasses.replace(step_plan().key, max_seqlen_q=17)
    assert providers.get("hopper").plan(key, lengths).schedule is not None
    latent_key = dataclasses.replace(key, num_kv_heads=1, head_dim=576, head_dim_v=512)
    assert providers.get("hopper").plan(latent_key, lengths).schedule is not None
    few = dataclasses.replace(latent_key, max_seqlen_q=16)
    assert providers.get("hopper").plan(few, lengths).schedule is None


def test_a_plan_for_one_dtype_serves_caches_of_another(kernels: None) -> None:
    call = float8(cached(), "k_cache", "v_cache")
    want = headway.flash_attn_with_kvcache(**call.kwargs, backend="reference")
    torch.testing.assert_close(run_planned(call, step_plan()), want)


# --- choosing -------------------------------------------------------------------------------------------


def test_it_is_asked_first_on_sm90(kernels: None) -> None:
    from tests.stand_ins import installed

    with installed("sm90"):
        for call in (cached(), dense()):
            problem = call.problem()
            assert next(dispatch.candidates(problem, None)) == "hopper"
            explanation = dispatch.explain(problem)
            assert explanation.chosen == "hopper"
            kernel = "decode" if call.function == "kvcache" else "prefill"
            assert f"-> hopper      yes ({kernel} kernel)" in str(explanation)
    assert not hopper.refusals(cached().problem())


def test_where_it_cannot_run_it_says_on_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    provider = providers.get("hopper")
    assert "compute capability 9.0" in str(provider.unavailable(torch.device("cpu")))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert "this device has 10.0" in str(provider.unavailable(torch.device("cuda")))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert provider.unavailable(torch.device("cuda")) is None
    monkeypatch.setattr(hopper, "_triton_version", lambda: (3, 5))
    assert provider.unavailable(torch.device("cuda")) == "needs triton 3.6 or newer"
