"""Attention calls for tests: every feature, drawn together, as keyword arguments of a public function.

A :class:`Call` can be run by any provider on fresh copies of its tensors, so that in-place appends of
one run never reach another. Unused pages, tails and paddings hold NaN and junk on purpose.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import torch
from torch import Tensor

import headway
from headway import interface, reference
from headway.problem import Problem, query_lengths

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "dense": headway.flash_attn_func,
    "varlen": headway.flash_attn_varlen_func,
    "kvcache": headway.flash_attn_with_kvcache,
}

#: What rows of ``out`` hold before a call; rows of padding must still hold it afterwards.
UNWRITTEN = 7.0


@dataclass
class Call:
    """One call: which function, and its arguments but for ``out``, ``backend`` and the LSE flag."""

    function: str
    kwargs: dict[str, Any]
    label: str = ""

    def copy(self, device: str = "cpu") -> Call:
        kwargs = {k: _copied(v, device) for k, v in self.kwargs.items()}
        k, v = (self.kwargs.get(name) for name in ("k_cache", "v_cache"))
        if k is not None and v is not None and k.data_ptr() == v.data_ptr() and k.numel():
            kwargs["v_cache"] = kwargs["k_cache"][..., : v.shape[-1]]  # values that are keys
        return Call(self.function, kwargs, self.label)

    def problem(self) -> Problem:
        """The problem of this call, as the interface builds it."""
        function = FUNCTIONS[self.function]
        bound = interface.inspect.signature(function).bind(**self.kwargs)
        bound.apply_defaults()
        return interface._BUILDERS[function](SimpleNamespace(**bound.arguments))

    def run(self, backend: str, device: str = "cpu") -> Result:
        """Run on copies; the result includes the caches as the call left them."""
        call = self.copy(device)
        problem = call.problem()
        out = torch.full(problem.out_shape, UNWRITTEN, dtype=problem.out_dtype, device=device)
        got, lse = FUNCTIONS[self.function](
            **call.kwargs, out=out, return_lse=True, backend=backend
        )
        assert got is out, "the caller's out must be the one that is returned"
        caches = tuple(call.kwargs[n].cpu() for n in ("k_cache", "v_cache") if n in call.kwargs)
        return Result(out.cpu(), lse.cpu(), caches, _used_rows(problem).cpu())

    def low_precision(self) -> Tensor:
        """What plain torch in the call's own precision gives: the yardstick for rounding errors."""
        problem = self.copy().problem()
        dtype = problem.q.dtype if problem.q.dtype.itemsize > 1 else torch.bfloat16
        return reference.attention(problem, dtype=dtype)[0]


@dataclass
class Result:
    out: Tensor
    lse: Tensor
    caches: tuple[Tensor, ...]
    used: Tensor = field(repr=False)  # (B, Sq) or (total_q,): rows of out that belong to a query


def _copied(value: Any, device: str) -> Any:
    if isinstance(value, Tensor):
        # Keep strides: a test may pass non-contiguous and expanded tensors on purpose.
        once = value[tuple(slice(1) if stride == 0 else slice(None) for stride in value.stride())]
        twin = torch.empty_strided(once.shape, value.stride(), dtype=value.dtype, device=device)
        return twin.copy_(once).expand(value.shape)
    if isinstance(value, list):
        return [_copied(item, device) for item in value]
    return value


def _used_rows(problem: Problem) -> Tensor:
    lengths = query_lengths(problem)
    if problem.cu_seqlens_q is None:
        return torch.arange(problem.q.shape[1], device=lengths.device)[None] < lengths[:, None]
    used = torch.zeros(problem.q.shape[0], dtype=torch.bool, device=lengths.device)
    for start, length in zip(problem.cu_seqlens_q.tolist(), lengths.tolist(), strict=False):
        used[start : start + length] = True
    return used


# --- comparison ---------------------------------------------------------------------------------------


