"""Arguments that attention packages accept and then drop, misread or act on by chance: here they count.

Each test is a trap that callers of these packages have fallen into. Where a package is to be kept from
it, a stand-in with the package's signature and habits takes its place.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import headway
from headway import InvalidInputError, UnsupportedError, interface, providers
from headway.compat import flash_attn_interface, sgl_kernel
from headway.errors import HeadwayError
from headway.plan import Plan
from tests.calls import FUNCTIONS, Call, assert_matches
from tests.providers import feature_calls
from tests.providers.feature_calls import cumulative, int32
from tests.stand_ins import CALLS, installed


@pytest.fixture(autouse=True)
def _no_kernels_for_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that run on a CPU only to be tested are no choice here."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def cache(**changes: Any) -> dict[str, Any]:
    """Two sequences over five pages, one query token each."""
    return {
        "q": normal(1, 2, 1, 4, 16),
        "k_cache": normal(2, 5, 8, 2, 16),
        "v_cache": normal(3, 5, 8, 2, 16),
        "cache_seqlens": int32(14, 5),
        "page_table": torch.tensor([[3, 0], [4, 1]], dtype=torch.int32),
        "causal": True,
    } | changes


def ragged(**changes: Any) -> dict[str, Any]:
    return {
        "q": normal(1, 7, 4, 16),
        "k": normal(2, 20, 2, 16),
        "v": normal(3, 20, 2, 16),
        "cu_seqlens_q": cumulative((3, 4)),
        "cu_seqlens_k": cumulative((12, 8)),
    } | changes


def dense(**changes: Any) -> dict[str, Any]:
    tensors = {
        "q": normal(1, 2, 5, 4, 16),
        "k": normal(2, 2, 9, 2, 16),
        "v": normal(3, 2, 9, 2, 16),
    }
    return tensors | changes


def alibi(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any, aux: Any) -> Any:
    return score - aux[0][h] * (q_idx - kv_idx)


SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])


def explicit(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float | None = None) -> Tensor:
    """Plain attention of one sequence, (tokens, heads, width) each, with ``bias`` (Hq, Sq, Sk) added."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return torch.einsum("hqk,khd->qhd", (scores + bias).softmax(-1), v)


# --- every argument counts ----------------------------------------------------------------------------

PUBLIC: list[Callable[..., Any]] = [
    headway.flash_attn_func,
    headway.flash_attn_varlen_func,
    headway.flash_attn_with_kvcache,
    headway.flash_attn_combine,
    headway.get_scheduler_metadata,
]
COMPAT = [
    getattr(module, name)
    for module in (sgl_kernel, flash_attn_interface)
    for name in module.__all__
    if name != "is_fa3_supported"
]


@pytest.mark.parametrize("function", PUBLIC + COMPAT, ids=lambda f: f"{f.__module__}.{f.__name__}")
def test_no_function_swallows_what_it_does_not_know(function: Callable[..., Any]) -> None:
    """SGLang's router takes sfq, sfk, sfv, rel_bias and others with ver=3, and drops them."""
    kinds = {parameter.kind for parameter in inspect.signature(function).parameters.values()}
    assert not kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}
    for name in ("sfq", "sfk", "sfv", "rel_bias", "rel_bias_prep_cache"):
        with pytest.raises(TypeError, match=name):
            function(**{name: torch.ones(1)})


#: What to pass for an argument, beside the call of its function, so that the call means something else.
MEANINGFUL: dict[str, Any] = {
    "softmax_scale": 0.5,
    "causal": False,
    "qv": lambda a: normal(9, *a["q"].shape[:-1], 16),
    "window_size": (2, 1),
    "attention_chunk": 4,
    "softcap": 2.0,
    "num_splits": 7,
    "pack_gqa": True,
    "deterministic": True,
    "sm_margin": 3,
    "return_attn_probs": True,
    "return_lse": True,
    "return_softmax_lse": True,
    "sinks": SLOPES,
    "learnable_sink": SLOPES,
    "score_mod": lambda a: lambda score, b, h, i, j, aux: score * 2,
    "mask_mod": lambda a: lambda b, h, i, j: i > j,
    "seqused_q": int32(1, 2),
    "seqused_k": int32(3, 4),
    "max_seqlen_q": 6,
    "max_seqlen_k": 19,
    "out": lambda a: torch.empty_like(a["q"]),
    "ver": 4,
    "backend": "reference",
    "cache_batch_idx": int32(1, 0),
    "cache_leftpad": int32(2, 1),
}

