"""Stand-in for aiter's absorbed MLA decode."""

import torch
from tests.stand_ins import record
from tests.stand_ins.compute import attend


def mla_decode_fwd(
    q,
    kv_buffer,
    o,
    qo_indptr,
    kv_indptr,
    kv_indices,
    kv_last_page_lens,
    max_seqlen_q,
    page_size=1,
    nhead_kv=1,
    sm_scale=None,
    logit_cap=0.0,
    num_kv_splits=None,
    num_kv_splits_indptr=None,
    work_meta_data=None,
    work_indptr=None,
    work_info_set=None,
    reduce_indptr=None,
    reduce_final_map=None,
    reduce_partial_map=None,
    q_scale=None,
    kv_scale=None,
    intra_batch_mode=False,
    return_logits=False,
    return_lse=False,
):
    record("aiter.mla_decode_fwd", dict(locals()))
    assert q.shape[1] in (16, 128)
    assert kv_buffer.shape[1:] == (page_size, 1, q.shape[-1])
    assert logit_cap == 0
    assert bool((kv_last_page_lens == 1).all())
    rows = kv_buffer.flatten(0, 1)
    keys = rows[kv_indices[: int(kv_indptr[-1])].long()]
    out, _ = attend(
        "flash_attn_varlen_func",
        q,
        keys,
        keys[..., : o.shape[-1]],
        cu_seqlens_q=qo_indptr,
        cu_seqlens_k=kv_indptr,
        max_seqlen_q=max_seqlen_q,
        softmax_scale=sm_scale,
        causal=True,
    )
    o.copy_(out.to(torch.bfloat16))
    return None, None