def assert_matches(result: Result, expected: Result, call: Call) -> None:
    """The error-relative rule: no further from float64 than torch in the same precision, times two.

    ``max|out - ref| <= r * max|pt - ref| + 2 * max|(ref + 0.3 - 0.3) - ref|`` with r = 2, 3 with softcap,
    as FlashAttention's own tests have it; rows that belong to no query must be untouched.
    """
    used, softcap = expected.used, call.kwargs.get("softcap", 0.0)
    reference_out = expected.out[used].double()
    got = result.out[used].double()
    assert torch.isfinite(got).all(), f"non-finite output: {call.label}"
    if got.numel():
        rounded = reference_out.to(result.out.dtype)
        atol = 2 * (rounded + 0.3 - 0.3 - rounded).abs().max().double()
        plain = call.low_precision()[used].double()
        allowed = (3 if softcap else 2) * (plain - reference_out).abs().max() + atol + 1e-6
        error = (got - reference_out).abs().max()
        assert error <= allowed, f"error {error:.3e} > {allowed:.3e}: {call.label}"
    assert (result.out[~used] == UNWRITTEN).all(), f"rows of padding were written: {call.label}"
    _assert_lse(result, expected, call)
    for cache, want in zip(result.caches, expected.caches, strict=True):
        assert_caches_equal(cache, want, call)


def _assert_lse(result: Result, expected: Result, call: Call) -> None:
    used = expected.used
    rows = used if used.dim() == 1 else used[:, None, :].expand_as(expected.lse)
    got = result.lse[:, rows] if used.dim() == 1 else result.lse[rows]
    want = expected.lse[:, rows] if used.dim() == 1 else expected.lse[rows]
    precision = torch.finfo(call.problem().q.dtype).eps if not call.kwargs.get("softcap") else 0.0
    tolerance = 1e-4 + 0.02 * precision
    torch.testing.assert_close(
        got, want, atol=tolerance, rtol=1e-5, msg=lambda m: f"{call.label}: {m}"
    )


def assert_caches_equal(got: Tensor, want: Tensor, call: Call) -> None:
    """Appended rows equal but for one rounding of the rotation; NaN stays where nothing was written."""
    a, b = got.float(), want.float()
    assert torch.equal(a.isnan(), b.isnan()), f"written to the wrong rows: {call.label}"
    step = torch.finfo(got.dtype).eps
    torch.testing.assert_close(a, b, atol=step, rtol=2 * step, equal_nan=True)


#: Caps below the scores of :func:`capped`, about them, and so far above that they change nothing.
CAPS = (1.0, 50.0, 1e4, 1e6, 1e30)