#: Arguments that only work together with others, each with its whole company.
TOGETHER: dict[str, Any] = {
    "only_qv": lambda a: {"qv": normal(9, *a["q"].shape[:-1], 16), "only_qv": True},
    "aux_tensors": lambda a: {"score_mod": alibi, "aux_tensors": [SLOPES]},
    **{
        f"{n}_descale": lambda a, n=n: {
            **{
                key: a[key].to(torch.float8_e4m3fn)
                for key in a
                if key[0] in "kv" and key != "v_new"
            },
            "q": a["q"].to(torch.float8_e4m3fn),
            f"{n}_descale": torch.full((2, 2), 0.5),
        }
        for n in "qkv"
    },
    "k": lambda a: {n: normal(8, 2, 1, 2, 16) for n in "kv"},
    "v": lambda a: {n: normal(8, 2, 1, 2, 16) for n in "kv"},
    "rotary_cos": lambda a: _rotated(),
    "rotary_sin": lambda a: _rotated(),
    "rotary_interleaved": lambda a: _rotated(rotary_interleaved=False),
    "rotary_seqlens": lambda a: _rotated(rotary_seqlens=int32(1, 2)),
    "cu_seqlens_q": lambda a: {"q": normal(7, 2, 4, 16), "cu_seqlens_q": cumulative((1, 1))},
    "cu_seqlens_k_new": lambda a: {
        **{n: normal(8, 3, 2, 16) for n in "kv"},
        "cu_seqlens_k_new": cumulative((1, 2)),
    },
    "scheduler_metadata": lambda a: {"scheduler_metadata": _plan(a)},
}

#: Arguments that are refused, with what to do instead.
REFUSED = {
    "gather_kv_indices": torch.zeros(2, 2, dtype=torch.int32),
    "block_sparse_tensors": object(),
    "aux_scalars": [1.0],
}

#: Hints for speed that no provider needs: results do not depend on them.
ONLY_HINTS = {"min_seqlen_k", "seqlen_k_per_split", "disable_scheduler_metadata"}


def _rotated(**more: Any) -> dict[str, Any]:
    angle = torch.rand(30, 8, generator=torch.Generator().manual_seed(5))
    new = {n: normal(8, 2, 1, 2, 16) for n in "kv"}
    return new | {"rotary_cos": angle.cos(), "rotary_sin": angle.sin()} | more


def _plan(a: dict[str, Any], **changes: Any) -> Plan:
    """A plan for these arguments of a public function, or for others close by."""
    function = next(f for name, f in FUNCTIONS.items() if name == _function_of(a))
    p = _problem(function, a)
    arguments = {
        "batch_size": p.batch_size,
        "max_seqlen_q": p.max_seqlen_q,
        "max_seqlen_k": p.max_seqlen_k,
        "num_heads_q": p.num_q_heads,
        "num_heads_kv": p.num_kv_heads,
        "headdim": p.head_dim,
        "cache_seqlens": int32(*[5] * p.batch_size),
        "page_size": p.page_size,
        "causal": p.mask.causal,
    }
    return headway.get_scheduler_metadata(**arguments | changes)


def _function_of(a: dict[str, Any]) -> str:
    if "k_cache" in a:
        return "kvcache"
    return "varlen" if "cu_seqlens_k" in a else "dense"


