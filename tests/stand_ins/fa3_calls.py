"""What FlashAttention 3 checks and computes, for the stand-ins of its packages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.stand_ins import record
from tests.stand_ins.compute import attend, check_heads, check_int32, check_rotary, check_window

_DTYPES = (torch.bfloat16, torch.float16, torch.float8_e4m3fn)


def run(name: str, function: str, q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> Any:
    """Check as ``mha_fwd`` does, then compute. None stands for "not given"."""
    record(name, {"q": q, "k": k, "v": v, **arguments})
    arguments = {name: value for name, value in arguments.items() if value is not None}
    assert 0 <= arguments.pop("num_splits", 0) <= 256
    dtypes = arguments.pop("dtypes", _DTYPES)
    check_heads(q, k, v, dtypes)
    _check_dims(q.shape[-1], v.shape[-1], q.dtype, arguments.get("qv"))
    arguments["window_size"] = check_window(arguments["window_size"])
    check_int32(*(arguments.get(n) for n in ("page_table", "cu_seqlens_q", "cu_seqlens_k")))
    check_rotary(
        arguments.get("rotary_cos"), arguments.get("rotary_sin"), q, arguments.get("k_new")
    )
    assert "cu_seqlens_k" not in arguments or "page_table" not in arguments
    sinks = arguments.get("sinks")
    assert sinks is None or sinks.dtype == torch.bfloat16
    for name in ("q_descale", "k_descale", "v_descale"):
        assert name not in arguments or q.dtype.itemsize == 1, "descale of 16-bit inputs is ignored"
    if "k_new" in arguments:
        arguments["k"], arguments["v"] = arguments.pop("k_new"), arguments.pop("v_new")
        assert arguments["k"].dtype == k.dtype
        assert "cache_seqlens" in arguments
    given_out = arguments.get("out")
    assert given_out is None or given_out.dtype == (
        torch.bfloat16 if q.dtype.itemsize == 1 else q.dtype
    )
    k_new, v_new = arguments.pop("k", None), arguments.pop("v", None)
    if k_new is not None:
        arguments |= {"k": k_new, "v": v_new}
    out, lse = _attend(function, q, k, v, arguments)
    if k.numel() == 0:
        out.zero_()
        lse.fill_(float("inf"))
    return out, lse


def _attend(function: str, q: Tensor, k: Tensor, v: Tensor, arguments: dict[str, Any]) -> Any:
    if function != "flash_attn_with_kvcache":
        return attend(function, q, k, v, **arguments)
    import headway

    k_new, v_new = arguments.pop("k", None), arguments.pop("v", None)
    dtype = torch.bfloat16 if q.dtype.itemsize == 1 else q.dtype
    out = arguments.pop("out", None)
    if out is None:
        out = torch.full((*q.shape[:-1], v.shape[-1]), float("nan"), dtype=dtype)
    return headway.flash_attn_with_kvcache(
        q, k, v, k_new, v_new, out=out, return_lse=True, backend="reference", **arguments
    )


def _check_dims(d: int, dv: int, dtype: torch.dtype, qv: Tensor | None) -> None:
    assert d % (16 if dtype.itemsize == 1 else 8) == 0
    if qv is not None:
        assert d <= 64
        assert 256 <= dv <= 512
    elif d != dv:
        assert (128 < d <= 192 and 96 < dv <= 128) or (d <= 64 and dv <= 512), (d, dv)
    else:
        assert d <= 256
