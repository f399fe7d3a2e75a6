"""Stand-in for aiter's work-list kernels: executes whatever list it is given, as the assembly does."""

import numpy as np
import torch
from tests.stand_ins import record

from headway import persistent
from headway.persistent import WorkList

_HEADS = {128: (1, 2, 4, 8, 10, 16, 32, 40, 64, 128)}
_FP8 = torch.float8_e4m3fn


def _number(scale):
    assert scale is None or (scale.numel() == 1 and scale.dtype == torch.float32)
    return 1.0 if scale is None else float(scale)


def mla_prefill_ps_asm_fwd(
    Q,
    K,
    V,
    qo_indptr,
    kv_indptr,
    kv_page_indices,
    work_indptr,
    work_info_set,
    max_seqlen_q,
    softmax_scale,
    is_causal,
    splitData,
    splitLse,
    output,
    q_scale=None,
    k_scale=None,
    v_scale=None,
):
    record("aiter.mla_prefill_ps_asm_fwd", dict(locals()))
    assert Q.dtype == K.dtype == V.dtype == _FP8
    assert (Q.shape[-1], V.shape[-1]) == (192, 128)
    assert Q.shape[1] == K.shape[1] == V.shape[1]
    assert Q.shape[1] % 8 == 0
    assert all(t.is_contiguous() for t in (Q, K, V, output))
    assert output.dtype == torch.bfloat16
    assert output.shape[1] == Q.shape[1]
    assert splitData.dtype == splitLse.dtype == torch.float32
    rows = work_info_set[:, 1]
    tiles = work_info_set[:, 3] - work_info_set[:, 2]
    assert int(tiles.max()) <= 256
    assert int((rows + tiles).max()) <= splitData.shape[0] or int(rows.max()) < 0
    splitData.fill_(float("nan"))
    splitLse.fill_(float("nan"))
    empty = np.zeros(1, np.int32)
    work = WorkList(
        work_indptr.numpy(), work_info_set.numpy(), empty, np.zeros((0, 2), np.int32), empty, 0
    )
    wide = output.double()  # rows behind the last request's stay as they are
    wide[: int(qo_indptr[-1])] = float("nan")
    partial = torch.full(splitData.shape, float("nan"), dtype=torch.float64)
    partial_lse = torch.full(splitLse.shape, float("nan"), dtype=torch.float64)
    lengths = kv_indptr[1:] - kv_indptr[:-1]
    persistent.execute(
        work,
        Q.double() * _number(q_scale),
        (K.double() * _number(k_scale))[:, None],
        (V.double() * _number(v_scale))[:, None],
        qo_indptr=qo_indptr.numpy(),
        kv_indptr=kv_indptr.numpy(),
        context_lens=lengths.numpy(),
        kv_page_indices=kv_page_indices,
        softmax_scale=softmax_scale,
        is_causal=is_causal,
        out=wide,
        lse=torch.empty(output.shape[:2], dtype=torch.float64),
        partial_out=partial,
        partial_lse=partial_lse,
    )
    output.copy_(wide.to(torch.bfloat16))
    splitData.copy_(partial)
    splitLse.copy_(partial_lse)


def mla_reduce_v1(
    partial_output,
    partial_lse,
    reduce_indptr,
    reduce_final_map,
    reduce_partial_map,
    max_seqlen_q,
    num_kv_splits,
    final_output,
    final_lse=None,
):
    record("aiter.mla_reduce_v1", dict(locals()))
    assert max_seqlen_q == 256
    assert final_output.shape[1] in _HEADS[final_output.shape[2]]
    work = WorkList(
        np.zeros(1, np.int32),
        np.zeros((0, 8), np.int32),
        reduce_indptr.numpy(),
        reduce_final_map.numpy(),
        reduce_partial_map.numpy(),
        0,
    )
    lse = torch.empty(final_output.shape[:2])
    persistent.reduce(work, partial_output, partial_lse, final_output, lse)
    if final_lse is not None:
        final_lse.copy_(lse)


def get_ps_metadata_v1(
    seqlens_qo_indptr,
    pages_kv_indptr,
    context_lens,
    gqa_ratio,
    num_heads_k,
    work_metadata_ptrs,
    work_indptr,
    work_info,
    reduce_indptr,
    reduce_final_map,
    reduce_partial_map,
    qhead_granularity=1,
    qlen_granularity=256,
    kvlen_granularity=16,
    block_size=16,
    is_causal=True,
):
    raise AssertionError("writes device memory from the host, in no order with the stream")