def _problem(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    bound = inspect.signature(function).bind(**arguments)
    bound.apply_defaults()
    return interface._BUILDERS[function](SimpleNamespace(**bound.arguments))


BASES = {
    "flash_attn_func": dense,
    "flash_attn_varlen_func": ragged,
    "flash_attn_with_kvcache": cache,
}


def _optional() -> Iterator[Any]:
    for function in PUBLIC[:3]:
        base = BASES[function.__name__]()
        for name in inspect.signature(function).parameters:
            if name not in base or name == "causal":
                yield pytest.param(function, name, id=f"{function.__name__}-{name}")


@pytest.mark.parametrize(("function", "name"), list(_optional()))
def test_every_argument_reaches_the_problem_or_is_refused(
    function: Callable[..., Any], name: str
) -> None:
    """sgl_kernel accepts ver, score_mod and aux_tensors, among others, and passes on none of them."""
    base = BASES[function.__name__]()
    if name in REFUSED:
        with pytest.raises(UnsupportedError, match=name):
            function(**base, **{name: REFUSED[name]})
        return
    if name in ONLY_HINTS:
        value = True if name.startswith("disable") else 1
        assert torch.equal(function(**base, **{name: value}), function(**base))
        return
    if name in ("page_table", "cu_seqlens_k"):
        return  # test_pages_beside_ragged_queries_are_read has them
    if name in TOGETHER:
        company = TOGETHER[name](base)
        without = {n: v for n, v in company.items() if n != name}
        if name in ("k", "v", "rotary_cos", "rotary_sin", "cu_seqlens_q", "cu_seqlens_k_new"):
            with pytest.raises(HeadwayError):
                function(**base | without)
            without = {}
    else:
        value = MEANINGFUL[name]
        company = {name: value(base) if callable(value) else value}
        without = {"causal": True} if name == "causal" else {}
    assert _differ(_problem(function, base | company), _problem(function, base | without)), name


def _differ(a: Any, b: Any) -> bool:
    """Whether two problems ask for different things."""
    for field in dataclasses.fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if isinstance(x, Tensor) and isinstance(y, Tensor):
            if x.dtype != y.dtype or x.shape != y.shape or not torch.equal(x.float(), y.float()):
                return True
        elif dataclasses.is_dataclass(x) and dataclasses.is_dataclass(y):
            if type(x) is not type(y) or _differ(x, y):
                return True
        elif x is not y and not (isinstance(x, (int, float, str)) and x == y):
            if isinstance(x, tuple) and isinstance(y, tuple) and not x and not y:
                continue
            return True
    return False


# --- 1, 2, 3: the version is a choice of provider, never an ignored flag ------------------------------


@pytest.mark.parametrize("ver", [3, 4])
@pytest.mark.parametrize("module", [headway, sgl_kernel])
def test_score_mod_and_its_tensors_count_with_either_version(module: Any, ver: int) -> None:
    a = cache(cache_seqlens=int32(16, 16))
    got = module.flash_attn_with_kvcache(**a, score_mod=alibi, aux_tensors=[SLOPES], ver=ver)
    distance = 15 - torch.arange(16)
    bias = -SLOPES[:, None, None] * distance
    for b in range(2):
        pages = a["page_table"][b].long()
        k, v = (a[n][pages].flatten(0, 1) for n in ("k_cache", "v_cache"))
        torch.testing.assert_close(got[b], explicit(a["q"][b], k, v, bias), atol=1e-5, rtol=1e-5)


def test_max_seqlen_k_is_a_promise_that_is_kept_or_refused() -> None:
    with pytest.raises(InvalidInputError, match="max_seqlen_k"):
        headway.flash_attn_with_kvcache(**cache(), max_seqlen_k=9)


@pytest.mark.parametrize(
    "more",
    [
        {"attention_chunk": 4},
        {"rotary_interleaved": False},
        {"rotary_interleaved": True},
        {"cu_seqlens_k_new": cumulative((1, 2))},
        {"only_qv": True},
        {"sm_margin": 1},
    ],
    ids=str,
)
def test_what_sglangs_version_4_drops_counts(more: dict[str, Any]) -> None:
    """attention_chunk, rotary_interleaved, cu_seqlens_k_new, only_qv, sm_margin."""
    (name,) = more
    a = cache()
    if name == "rotary_interleaved":
        a |= _rotated(**more)
    elif name in TOGETHER:
        a |= TOGETHER[name](a)
    else:
        a |= more
    fresh = functools.partial(_on_copies, headway.flash_attn_with_kvcache)
    got = fresh(a, ver=4)
    torch.testing.assert_close(got, fresh(a, backend="reference"), atol=1e-5, rtol=1e-5)
    if name == "sm_margin":
        return  # a hint
    other = {n: v for n, v in a.items() if n != name}
    if name == "rotary_interleaved":
        other[name] = not a[name]
    elif name == "cu_seqlens_k_new":
        other |= {n: a[n][:2, None] for n in "kv"}
    assert not torch.allclose(got, fresh(other, ver=4), atol=1e-3)


def _on_copies(function: Callable[..., Any], a: dict[str, Any], **more: Any) -> Any:
    copies = {n: t.clone() if isinstance(t, Tensor) else t for n, t in a.items()}
    return function(**copies, **more)


def test_a_version_runs_its_own_package_through_the_old_import_line_too() -> None:
    """sgl_kernel takes ver=4 and runs FlashAttention 3."""
    a = {n: t.bfloat16() if t.is_floating_point() else t for n, t in dense().items()}
    for ver, name in ((4, "fa4._flash_attn_fwd"), (3, "fa3.")):
        with installed("sm90", "fa4", "fa3"):
            headway.flash_attn_func(**_wide(a), ver=ver)
            assert name in CALLS[-1][0], CALLS[-1][0]
            q, k, v = (t.flatten(0, 1) for t in _wide(a).values())
            cu_q, cu_k = int32(0, 5, 10), int32(0, 9, 18)
            sgl_kernel.flash_attn_varlen_func(q, k, v, cu_q, cu_k, ver=ver)
            assert name in CALLS[-1][0], CALLS[-1][0]


def _wide(a: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.repeat(1, 1, 1, 4) for name, tensor in a.items()}


# --- 4, 5: pages, and what a fallback would drop ------------------------------------------------------


@pytest.mark.parametrize("module", [headway, sgl_kernel])
def test_pages_beside_ragged_queries_are_read(module: Any) -> None:
    """sgl_kernel's varlen function has a page_table and hands its kernel none."""
    a = cache()
    lengths = a["cache_seqlens"]
    q, cu = normal(4, 3, 4, 16), cumulative((1, 2))
    arguments = {"page_table": a["page_table"], "seqused_k": lengths, "causal": True}
    if module is sgl_kernel:
        got = module.flash_attn_varlen_func(q, a["k_cache"], a["v_cache"], cu, cu, **arguments)
    else:
        got = module.flash_attn_varlen_func(q, a["k_cache"], a["v_cache"], cu, **arguments)
    for b, rows in enumerate((slice(0, 1), slice(1, 3))):
        n = int(lengths[b])
        k, v = (a[x][a["page_table"][b].long()].flatten(0, 1)[:n] for x in ("k_cache", "v_cache"))
        seen = torch.arange(n) <= torch.arange(n - len(q[rows]), n)[:, None]
        bias = torch.zeros(seen.shape).masked_fill(~seen, -math.inf)
        torch.testing.assert_close(got[rows], explicit(q[rows], k, v, bias), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("page_table", "pages of 64, ragged queries"),
        ("seqused_q", "ragged seqused_q"),
        ("seqused_k", "ragged seqused_k"),
        ("sinks", "ragged sinks"),
        ("qv", "dense latent"),
        ("q_descale", "ragged float8"),
        ("attention_chunk", "ragged chunk"),
    ],
)
def test_no_fallback_to_a_package_that_would_drop_an_argument(name: str, call: str) -> None:
    """Without FlashAttention 3, sgl_kernel calls FlashAttention 2 without these."""
    kwargs = feature_calls.named(call).kwargs
    assert name in kwargs
    with installed("sm90", "fa2"), pytest.raises(UnsupportedError):
        FUNCTIONS[feature_calls.named(call).function](**kwargs)
    assert not [entry for entry in CALLS if entry[0].startswith("fa2")]


