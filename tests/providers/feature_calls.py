"""One call for everything that capabilities speak of, alone: what providers claim is shown on these.

Lengths are ragged, one of them zero; pages lie in random order; rows that belong to no sequence hold NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tests.calls import Call

BF16, FP16, FLOAT8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn
LENGTHS, QUERIES = (150, 7, 0, 333), (150, 3, 1, 70)

#: Heads of queries and of keys in most calls.
HEADS = (4, 2)


class _Made:
    """Random tensors, each of a seed of its own."""

    def __init__(self) -> None:
        self._seed = 0

    def normal(self, *shape: int, dtype: torch.dtype = BF16) -> Tensor:
        self._seed += 1
        return torch.randn(shape, generator=torch.Generator().manual_seed(self._seed)).to(dtype)

    def order(self, n: int) -> Tensor:
        self._seed += 1
        return torch.randperm(n, generator=torch.Generator().manual_seed(self._seed)).int()


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def cumulative(lengths: tuple[int, ...]) -> Tensor:
    return torch.nn.functional.pad(torch.cumsum(int32(*lengths), 0), (1, 0)).int()


def dense(d: int = 64, dv: int = 0, heads: tuple[int, int] = HEADS, **more: Any) -> Call:
    """q (2, 70), k and v (2, 93) of ``flash_attn_func``."""
    made, dtype = _Made(), more.pop("dtype", BF16)
    q = made.normal(2, 70, heads[0], d, dtype=dtype)
    k = made.normal(2, 93, heads[1], d, dtype=dtype)
    v = made.normal(2, 93, heads[1], dv or d, dtype=dtype)
    return Call("dense", {"q": q, "k": k, "v": v} | more)


def ragged(
    d: int = 64,
    dv: int = 0,
    heads: tuple[int, int] = HEADS,
    queries: tuple[int, ...] = QUERIES,
    **more: Any,
) -> Call:
    """Everything packed, with three rows of padding behind the last sequence."""
    made, dtype = _Made(), more.pop("dtype", BF16)
    total_q, total_k = sum(queries), sum(LENGTHS)
    k = made.normal(total_k + 3, heads[1], d, dtype=dtype)
    v = made.normal(total_k + 3, heads[1], dv or d, dtype=dtype)
    k[total_k:], v[total_k:] = float("nan"), float("nan")
    kwargs = {
        "q": made.normal(total_q + 3, heads[0], d, dtype=dtype),
        "k": k,
        "v": v,
        "cu_seqlens_q": cumulative(queries),
        "cu_seqlens_k": cumulative(LENGTHS),
        "max_seqlen_q": max(queries),
        "max_seqlen_k": max(LENGTHS),
    }
    return Call("varlen", kwargs | more)


def _emptied(k: Tensor, v: Tensor, used: Tensor) -> None:
    for cache in (k, v):
        cache[~used] = float("nan")


def rows(sq: int = 1, new: int = 0, d: int = 64, leftpads: bool = False, **more: Any) -> Call:
    """A dense cache of 340 rows a sequence."""
    made, dtype = _Made(), more.pop("dtype", BF16)
    k, v = (made.normal(4, 340, HEADS[1], d, dtype=dtype) for _ in range(2))
    at = torch.arange(340)
    pads = int32(50, 3, 0, 20) if leftpads else torch.zeros(4, dtype=torch.int32)
    ends = int32(*LENGTHS)
    _emptied(k, v, (at >= pads[:, None]) & (at < (ends + new)[:, None]))
    kwargs = {"q": made.normal(4, sq, HEADS[0], d, dtype=dtype), "k_cache": k, "v_cache": v}
    kwargs["cache_seqlens"] = ends
    if leftpads:
        kwargs["cache_leftpad"] = pads
    return Call("kvcache", kwargs | _new(made, new, d, dtype) | more)


def pages(
    size: int = 64,
    sq: int = 1,
    new: int = 0,
    d: int = 64,
    dv: int = 0,
    heads: tuple[int, int] = HEADS,
    lengths: tuple[int, ...] = LENGTHS,
    **more: Any,
) -> Call:
    """A paged cache in random order. Entries of the table behind a sequence's last page point at page 0."""
    made, dtype = _Made(), more.pop("dtype", BF16)
    counts = [-(-(n + new) // size) for n in lengths]
    total = sum(counts) + 2
    k = made.normal(total, size, heads[1], d, dtype=dtype)
    v = made.normal(total, size, heads[1], dv or d, dtype=dtype)
    table = torch.zeros(len(lengths), max(counts) + 1, dtype=torch.int32)
    used = torch.zeros(total, size, dtype=torch.bool)
    for b, mine in enumerate(made.order(total)[: sum(counts)].split(counts)):
        table[b, : len(mine)] = mine
        at = torch.arange(lengths[b] + new)
        used[mine[at // size].long(), at % size] = True
    _emptied(k, v, used)
    kwargs: dict[str, Any] = {"k_cache": k, "v_cache": v, "page_table": table}
    kwargs["q"] = made.normal(len(lengths), sq, heads[0], d, dtype=dtype)
    kwargs["cache_seqlens"] = int32(*lengths)
    return Call("kvcache", kwargs | _new(made, new, d, dtype) | more)


def _new(made: _Made, new: int, d: int, dtype: torch.dtype) -> dict[str, Any]:
    if not new:
        return {}
    k, v = (made.normal(4, new, HEADS[1], d, dtype=dtype) for _ in range(2))
    return {"k": k, "v": v, "causal": True}


def ragged_queries(call: Call, dtype: torch.dtype = BF16) -> Call:
    """The same cache, with queries packed."""
    d = call.kwargs["q"].shape[-1]
    call.kwargs["q"] = _Made().normal(sum(QUERIES), HEADS[0], d, dtype=dtype)
    call.kwargs |= {"cu_seqlens_q": cumulative(QUERIES), "max_seqlen_q": max(QUERIES)}
    return call


def _rotary(dtype: torch.dtype = BF16, dim: int = 32, **more: Any) -> dict[str, Any]:
    angle = torch.rand(500, dim // 2, generator=torch.Generator().manual_seed(9)) * 6
    return {"rotary_cos": angle.cos().to(dtype), "rotary_sin": angle.sin().to(dtype)} | more


def in_float8(call: Call, names: tuple[str, ...], vary: bool = True) -> Call:
    """Some tensors as float8, with descales per sequence and head, or one number for all."""
    kwargs = call.kwargs
    cache = kwargs.get("k_cache", kwargs.get("k"))
    b = len(kwargs["cu_seqlens_q"]) - 1 if "cu_seqlens_q" in kwargs else kwargs["q"].shape[0]
    for i, name in enumerate(names):
        kwargs[name] = kwargs[name].to(FLOAT8)
        scale = torch.rand(b, cache.shape[-2], generator=torch.Generator().manual_seed(i)) + 0.5
        kwargs[f"{name[0]}_descale"] = scale if vary else scale[:1, :1].expand(scale.shape)
    return call


def latent(heads: int = 16) -> Call:
    """Absorbed MLA: 64-wide rotary parts, 512-wide latents."""
    call = pages(64, 2, d=64, dv=512, heads=(heads, 1))
    call.kwargs |= {"qv": _Made().normal(4, 2, heads, 512), "causal": True}
    return call


def one_latent(heads: int = 16) -> Call:
    """Absorbed MLA from one cache of 576 columns, the values its first 512."""
    call = pages(64, 1, d=576, heads=(heads, 1))
    call.kwargs["v_cache"] = call.kwargs["k_cache"][..., :512]
    return call


def _alibi() -> dict[str, Any]:
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any, aux: Any) -> Any:
        return score - aux[0][h] * (q_idx - kv_idx).abs()

    return {"score_mod": score_mod, "aux_tensors": [slopes]}


def _mask_mod() -> dict[str, Any]:
    def mask_mod(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (q_idx - kv_idx) % 2 == 0

    return {"mask_mod": mask_mod}


def _sinks(dtype: torch.dtype) -> Tensor:
    return torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=dtype)


#: Name of a call -> what makes it. Names begin with the layout of the keys.
CALLS: dict[str, Callable[[], Call]] = {}


def _named(prefix: str, makers: dict[str, Callable[[], Call]]) -> None:
    CALLS.update({f"{prefix} {name}": make for name, make in makers.items()})


_MODIFIERS: dict[str, Callable[[], dict[str, Any]]] = {
    "full": dict,
    "causal": lambda: {"causal": True},
    "causal window": lambda: {"causal": True, "window_size": (20, 0)},
    "window to the left": lambda: {"window_size": (20, -1)},
    "window to the right": lambda: {"window_size": (-1, 9)},
    "window (20, 9)": lambda: {"window_size": (20, 9)},
    "window (0, 0)": lambda: {"window_size": (0, 0)},
    "chunk": lambda: {"causal": True, "attention_chunk": 48},
    "softcap": lambda: {"causal": True, "softcap": 5.0},
    "sinks": lambda: {"causal": True, "sinks": _sinks(BF16)},
    "float32 sinks": lambda: {"sinks": _sinks(torch.float32)},
    "score_mod": lambda: {"causal": True} | _alibi(),
    "mask_mod": lambda: {"causal": True} | _mask_mod(),
}
for _name, _more in _MODIFIERS.items():
    _named("dense", {_name: lambda more=_more: dense(**more())})
    _named("ragged", {_name: lambda more=_more: ragged(**more())})
    _named("pages of 64,", {_name: lambda more=_more: pages(64, 3, **more())})

_named(
    "dense",
    {f"head_dim {d}": lambda d=d: dense(d, causal=True) for d in (40, 96, 128, 192, 256)}
    | {
        f"head_dim {d}/{dv}": lambda d=d, dv=dv: dense(d, dv, causal=True)
        for d, dv in ((192, 128), (64, 256), (128, 64), (40, 64))
    }
    | {
        "latent": lambda: dense(64, 512, (16, 1), causal=True, qv=_Made().normal(2, 70, 16, 512)),
        "of one head": lambda: dense(heads=(4, 1), causal=True),
        "of as many heads": lambda: dense(heads=(4, 4), causal=True),
        "float16": lambda: dense(dtype=FP16, causal=True),
        "head_dim 128 float16": lambda: dense(128, dtype=FP16),
        "float8": lambda: in_float8(dense(128, causal=True), ("q", "k", "v")),
    },
)
_named(
    "ragged",
    {
        "seqused_q": lambda: ragged(seqused_q=int32(100, 2, 1, 69)),
        "seqused_k": lambda: ragged(seqused_k=int32(100, 7, 0, 300), causal=True),
        "head_dim 128": lambda: ragged(128, causal=True),
        "float16": lambda: ragged(dtype=FP16, causal=True),
        "head_dim 192/128": lambda: ragged(192, 128, heads=(8, 8), causal=True),
        "float8": lambda: in_float8(ragged(128, causal=True), ("q", "k", "v")),
        "float8 192/128": lambda: in_float8(
            ragged(192, 128, (8, 8), (150, 3, 0, 70), causal=True), ("q", "k", "v"), vary=False
        ),
    },
)
_named(
    "dense cache",
    {
        "decode": rows,
        "of several queries": lambda: rows(3, causal=True),
        "append": lambda: rows(2, new=2),
        "append of more than is asked": lambda: rows(1, new=5),
        "append with rotary": lambda: rows(2, new=2, **_rotary(rotary_interleaved=False)),
        "append with interleaved rotary": lambda: rows(2, new=2, **_rotary()),
        "append with rotary_seqlens": lambda: rows(
            2, new=2, **_rotary(), rotary_seqlens=int32(9, 100, 0, 41)
        ),
        "append with rotary of half": lambda: rows(2, new=2, **_rotary(dim=16)),
        "append with float32 rotary": lambda: rows(2, new=2, **_rotary(torch.float32)),
        "leftpad": lambda: rows(2, leftpads=True, causal=True),
        "append with leftpad": lambda: rows(2, new=2, leftpads=True),
        "batch_idx": lambda: rows(cache_batch_idx=int32(2, 0, 3, 1), **_any_rows()),
        "ragged queries": lambda: ragged_queries(rows(causal=True)),
        "append of ragged keys": lambda: _ragged_append(rows(new=3)),
        "append of other dtype": lambda: in_float8(rows(2, new=2), ("k_cache", "v_cache")),
        "float8": lambda: in_float8(rows(), ("k_cache", "v_cache")),
    },
)
_named(
    "pages of",
    {f"{size}": lambda size=size: pages(size) for size in (1, 16, 24, 64, 128, 256)}
    | {f"{size}, prefill": lambda size=size: pages(size, 70, causal=True) for size in (16, 128)}
    | {f"128, head_dim {d}": lambda d=d: pages(128, d=d) for d in (96, 128, 192, 256)}
    | {
        "16, append": lambda: pages(16, 2, new=2),
        "256, append with rotary": lambda: pages(256, 2, new=2, **_rotary()),
        "64, append with rotary": lambda: pages(64, 2, new=2, **_rotary()),
        "64, leftpad": lambda: pages(64, 2, causal=True, cache_leftpad=int32(50, 3, 0, 20)),
        "64, batch_idx": lambda: pages(64, cache_batch_idx=int32(3, 0, 2, 1), **_any_pages()),
        "64, all of them": lambda: pages(64, 3, causal=True, cache_seqlens=None, **_any_pages()),
        "64, ragged queries": lambda: ragged_queries(pages(64, causal=True)),
        "256, ragged queries": lambda: ragged_queries(pages(256, causal=True)),
        "64, float16": lambda: pages(64, dtype=FP16),
        "64, long": lambda: pages(64, lengths=(9000, 7, 4096, 1), causal=True),
        "128, long float8": lambda: in_float8(
            pages(128, d=128, lengths=(9000, 7, 4096, 1)), ("q", "k_cache", "v_cache")
        ),
        "64, float8 keys and values": lambda: in_float8(pages(64), ("k_cache", "v_cache")),
        "64, float8 keys and values, float16 queries": lambda: in_float8(
            pages(64, dtype=FP16), ("k_cache", "v_cache")
        ),
        "64, latent": latent,
        "64, latent from one cache": one_latent,
        "64, float8 latent": lambda: in_float8(latent(), ("k_cache", "v_cache")),
    },
)


def _any_rows() -> dict[str, Any]:
    """Without empty rows: which sequence lies in which row is the call's to say."""
    made = _Made()
    return {name: made.normal(4, 340, HEADS[1], 64) for name in ("k_cache", "v_cache")}


def _any_pages() -> dict[str, Any]:
    made = _Made()
    table = (torch.arange(24, dtype=torch.int32) * 5 % 24).view(4, 6)
    caches = {name: made.normal(24, 64, HEADS[1], 64) for name in ("k_cache", "v_cache")}
    return caches | {"page_table": table}


def _ragged_append(call: Call) -> Call:
    new = call.kwargs["k"].shape[1]
    call = ragged_queries(call)
    for name in ("k", "v"):
        call.kwargs[name] = call.kwargs[name].flatten(0, 1)
    call.kwargs["cu_seqlens_k_new"] = cumulative((new,) * 4)
    return call


def each() -> Iterator[tuple[str, Call]]:
    """Every call, labelled."""
    for name in CALLS:
        yield name, named(name)


def named(name: str) -> Call:
    """One of :data:`CALLS`."""
    call = CALLS[name]()
    call.label = name
    return call


def without_nan(call: Call, value: float = 30.0) -> Call:
    """The same with a number where rows belong to nobody: for packages that multiply them by zero."""
    for name in ("k", "v", "k_cache", "v_cache"):
        tensor = call.kwargs.get(name)
        if tensor is not None:
            wide = tensor.float()
            call.kwargs[name] = torch.where(wide.isnan(), value, wide).to(tensor.dtype)
    return call