def capped(softcap: float) -> Call:
    """A small call whose scores are some tens."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: 4 * torch.randn(1, n, 2, 64, generator=generator)
        for name, n in (("q", 5), ("k", 40), ("v", 40))
    }
    return Call("dense", {n: x.half() for n, x in tensors.items()} | {"softcap": softcap})


# --- generation -----------------------------------------------------------------------------------------


@st.composite
def masks(draw: st.DrawFn) -> dict[str, Any]:
    """causal, window and chunk arguments, all forms of them."""
    side = st.one_of(st.sampled_from([-1, None]), st.integers(0, 24))
    kind = draw(st.sampled_from(["full", "causal", "window", "chunk"]))
    if kind == "full":
        return {}
    if kind == "causal":
        return {"causal": True}
    if kind == "window":
        return {"window_size": (draw(side), draw(side)), "causal": draw(st.booleans())}
    return {"attention_chunk": draw(st.integers(1, 20)), "causal": draw(st.booleans())}


@st.composite
def calls(
    draw: st.DrawFn,
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16),
    head_dims: tuple[int, ...] = (8, 40, 64, 96),
    page_sizes: tuple[int, ...] = (1, 7, 16, 64),
    max_len: int = 70,
    mods: bool = True,
    qv: bool = True,
    float8: bool = True,
) -> Call:
    """Any call: layouts, lengths (0 and 1 among them), heads, masks, modifiers, appends, poison."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(dtypes))
    batch = draw(st.integers(1, 4))
    hkv = draw(st.sampled_from([1, 2]))
    hq = hkv * draw(st.sampled_from([1, 2, 3, 4]))
    d = draw(st.sampled_from(head_dims))
    dv = draw(st.sampled_from([d, d, *head_dims]))
    length = st.one_of(st.sampled_from([0, 1]), st.integers(0, max_len))
    seqlens_k = [draw(length) for _ in range(batch)]
    seqlens_q = [draw(st.one_of(st.just(1), length)) for _ in range(batch)]
    shape = _Shape(generator, dtype, batch, hq, hkv, d, dv, seqlens_q, seqlens_k)
    builder = draw(st.sampled_from([_dense, _varlen, _kvcache]))
    kwargs, function = builder(draw, shape, page_sizes, float8)
    kwargs |= draw(masks())
    if draw(st.booleans()):
        kwargs["sinks"] = torch.randn(hq, generator=generator)
    if draw(st.booleans()):
        kwargs["softcap"] = draw(st.sampled_from([1.0, 15.0]))
    if draw(st.booleans()):
        kwargs["softmax_scale"] = draw(st.sampled_from([0.05, 0.5]))
    if qv and draw(st.integers(0, 5)) == 0:
        kwargs["qv"] = shape.normal(*kwargs["q"].shape[:-1], dv).to(kwargs["q"].dtype)
    if mods and draw(st.integers(0, 3)) == 0:
        kwargs |= draw(st.sampled_from([_alibi, _every_other_key, _both]))(hq)
    shapes = {k: tuple(v.shape) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
    return Call(function, kwargs, f"{function} q={seqlens_q} k={seqlens_k} {dtype} {shapes}")


@dataclass
class _Shape:
    generator: torch.Generator
    dtype: torch.dtype
    batch: int
    hq: int
    hkv: int
    d: int
    dv: int
    seqlens_q: list[int]
    seqlens_k: list[int]

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def kv(self, *rows: int) -> tuple[Tensor, Tensor]:
        return self.normal(*rows, self.hkv, self.d), self.normal(*rows, self.hkv, self.dv)

    def permutation(self, n: int) -> Tensor:
        return torch.randperm(n, generator=self.generator).to(torch.int32)


def _int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _cumulative(lengths: list[int]) -> Tensor:
    return torch.nn.functional.pad(torch.cumsum(_int32(lengths), 0), (1, 0)).to(torch.int32)


def _dense(draw: st.DrawFn, s: _Shape, page_sizes: Any, float8: bool) -> tuple[dict[str, Any], str]:
    k, v = s.kv(s.batch, max(s.seqlens_k))
    q = s.normal(s.batch, max(1, max(s.seqlens_q)), s.hq, s.d)
    return {"q": q, "k": k, "v": v}, "dense"


def _varlen(
    draw: st.DrawFn, s: _Shape, page_sizes: Any, float8: bool
) -> tuple[dict[str, Any], str]:
    padding = draw(st.sampled_from([0, 3]))
    k, v = s.kv(sum(s.seqlens_k) + padding)
    used = sum(s.seqlens_k)
    k[used:], v[used:] = float("nan"), float("nan")
    kwargs: dict[str, Any] = {
        "q": s.normal(sum(s.seqlens_q) + padding, s.hq, s.d),
        "cu_seqlens_q": _cumulative(s.seqlens_q),
        "max_seqlen_q": max(s.seqlens_q) + draw(st.sampled_from([0, 5])),
    }
    if draw(st.booleans()):
        kwargs |= {"k": k, "v": v, "cu_seqlens_k": _cumulative(s.seqlens_k)}
        if draw(st.booleans()):
            kwargs["seqused_k"] = _int32([n // 2 for n in s.seqlens_k])
    else:
        kwargs |= _pages(draw, s, s.seqlens_k, s.seqlens_k, page_sizes, names=("k", "v"))
        kwargs["seqused_k"] = _int32(s.seqlens_k)
    if draw(st.booleans()):
        kwargs["seqused_q"] = _int32([(n + 1) // 2 for n in s.seqlens_q])
    return kwargs, "varlen"


def _kvcache(
    draw: st.DrawFn, s: _Shape, page_sizes: Any, float8: bool
) -> tuple[dict[str, Any], str]:
    new = draw(st.sampled_from([0, 0, 1, 5]))
    ends = [n + new for n in s.seqlens_k]
    leftpads = [draw(st.integers(0, n)) for n in s.seqlens_k] if draw(st.booleans()) else None
    if draw(st.booleans()):
        kwargs = _pages(draw, s, s.seqlens_k, ends, page_sizes, ("k_cache", "v_cache"), leftpads)
    else:
        kwargs = _rows(draw, s, ends, leftpads)
    ragged = draw(st.booleans())
    if ragged:
        kwargs["q"] = s.normal(sum(s.seqlens_q), s.hq, s.d)
        kwargs["cu_seqlens_q"] = _cumulative(s.seqlens_q)
        if draw(st.booleans()):
            kwargs["max_seqlen_q"] = max(s.seqlens_q)
    else:
        kwargs["q"] = s.normal(s.batch, draw(st.sampled_from([1, 4])), s.hq, s.d)
    kwargs["cache_seqlens"] = _int32(s.seqlens_k)
    if leftpads is not None:
        kwargs["cache_leftpad"] = _int32(leftpads)
    if new:
        kwargs |= _new_tokens(draw, s, new, ragged)
    elif float8 and draw(st.booleans()):
        _to_float8(draw, s, kwargs)
    return kwargs, "kvcache"


def _rows(
    draw: st.DrawFn, s: _Shape, ends: list[int], leftpads: list[int] | None
) -> dict[str, Any]:
    """A dense cache with more rows than sequences; what no sequence owns is NaN."""
    extra = draw(st.sampled_from([0, 2]))
    k, v = s.kv(s.batch + extra, max(ends) + draw(st.sampled_from([0, 3])))
    rows = s.permutation(s.batch + extra)[: s.batch] if extra else torch.arange(s.batch)
    for cache in (k, v):
        keep = torch.zeros(cache.shape[:2], dtype=torch.bool)
        for b, row in enumerate(rows.tolist()):
            keep[row, (leftpads[b] if leftpads else 0) : ends[b]] = True
        cache[~keep] = float("nan")
    kwargs: dict[str, Any] = {"k_cache": k, "v_cache": v}
    if extra:
        kwargs["cache_batch_idx"] = rows.to(torch.int32)
    return kwargs


def _pages(
    draw: st.DrawFn,
    s: _Shape,
    lengths: list[int],
    ends: list[int],
    page_sizes: tuple[int, ...],
    names: tuple[str, str],
    leftpads: list[int] | None = None,
) -> dict[str, Any]:
    """A page pool in random order; unused pages and tails NaN, unused table entries junk."""
    size = draw(st.sampled_from(page_sizes))
    counts = [-(-n // size) for n in ends]
    k, v = s.kv(sum(counts) + 2, size)
    table = torch.full((s.batch, max(1, *counts) + 1), 2147480000, dtype=torch.int32)
    order = s.permutation(sum(counts) + 2)
    keep = torch.zeros(k.shape[:2], dtype=torch.bool)
    taken = 0
    for b, count in enumerate(counts):
        table[b, :count] = order[taken : taken + count]
        taken += count
        at = torch.arange(leftpads[b] if leftpads else 0, ends[b])
        keep[table[b, at // size].long(), at % size] = True
        if leftpads:
            table[b, : leftpads[b] // size] = -5
    k[~keep], v[~keep] = float("nan"), float("nan")
    return {names[0]: k, names[1]: v, "page_table": table}


def _new_tokens(draw: st.DrawFn, s: _Shape, new: int, ragged: bool) -> dict[str, Any]:
    if ragged and draw(st.booleans()):
        k, v = s.kv(s.batch * new)
        kwargs: dict[str, Any] = {"k": k, "v": v, "cu_seqlens_k_new": _cumulative([new] * s.batch)}
    else:
        k, v = s.kv(s.batch, new)
        kwargs = {"k": k, "v": v}
    rotary_dim = min(s.d - s.d % 16, 32)
    if rotary_dim and draw(st.booleans()):
        angle = torch.rand(400, rotary_dim // 2, generator=s.generator) * 6.28
        kwargs["rotary_cos"], kwargs["rotary_sin"] = (
            angle.cos().to(s.dtype),
            angle.sin().to(s.dtype),
        )
        kwargs["rotary_interleaved"] = draw(st.booleans())
        if draw(st.booleans()):
            kwargs["rotary_seqlens"] = _int32([draw(st.integers(0, 99)) for _ in range(s.batch)])
    return kwargs


def _to_float8(draw: st.DrawFn, s: _Shape, kwargs: dict[str, Any]) -> None:
    """Make the caches float8 (and q too, half of the time), with descales per sequence and head."""
    names = ["k_cache", "v_cache"]
    if draw(st.booleans()) and kwargs["q"].dtype == torch.bfloat16:
        names.append("q")
    for name in names:
        kwargs[name] = kwargs[name].to(torch.float8_e4m3fn)
        scales = torch.rand(s.batch, s.hkv, generator=s.generator) + 0.5
        kwargs[f"{name[0]}_descale"] = scales


def _alibi(hq: int) -> dict[str, Any]:
    slopes = torch.tensor([2.0 ** -(i + 1) for i in range(hq)])

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any, aux: Any) -> Any:
        return score - aux[0][h] * (q_idx - kv_idx).abs()

    return {"score_mod": score_mod, "aux_tensors": [slopes]}


def _every_other_key(hq: int) -> dict[str, Any]:
    def mask_mod(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (q_idx - kv_idx) % 2 == 0

    return {"mask_mod": mask_mod}


def _both(hq: int) -> dict[str, Any]:
    return _alibi(hq) | {"mask_mod": lambda b, h, q_idx, kv_idx, aux: (q_idx + kv_idx + b) % 3 != 1}