# --- 6: the batch of an int ---------------------------------------------------------------------------


def test_an_int_of_cache_seqlens_is_for_every_sequence_of_the_batch() -> None:
    """Others expand it to q.shape[0], or to the number of pages."""
    a = cache(cache_seqlens=11)
    every = cache(cache_seqlens=int32(11, 11))
    assert torch.equal(
        headway.flash_attn_with_kvcache(**a), headway.flash_attn_with_kvcache(**every)
    )
    tokens = {"q": normal(4, 3, 4, 16), "cu_seqlens_q": cumulative((1, 2)), "max_seqlen_q": 2}
    got = headway.flash_attn_with_kvcache(**a | tokens)
    assert torch.equal(got, headway.flash_attn_with_kvcache(**every | tokens))
    rows = {"k_cache": normal(5, 6, 20, 2, 16), "v_cache": normal(6, 6, 20, 2, 16)}
    picked = {"page_table": None, "cache_batch_idx": int32(4, 1)}
    got = headway.flash_attn_with_kvcache(**a | rows | picked)
    assert torch.equal(got, headway.flash_attn_with_kvcache(**every | rows | picked))


# --- 7: one return contract ---------------------------------------------------------------------------

PACKAGES = [
    ("fa2", "sm90", "fa2"),
    ("fa3", "sm90", "sgl"),
    ("fa3", "sm90", "fa3"),
    ("fa4", "sm90", "fa4"),
    ("fa4", "sm90", "fa4_public"),
    ("flashinfer", "sm90", "flashinfer"),
    ("mate", "mp31", "mate"),
]


