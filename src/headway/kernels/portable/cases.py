"""The calls that ahead-of-time compilation covers by default: every kernel, width and kind of mask."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from headway.kernels.compile import Case
from headway.mla import plan_prefill
from headway.persistent import DeviceWork

_BF16, _FLOAT8 = torch.bfloat16, torch.float8_e4m3fn


def _meta(*shape: int, dtype: torch.dtype = _BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _int32(*shape: int) -> Tensor:
    return _meta(*shape, dtype=torch.int32)


def _run(function: str, arguments: dict[str, Any]) -> None:
    """The call on meta tensors, to the point where kernels would start."""
    import headway

    getattr(headway, function)(**arguments, backend="portable", return_lse=True)


def prefill(d: int, dv: int | None = None, dtype: torch.dtype = _BF16, **more: Any) -> None:
    """Ragged prefill of a batch, 8 query heads on 2 KV heads."""
    q, k, v = (_meta(4096, h, w, dtype=dtype) for h, w in ((8, d), (2, d), (2, dv or d)))
    cu = _int32(5)
    arguments: dict[str, Any] = {"q": q, "k": k, "v": v, "cu_seqlens_q": cu, "cu_seqlens_k": cu}
    arguments |= {"max_seqlen_q": 2048, "max_seqlen_k": 2048, "causal": True}
    _run("flash_attn_varlen_func", arguments | more)


def decode(
    d: int,
    dv: int | None = None,
    dtype: torch.dtype = _BF16,
    kv_dtype: torch.dtype | None = None,
    heads: tuple[int, int] = (32, 8),
    page_size: int = 16,
    seqlen_q: int = 1,
    latent: bool = False,
    **more: Any,
) -> None:
    """A step against paged caches; ``latent``: v is the first columns of k."""
    k = _meta(256, page_size, heads[1], d, dtype=kv_dtype or dtype)
    v = k[..., :dv] if latent else _meta(256, page_size, heads[1], dv or d, dtype=k.dtype)
    q = _meta(64, seqlen_q, heads[0], d, dtype=dtype)
    arguments: dict[str, Any] = {"q": q, "k_cache": k, "v_cache": v}
    arguments |= {"page_table": _int32(64, 512), "cache_seqlens": _int32(64), "causal": True}
    _run("flash_attn_with_kvcache", arguments | more)


def append(dtype: torch.dtype, kv_dtype: torch.dtype, interleaved: bool) -> None:
    """A decode step that rotates and writes its new tokens."""
    angle = _meta(4096, 64, dtype=dtype)
    new: dict[str, Any] = {
        "k": _meta(64, 1, 8, 128, dtype=dtype),
        "v": _meta(64, 1, 8, 128, dtype=dtype),
    }
    rotary: dict[str, Any] = {
        "rotary_cos": angle,
        "rotary_sin": angle,
        "rotary_interleaved": interleaved,
    }
    if kv_dtype != dtype:
        new |= {name: _meta(64, 8, dtype=torch.float32) for name in ("k_descale", "v_descale")}
    decode(128, dtype=dtype, kv_dtype=kv_dtype, **new, **rotary)


def persistent_prefill(dtype: torch.dtype, v_transposed: bool) -> None:
    """The work-list kernel at MLA's widths, and the merge of what it splits."""
    from headway.kernels.portable.mla_prefill import Scales, mla_prefill

    work = _work(16)
    q, k = _meta(3000, 16, 192, dtype=dtype), _meta(5000, 16, 192, dtype=dtype)
    v = _meta(5000, 16, 128, dtype=dtype)
    if v_transposed:
        v = _meta(16, 128, work.padded_keys, dtype=dtype)
    scale = _meta(1, dtype=torch.float32) if v_transposed else None
    mla_prefill(
        work,
        q,
        k,
        v,
        _meta(3000, 16, 128),
        _meta(3000, 16, dtype=torch.float32),
        softmax_scale=0.07,
        scales=Scales(scale, scale, scale),
        v_transposed=v_transposed,
    )


