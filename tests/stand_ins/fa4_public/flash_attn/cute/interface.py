"""Stand-in for a build of FlashAttention 4 whose inner function is another one."""

import torch
from tests.stand_ins import record
from tests.stand_ins.compute import attend, check_heads, check_int32

from headway import devices

_HALF = (torch.float16, torch.bfloat16)
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def _side(value):
    assert value is None or value >= 0, "negative windows are offsets here, not unbounded"
    return -1 if value is None else value


def _check_aligned(*caches):
    for cache in caches:
        strides = [stride * cache.itemsize % 16 for stride in cache.stride()[:-1]]
        assert not any(strides), "the original would copy the whole cache"
        assert cache.data_ptr() % 16 == 0


def _check_dims(q, v, major, paged, qv):
    d, dv = q.shape[-1], v.shape[-1]
    alignment = 16 // q.itemsize
    assert d % alignment == 0
    assert dv % alignment == 0
    if major == 9:
        assert 8 <= min(d, dv) <= max(d, dv) <= 256
        width = next(width for width in (64, 96, 128, 192, 256) if d <= width)
        assert dv <= width, "too few registers for such values"
        assert not paged or width != 96, "wrong results"
    elif major in (10, 11):
        assert max(d, dv) <= 128 or (d, dv) in ((192, 128), (256, 256)) or dv == 512
        assert (dv == 512) == (qv is not None)
    assert not paged or (d % 16 == 0 and (major >= 10 or d <= 192))


def _forward(
    q,
    k,
    v,
    qv=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    seqused_q=None,
    seqused_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    min_seqlen_k=None,
    page_table=None,
    softmax_scale=None,
    causal=False,
    softcap=None,
    window_size_left=None,
    window_size_right=None,
    learnable_sink=None,
    tile_mn=None,
    mma_pv_is_rs=None,
    intra_wg_overlap=None,
    num_threads=384,
    num_splits=1,
    pack_gqa=None,
    _arch=None,
    score_mod=None,
    mask_mod=None,
    block_sparse_tensors=None,
    return_lse=False,
    out=None,
    lse=None,
    aux_tensors=None,
    aux_scalars=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    gather_kv_indices=None,
    scheduler_metadata=None,
    seqlen_k_per_split=None,
    disable_scheduler_metadata=False,
    gather_bwd_recompute_p=False,
):
    record("fa4.public", dict(locals()))
    major = devices.of(q.device).capability[0]
    check_heads(q, k, v, _HALF + (_FLOAT8 if major == 10 else ()))
    _check_aligned(k, v)
    _check_dims(q, v, major, page_table is not None, qv)
    check_int32(cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, page_table)
    assert page_table is None or (cu_seqlens_k is None and major not in (8, 12))
    assert num_splits == 1 or major in (10, 11), "SplitKV is not supported on SM90"
    assert q_descale is None or q.dtype in _FLOAT8
    if out is not None:
        assert out.dtype == (torch.bfloat16 if q.dtype in _FLOAT8 else q.dtype)
    given = {
        "qv": qv,
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "seqused_q": seqused_q,
        "seqused_k": seqused_k,
        "page_table": page_table,
        "max_seqlen_q": max_seqlen_q if cu_seqlens_q is not None else None,
        "learnable_sink": learnable_sink,
        "q_descale": q_descale,
        "k_descale": k_descale,
        "v_descale": v_descale,
        "out": out,
    }
    given = {name: value for name, value in given.items() if value is not None}
    got, got_lse = attend(
        "flash_attn_varlen_func",
        q,
        k,
        v,
        softmax_scale=softmax_scale,
        causal=causal,
        softcap=softcap or 0.0,
        window_size=(_side(window_size_left), _side(window_size_right)),
        **given,
    )
    if qv is not None:
        got_lse = got_lse.transpose(-1, -2)
    return got, (got_lse if return_lse else None), None, None, None


def flash_attn_func(
    q,
    k,
    v,
    qv=None,
    gather_kv_indices=None,
    softmax_scale=None,
    causal=False,
    window_size=(None, None),
    learnable_sink=None,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    score_mod=None,
    score_mod_bwd=None,
    mask_mod=None,
    aux_tensors=None,
    aux_scalars=None,
    block_sparse_tensors=None,
    block_sparse_tensors_bwd=None,
    return_lse=False,
    gather_bwd_recompute_p=False,
    gather_bwd_token_chunk=None,
):
    return _forward(
        q,
        k,
        v,
        qv,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size_left=window_size[0],
        window_size_right=window_size[1],
        learnable_sink=learnable_sink,
        softcap=softcap,
        num_splits=num_splits,
        pack_gqa=pack_gqa,
        return_lse=return_lse,
    )[:2]


def flash_attn_varlen_func(
    q,
    k,
    v,
    qv=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    min_seqlen_k=None,
    seqused_q=None,
    seqused_k=None,
    gather_kv_indices=None,
    page_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(None, None),
    learnable_sink=None,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    score_mod=None,
    score_mod_bwd=None,
    mask_mod=None,
    block_sparse_tensors=None,
    aux_tensors=None,
    aux_scalars=None,
    return_lse=False,
    scheduler_metadata=None,
    seqlen_k_per_split=None,
    disable_scheduler_metadata=False,
    gather_bwd_recompute_p=False,
    gather_bwd_token_chunk=None,
):
    return _forward(
        q,
        k,
        v,
        qv,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        seqused_q=seqused_q,
        seqused_k=seqused_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        page_table=page_table,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size_left=window_size[0],
        window_size_right=window_size[1],
        learnable_sink=learnable_sink,
        softcap=softcap,
        num_splits=num_splits,
        pack_gqa=pack_gqa,
        return_lse=return_lse,
    )[:2]