@pytest.mark.parametrize(("provider", "kind", "package"), PACKAGES)
@pytest.mark.parametrize("name", ["dense causal", "ragged causal", "pages of 256, ragged queries"])
def test_every_package_returns_out_or_out_and_lse(
    name: str, provider: str, kind: str, package: str
) -> None:
    """The packages return one, two or four values, by version and by flag."""
    call = feature_calls.named(name)
    with installed(kind, package):
        run = functools.partial(FUNCTIONS[call.function], backend=provider)
        alone = run(**call.copy().kwargs)
        out, lse = run(**call.copy().kwargs, return_lse=True)
    assert isinstance(alone, Tensor)
    assert alone.shape == out.shape
    assert lse.dtype == torch.float32
    assert lse.shape == call.problem().lse_shape


# --- 8, 9, 10: windows --------------------------------------------------------------------------------

WINDOWS: list[Any] = [
    (5, -1),
    (5, None),
    (-1, 3),
    (None, 3),
    [5, 3],
    [5, -1],
    (-1, 0),
    (0, -1),
    (0, 0),
    (-1, -1),
    (None, None),
    [-1, -1],
]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_every_form_of_a_window_means_the_same_everywhere(window: Any, causal: bool) -> None:
    """-1 is unbounded in FlashAttention 2 and 3 and an offset in 4, where (-1, 0) gives zeros."""
    q, k, v = (normal(seed, 9, 2, 64, dtype=torch.bfloat16) for seed in (1, 2, 3))
    left, right = (math.inf if side in (-1, None) else side for side in window)
    distance = torch.arange(9) - torch.arange(9)[:, None]
    seen = (distance >= -left) & (distance <= (0 if causal else right))
    bias = torch.zeros(9, 9).masked_fill(~seen, -math.inf)
    want = explicit(q.float(), k.float(), v.float(), bias)
    kwargs = {"q": q[None], "k": k[None], "v": v[None], "window_size": window, "causal": causal}
    for backend in ("reference", "cpu"):
        got = headway.flash_attn_func(**kwargs, backend=backend)
        torch.testing.assert_close(got[0].float(), want, atol=2e-2, rtol=2e-2)
    for provider, kind, package in PACKAGES:
        with installed(kind, package):
            if providers.get(provider).reasons_against(Call("dense", kwargs).problem()):
                continue
            got = headway.flash_attn_func(**kwargs, backend=provider)
        torch.testing.assert_close(got[0].float(), want, atol=2e-2, rtol=2e-2, msg=provider)