def quantised_prefill() -> None:
    """All kernels of ``headway.mla.prefill`` from bfloat16 inputs."""
    from headway import mla

    q, k, v = (_meta(n, 16, w) for n, w in ((3000, 192), (5000, 192), (5000, 128)))
    cu = _int32(3)
    mla.prefill(q, k, v, cu, cu, fp8=True, plan=_work(16), return_lse=True)


def _work(num_heads: int) -> DeviceWork:
    cu_q, cu_k = torch.tensor([0, 1000, 3000]), torch.tensor([0, 2000, 5000])
    device = torch.device("meta")
    return plan_prefill(cu_q, cu_k, num_heads_k=num_heads, device=device, num_cu=132)


def _alibi(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any, aux: Any) -> Any:
    return score + aux[0][h] * (kv_idx - q_idx)


def _same_document(b: Any, h: Any, q_idx: Any, kv_idx: Any, aux: Any) -> Any:
    return aux[1][b, q_idx] == aux[1][b, kv_idx]


def _mods() -> dict[str, Any]:
    """A score_mod and a mask_mod that look into tensors."""
    aux = (_meta(32, dtype=torch.float32), _int32(64, 8192))
    return {"score_mod": _alibi, "mask_mod": _same_document, "aux_tensors": aux}


def _cases() -> tuple[Case, ...]:
    def case(label: str, function: Any, *args: Any, **kwargs: Any) -> Case:
        return Case(label, functools.partial(function, *args, **kwargs))

    rows = [case(f"prefill {d}", prefill, d) for d in (32, 40, 64, 80, 96, 112, 128, 192, 256)]
    rows += [
        case("prefill 192/128", prefill, 192, 128),
        case("prefill 128 float8", prefill, 128, dtype=_FLOAT8),
        case("prefill 256 float8", prefill, 256, dtype=_FLOAT8),
        case("prefill 128 float16", prefill, 128, dtype=torch.float16),
        case("prefill 128 window", prefill, 128, window_size=(1023, 0)),
        case("prefill 128 chunk softcap", prefill, 128, attention_chunk=1024, softcap=30.0),
        case("prefill 128 full", prefill, 128, causal=False),
        case("prefill 64 window sinks", prefill, 64, window_size=(127, 0), sinks=_meta(8)),
    ]
    rows += [case(f"decode {d}", decode, d) for d in (64, 80, 96, 128, 192, 256)]
    rows += [case(f"decode 128 page {n}", decode, 128, page_size=n) for n in (1, 24, 64, 128)]
    rows += [
        case("decode 64 window sinks", decode, 64, window_size=(127, 0), sinks=_meta(32)),
        case("decode 256 softcap", decode, 256, softcap=50.0, window_size=(4095, 0)),
        case("decode 128 float8 cache", decode, 128, kv_dtype=_FLOAT8),
        case("decode 256 float8 cache", decode, 256, kv_dtype=_FLOAT8),
        case("decode 128 float8", decode, 128, dtype=_FLOAT8),
        case("decode 128 8 queries", decode, 128, seqlen_q=8),
        case("decode 128 16 queries", decode, 128, seqlen_q=16),
        case("mla 16 heads", decode, 576, 512, heads=(16, 1), page_size=64, latent=True),
        case("mla 32 heads", decode, 576, 512, heads=(32, 1), page_size=64, latent=True),
        case("mla 128 heads", decode, 576, 512, heads=(128, 1), page_size=64, latent=True),
        case("mla qv", decode, 64, 512, heads=(128, 1), page_size=64, qv=_meta(64, 1, 128, 512)),
        case("append", append, _BF16, _BF16, True),
        case("append float8 cache", append, _BF16, _FLOAT8, False),
        case("prefill 128 mods", prefill, 128, **_mods()),
        case("decode 128 mods", decode, 128, **_mods()),
        case("work list", persistent_prefill, _BF16, False),
        case("work list float8", persistent_prefill, _FLOAT8, True),
        case("mla prefill float8", quantised_prefill),
    ]
    return tuple(rows)


CASES = _cases()
