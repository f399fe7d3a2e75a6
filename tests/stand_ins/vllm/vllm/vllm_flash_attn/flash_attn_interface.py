"""Stand-in for vLLM's fork: one function, FlashAttention 2 unless told otherwise."""

import torch
from tests.stand_ins import record
from tests.stand_ins.fa2_calls import varlen
from tests.stand_ins.fa3_calls import run

DEFAULT_FA_VERSION = 2


def get_scheduler_metadata(
    batch_size,
    max_seqlen_q,
    max_seqlen_k,
    num_heads_q,
    num_heads_kv,
    headdim,
    cache_seqlens,
    qkv_dtype=torch.bfloat16,
    headdim_v=None,
    cu_seqlens_q=None,
    cu_seqlens_k_new=None,
    cache_leftpad=None,
    page_size=None,
    max_seqlen_k_new=0,
    causal=False,
    window_size=(-1, -1),
    has_softcap=False,
    num_splits=0,
    pack_gqa=None,
    sm_margin=0,
):
    assert cache_seqlens.shape == (batch_size,)
    return torch.zeros(1 + batch_size, dtype=torch.int32)


def flash_attn_varlen_func(
    q,
    k,
    v,
    max_seqlen_q,
    cu_seqlens_q,
    max_seqlen_k,
    cu_seqlens_k=None,  # only used for non-paged prefill
    seqused_k=None,
    q_v=None,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=None,
    softcap=0.0,  # 0.0 means deactivated
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
    return_softmax_lse=False,
    out=None,
    # FA3 Only
    scheduler_metadata=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    num_splits=0,
    # Version selector
    fa_version=DEFAULT_FA_VERSION,
    s_aux=None,
    cp_world_size=1,
    cp_rank=0,
    cp_tot_seqused_k=None,
):
    assert (cu_seqlens_k is None) != (seqused_k is None)
    assert block_table is None or seqused_k is not None
    assert window_size is None or len(window_size) == 2
    assert q.dim() == 3
    assert cp_world_size == 1
    assert dropout_p == 0
    assert not return_attn_probs
    assert alibi_slopes is None
    window = (-1, -1) if window_size is None else tuple(window_size)
    given = {
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "seqused_k": seqused_k,
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_k,
        "softmax_scale": softmax_scale,
        "causal": causal,
        "window_size": window,
        "softcap": softcap,
        "out": out,
    }
    if fa_version == 2:
        record("vllm.flash_attn_varlen_func", {"q": q, "k": k, "v": v, **given})
        assert q_v is s_aux is q_descale is k_descale is v_descale is scheduler_metadata is None
        assert num_splits in (0, 1)
        assert block_table is None or k.shape[1] % 16 == 0
        result = varlen(q, k, v, block_table=block_table, **given)
    else:
        assert fa_version == 3
        result = run(
            "vllm.flash_attn_varlen_func",
            "flash_attn_varlen_func",
            q,
            k,
            v,
            qv=q_v,
            page_table=block_table,
            q_descale=q_descale,
            k_descale=k_descale,
            v_descale=v_descale,
            sinks=s_aux,
            num_splits=num_splits,
            **given,
        )
    return result if return_softmax_lse else result[0]