def test_a_mask_mod_joins_causal_and_window() -> None:
    """FlashAttention 4 takes a mask_mod in place of both, without a word."""

    def even(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (q_idx - kv_idx) % 2 == 0

    q, k, v = (normal(seed, 9, 2, 16) for seed in (1, 2, 3))
    distance = torch.arange(9)[:, None] - torch.arange(9)
    seen = (distance % 2 == 0) & (distance >= 0) & (distance <= 5)
    want = explicit(q, k, v, torch.zeros(9, 9).masked_fill(~seen, -math.inf))
    got = headway.flash_attn_func(
        q[None], k[None], v[None], causal=True, window_size=(5, 0), mask_mod=even
    )
    torch.testing.assert_close(got[0], want, atol=1e-5, rtol=1e-5)
    with installed("sm90", "fa4"), pytest.raises(UnsupportedError, match="mask_mod"):
        headway.flash_attn_func(q[None], k[None], v[None], mask_mod=even, backend="fa4")


# --- 11, 12: float8 -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["q_descale", "k_descale", "v_descale"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_descales_beside_wide_inputs_are_refused(name: str, dtype: torch.dtype) -> None:
    """FlashAttention 3 ignores them there."""
    a = {n: t.to(dtype) for n, t in dense().items()}
    with pytest.raises(InvalidInputError, match=f"{name}: got a tensor beside {name[0]} of"):
        headway.flash_attn_func(**a, **{name: torch.ones(2, 2)})


@pytest.mark.parametrize("dv", [80, 128, 256])
def test_float8_with_values_wider_than_keys_is_refused_by_fa3(dv: int) -> None:
    """Its host check passes them, and a kernel for 64-wide values runs."""
    q, k, v = (
        normal(s, 1, 5, 2, d).to(torch.float8_e4m3fn) for s, d in ((1, 64), (2, 64), (3, dv))
    )
    with installed("sm90", "sgl"), pytest.raises(UnsupportedError, match=f"head_dim=64/{dv}"):
        headway.flash_attn_func(q, k, v, backend="fa3")


# --- 13, 14: pages and caches -------------------------------------------------------------------------


def test_block_sparsity_is_refused_with_what_to_use_instead() -> None:
    """FlashAttention 4 reads logical blocks as physical pages."""
    a = cache(cu_seqlens_q=cumulative((1, 1)), q=normal(1, 2, 4, 16))
    names = {"k_cache": "k", "v_cache": "v", "cache_seqlens": "seqused_k"}
    a = {names.get(name, name): value for name, value in a.items()}
    with pytest.raises(UnsupportedError, match="block_sparse_tensors is not supported: mask_mod"):
        headway.flash_attn_varlen_func(**a, block_sparse_tensors=object())


@pytest.mark.parametrize("columns", [64, 68])
def test_a_cache_is_never_copied(columns: int) -> None:
    """FlashAttention 4 copies all of a cache whose rows lie at odd strides: refused, with the strides."""
    wide = normal(2, 5, 16, 2, columns, dtype=torch.bfloat16)
    a = cache(q=normal(1, 2, 1, 4, 64).bfloat16(), k_cache=wide[..., :64], v_cache=wide[..., :64])
    with installed("sm90", "fa4"):
        if columns == 64:
            headway.flash_attn_with_kvcache(**a, backend="fa4")
            assert CALLS[-1][1]["k"].data_ptr() == wide.data_ptr()
            return
        with pytest.raises(UnsupportedError, match=r"strides \(2176, 136, 68, 1\).*copied"):
            headway.flash_attn_with_kvcache(**a, backend="fa4")
    got = headway.flash_attn_with_kvcache(**a)
    torch.testing.assert_close(got, headway.flash_attn_with_kvcache(**a, backend="reference"))


@pytest.mark.parametrize(("provider", "kind", "package"), PACKAGES)
def test_packages_are_handed_the_cache_itself(provider: str, kind: str, package: str) -> None:
    call = feature_calls.named("pages of 256, ragged queries")
    with installed(kind, package):
        FUNCTIONS["kvcache"](**call.kwargs, backend=provider)
        addresses = {t.data_ptr() for _, a in CALLS for t in _tensors(a.values())}
    assert {call.kwargs["k_cache"].data_ptr(), call.kwargs["v_cache"].data_ptr()} <= addresses


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from _tensors(value)


# --- 15, 16: plans carry their key --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_heads_q", 8),
        ("num_heads_kv", 1),
        ("headdim", 32),
        ("headdim_v", 32),
        ("page_size", 4),
        ("page_size", None),
        ("causal", False),
        ("window_size", (4, 0)),
        ("attention_chunk", 4),
        ("max_seqlen_q", 2),
        ("max_seqlen_k", 32),
        ("batch_size", 3),
    ],
)
def test_a_plan_for_another_call_is_refused_with_what_differs(name: str, value: Any) -> None:
    """Others accept any buffer of the right size, and read beyond their partial results."""
    a = cache()
    changes: dict[str, Any] = {name: value}
    if name == "batch_size":
        changes["cache_seqlens"] = int32(5, 5, 5)
    headway.flash_attn_with_kvcache(**a, scheduler_metadata=_plan(a))
    with pytest.raises(InvalidInputError, match=r"scheduler_metadata.* \(plan\) / .* \(call\)"):
        headway.flash_attn_with_kvcache(**a, scheduler_metadata=_plan(a, **changes))


