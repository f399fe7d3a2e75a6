"""Everything between a layer's projections and its attention, for all tokens of a step in one kernel:
norms of the heads of q and k, rotation of both, and the write of k and v into a paged cache.

Programs along axis 1 take, in order, the heads of q (where they change), of k and of v. Where a token goes
is its slot, page * page_size + row, computed once per step by :func:`token_slots`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headway.kernels._triton import cdiv, gdc_launch_dependents, gdc_wait, jit, tl, triton
from headway.kernels.portable.append import stored
from headway.kernels.portable.norm import NormStyle
from headway.kernels.portable.numeric import cast
from headway.kernels.portable.operands import bits, block_width, dependent_launch
from headway.kernels.portable.rotation import turned, turning_columns

#: Tokens per program: few tokens are spread, many are put together.
FEW, MANY = 4, 16


@triton.jit(
    do_not_specialize=["stride_table"], do_not_specialize_on_alignment=["cu_seqlens_q", "seqlens_k"]
)
def slots_kernel(
    cu_seqlens_q,
    seqlens_k,
    page_table,
    slots,
    stride_table,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(1)
    first = tl.load(cu_seqlens_q + b)
    count = tl.load(cu_seqlens_q + b + 1) - first
    step = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = step < count
    at = tl.load(seqlens_k + b) + step
    pages = page_table + b.to(tl.int64) * stride_table
    page = tl.load(pages + at // PAGE_SIZE, mask=inside, other=0).to(tl.int64)
    tl.store(slots + first + step, page * PAGE_SIZE + at % PAGE_SIZE, mask=inside)


def token_slots(
    slots: Tensor,
    cu_seqlens_q: Tensor,
    seqlens_k: Tensor,
    page_table: Tensor,
    page_size: int,
    max_seqlen_q: int,
) -> None:
    """Fill ``slots`` (total_q,) int64: where in the cache each new token goes.

    Args:
        cu_seqlens_q: (B + 1,), seqlens_k: (B,) lengths before the new tokens, page_table: (B, pages),
            all int32.
    """
    batch_size = seqlens_k.shape[0]
    if batch_size == 0 or max_seqlen_q == 0:
        return
    block = 1 if max_seqlen_q == 1 else 128
    slots_kernel[(cdiv(max_seqlen_q, block), batch_size)](
        cu_seqlens_q,
        seqlens_k,
        page_table,
        slots,
        page_table.stride(0),
        PAGE_SIZE=page_size,
        BLOCK=block,
        num_warps=1 if block == 1 else 4,
    )


@jit
def scaled(x, rstd, weight, STYLE: tl.constexpr, dtype: tl.constexpr):
    """Normalised rows times their weight, rounded as :class:`NormStyle` says."""
    x = x * rstd[:, None]
    if STYLE == 0:
        x = cast(x, dtype).to(tl.float32)
    elif STYLE == 1:
        weight = weight + 1.0
    return cast(x * weight[None, :], dtype).to(tl.float32)


@jit
def encoded_rows(
    ptr,
    offsets,
    tokens,
    inside,
    weight,
    eps,
    cos,
    sin,
    stride_cos,
    stride_sin,
    STYLE: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(tokens, BLOCK_D) float32 rows of one head: normalised where there is a weight, then rotated."""
    dtype: tl.constexpr = ptr.dtype.element_ty
    cols = tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (cols < D)[None, :]
    x = tl.load(ptr + offsets[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    rstd = tl.full([tokens.shape[0]], 1.0, tl.float32)
    if weight is not None:
        rstd = tl.rsqrt(tl.sum(x * x, 1) / D + eps)
        w = tl.load(weight + cols, mask=cols < D, other=0.0).to(tl.float32)
        x = scaled(x, rstd, w, STYLE, dtype)
    if HALF > 0:
        partner, angle, first = turning_columns(HALF, INTERLEAVED, BLOCK_D)
        turns = inside[:, None] & (cols < 2 * HALF)[None, :]
        other = tl.load(ptr + offsets[:, None] + partner[None, :], mask=turns, other=0.0)
        other = other.to(tl.float32)
        if weight is not None:
            w = tl.load(weight + partner, mask=cols < 2 * HALF, other=0.0).to(tl.float32)
            other = scaled(other, rstd, w, STYLE, dtype)
        at = tokens[:, None]
        x = turned(x, other, at, angle, first, turns, cos, sin, stride_cos, stride_sin)
    return x


@triton.jit(do_not_specialize=["num_tokens"])
def store_kernel(
    q,
    k,
    v,
    k_cache,
    v_cache,
    q_out,
    slots,
    cos,
    sin,
    q_weight,
    k_weight,
    k_descale,
    v_descale,
    num_tokens,
    eps,
    stride_q_row,
    stride_q_head,
    stride_k_row,
    stride_k_head,
    stride_v_row,
    stride_v_head,
    stride_k_cache_page,
    stride_k_cache_row,
    stride_k_cache_head,
    stride_v_cache_page,
    stride_v_cache_row,
    stride_v_cache_head,
    stride_q_out_row,
    stride_q_out_head,
    stride_cos,
    stride_sin,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    STYLE: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_T: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    h = tl.program_id(1)
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = tokens < num_tokens
    cols = tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (cols < D)[None, :]
    if h < Q_HEADS:
        x = encoded_rows(
            q + h * stride_q_head,
            tokens * stride_q_row,
            tokens,
            inside,
            q_weight,
            eps,
            cos,
            sin,
            stride_cos,
            stride_sin,
            STYLE,
            HALF,
            INTERLEAVED,
            D,
            BLOCK_D,
        )
        to = q_out + h * stride_q_out_head + tokens[:, None] * stride_q_out_row + cols[None, :]
        tl.store(to, cast(x, q_out.dtype.element_ty), mask=mask)
        return
    slot = tl.load(slots + tokens, mask=inside, other=0)
    page = slot // PAGE_SIZE
    row = slot % PAGE_SIZE
    descale = 1.0
    if h < Q_HEADS + KV_HEADS:
        head = h - Q_HEADS
        x = encoded_rows(
            k + head * stride_k_head,
            tokens * stride_k_row,
            tokens,
            inside,
            k_weight,
            eps,
            cos,
            sin,
            stride_cos,
            stride_sin,
            STYLE,
            HALF,
            INTERLEAVED,
            D,
            BLOCK_D,
        )
        if k_descale is not None:
            descale = tl.load(k_descale + head)
        places = page * stride_k_cache_page + row * stride_k_cache_row
        to_k = k_cache + head * stride_k_cache_head + places[:, None] + cols[None, :]
        tl.store(to_k, stored(x, k.dtype.element_ty, k_cache.dtype.element_ty, descale), mask=mask)
    else:
        head = h - Q_HEADS - KV_HEADS
        wide = tl.arange(0, BLOCK_DV)
        mask_v = inside[:, None] & (wide < DV)[None, :]
        source = v + head * stride_v_head + tokens[:, None] * stride_v_row + wide[None, :]
        y = tl.load(source, mask=mask_v, other=0.0).to(tl.float32)
        if v_descale is not None:
            descale = tl.load(v_descale + head)
        places = page * stride_v_cache_page + row * stride_v_cache_row
        to_v = v_cache + head * stride_v_cache_head + places[:, None] + wide[None, :]
        tl.store(
            to_v, stored(y, v.dtype.element_ty, v_cache.dtype.element_ty, descale), mask=mask_v
        )


def store_tokens(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    *,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
    style: NormStyle = NormStyle.ROUNDED,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
) -> Tensor:
    """Normalise and rotate q and k as asked, and write k and v.

    Args:
        q: (total_q, Hq, D), k: (total_q, Hkv, D), v: (total_q, Hkv, Dv), 16-bit, last stride 1.
        k_cache, v_cache: (num_pages, page_size, Hkv, D or Dv), as k and v, or float8_e4m3.
        slots: (total_q,) int64 of :func:`token_slots`.
        cos, sin: (total_q, rotary_dim / 2) of each token.
        q_weight, k_weight: (D,) of the heads' RMS norms, applied before the rotation.
        k_descale, v_descale: (Hkv,) float32, what a stored 1 means; float8 caches only.

    Returns:
        q, or what became of it, (total_q, Hq, D) contiguous.
    """
    changes = cos is not None or q_weight is not None
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if changes else q
    num_tokens, q_heads = q.shape[0], q.shape[1] if changes else 0
    kv_heads = k.shape[1]
    if num_tokens == 0:
        return q_out
    block_t = FEW if num_tokens <= 1024 else MANY
    store_kernel[(cdiv(num_tokens, block_t), q_heads + 2 * kv_heads)](
        q,
        k,
        v,
        bits(k_cache, False),
        bits(v_cache, False),
        q_out,
        slots,
        cos,
        sin,
        q_weight,
        k_weight,
        k_descale,
        v_descale,
        num_tokens,
        eps,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        *q_out.stride()[:2],
        0 if cos is None else cos.stride(0),
        0 if sin is None else sin.stride(0),
        Q_HEADS=q_heads,
        KV_HEADS=kv_heads,
        STYLE=int(style),
        HALF=0 if cos is None else cos.shape[1],
        INTERLEAVED=interleaved,
        PAGE_SIZE=k_cache.shape[1],
        D=k.shape[2],
        DV=v.shape[2],
        BLOCK_D=block_width(k.shape[2]),
        BLOCK_DV=block_width(v.shape[2]),
        BLOCK_T=block_t,
        num_warps=1 if block_t == FEW else 4,
        **dependent_launch(q.device),
    )
    return q_out