def test_a_tensor_is_no_plan() -> None:
    with pytest.raises(InvalidInputError, match="scheduler_metadata: got Tensor"):
        headway.flash_attn_with_kvcache(**cache(), scheduler_metadata=int32(1, 2, 3))  # type: ignore[arg-type]


def test_pieces_are_bounded_by_the_work_there_is() -> None:
    """FlashAttention 3 reckons with one sequence, and sizes partial results for 128 pieces of every row."""
    from headway.plan import plan_splits

    for batch in (1, 8, 64, 500):
        lengths = torch.randint(1, 100_000, (batch,), dtype=torch.int32)
        pieces = plan_splits(lengths, num_kv_heads=8, num_workers=132)
        assert int(pieces.sum()) * 8 <= 132 + 8 * batch


# --- 20, 21, 23, 24, 27, 28 ---------------------------------------------------------------------------


def test_an_automatic_number_of_splits_is_one_that_the_kernel_has() -> None:
    """FlashAttention 4 chooses several on SM90, and fails its own assertion."""
    for kind, wanted in (("sm90", 1), ("sm100", 0)):
        with installed(kind, "fa4"):
            FUNCTIONS["kvcache"](**feature_calls.pages(64).kwargs, num_splits=0, backend="fa4")
            assert CALLS[-1][1]["num_splits"] == wanted


def test_a_call_is_checked_whatever_ran_before_it() -> None:
    """FlashAttention 4 checks only what it compiles anew."""
    a = dense()
    headway.flash_attn_func(**a)
    for wrong in ({"sinks": torch.ones(3)}, {"window_size": (-5, 0)}, {"softcap": -1.0}):
        for _ in range(2):
            with pytest.raises(InvalidInputError):
                headway.flash_attn_func(**a, **wrong)


@pytest.mark.parametrize(("provider", "kind", "package"), PACKAGES)
@pytest.mark.parametrize("name", ["dense", "ragged"])
def test_rows_that_see_no_key_have_minus_infinity(
    name: str, provider: str, kind: str, package: str
) -> None:
    """Others write +inf in some kernels and -inf in others."""
    q, k = normal(1, 2, 5, 2, 64).bfloat16(), normal(2, 2, 3, 2, 64).bfloat16()
    kwargs: dict[str, Any] = {"q": q, "k": k, "v": k, "causal": True, "return_lse": True}
    blind: Any = (..., slice(0, 2))
    run: Callable[..., Any] = headway.flash_attn_func
    if name == "ragged":
        run, blind = headway.flash_attn_varlen_func, (..., [0, 1, 5, 6])
        kwargs |= {"q": q.flatten(0, 1), "k": k.flatten(0, 1), "v": k.flatten(0, 1)}
        kwargs |= {"cu_seqlens_q": cumulative((5, 5)), "cu_seqlens_k": cumulative((3, 3))}
    with installed(kind, package):
        out, lse = run(**kwargs, backend=provider)
    assert (lse[blind] == -math.inf).all()
    assert lse.isfinite().sum() == lse.numel() - 2 * 2 * 2
    empty = out[:, :2] if name == "dense" else out[[0, 1, 5, 6]]
    assert (empty == 0).all()


@pytest.mark.parametrize("empty", [math.inf, math.nan, -math.inf])
def test_merging_takes_any_sign_of_an_empty_part_for_empty(empty: float) -> None:
    outs = [normal(1, 1, 3, 2, 8), torch.full((1, 3, 2, 8), math.nan)]
    lses = [normal(2, 1, 2, 3), torch.full((1, 2, 3), empty)]
    out, lse = headway.merge_states(outs, lses)
    torch.testing.assert_close(out, outs[0])
    torch.testing.assert_close(lse, lses[0])
    partial = torch.stack([t.float() for t in outs])
    out, _ = headway.flash_attn_combine(
        partial, torch.stack(lses).transpose(-1, -2), return_lse=True
    )
    torch.testing.assert_close(out, outs[0])
    out, lse = headway.merge_states([outs[1]], [lses[1]])
    assert (out == 0).all()
    assert (lse == -math.inf).all()


def test_without_causal_all_queries_are_rotated_as_the_first() -> None:
    """The contract of FlashAttention 3, which is surprising and therefore tested."""
    new = _rotated() | {n: normal(8, 2, 3, 2, 16) for n in "kv"}
    a = cache(q=normal(1, 2, 3, 4, 16), causal=False, cache_seqlens=int32(10, 2)) | new
    got = _on_copies(headway.flash_attn_with_kvcache, a)
    alone = [
        _on_copies(headway.flash_attn_with_kvcache, a | {"q": a["q"][:, i : i + 1]})
        for i in range(3)
    ]
    torch.testing.assert_close(got, torch.cat(alone, 1), atol=1e-5, rtol=1e-5)
    causal = _on_copies(headway.flash_attn_with_kvcache, a | {"causal": True})
    assert not torch.allclose(got[:, 1:], causal[:, 1:], atol=1e-3)


@pytest.mark.parametrize(("provider", "kind", "package"), PACKAGES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_out_is_filled_whatever_the_package_takes(
    dtype: torch.dtype, provider: str, kind: str, package: str
) -> None:
    """sgl_kernel retries without ``out`` where a build has none, and its version 4 forgets it for MLA."""
    call = feature_calls.named("dense causal")
    with installed(kind, package):
        out = torch.full(call.problem().out_shape, math.nan, dtype=dtype)
        assert FUNCTIONS["dense"](**call.kwargs, out=out, backend=provider) is out
    want = FUNCTIONS["dense"](**call.kwargs, backend="reference")
    torch.testing.assert_close(out.float(), want.float(), atol=2e-2, rtol=2e-2)


def test_out_is_filled_for_absorbed_mla_with_padded_heads() -> None:
    call = feature_calls.one_latent(heads=12)
    for provider, kind, package in (("mate", "mp31", "mate"), ("aiter", "gfx950", "aiter")):
        one = feature_calls.latent(12) if provider == "mate" else call
        one.label = "absorbed MLA"
        with installed(kind, package):
            if provider == "mate":
                assert_matches(one.run(provider), one.run("reference"), one)
                continue
            out = torch.full(one.problem().out_shape, math.nan, dtype=torch.bfloat16)
            got = FUNCTIONS["kvcache"](**one.copy().kwargs, out=out, backend=provider)
        assert got is out
        want = FUNCTIONS["kvcache"](**one.copy().kwargs, backend="reference")
        torch.testing.assert_close(out, want, atol=2e-2, rtol=2e-2)
