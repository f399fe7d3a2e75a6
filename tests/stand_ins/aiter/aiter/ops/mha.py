"""Stand-in for aiter's prefill functions."""

import torch
from tests.stand_ins import record
from tests.stand_ins.compute import attend, check_heads, check_window

_HALF = (torch.bfloat16, torch.float16)


def _run(name, function, q, k, v, window_size, return_lse, sink_ptr, **arguments):
    record(name, {"q": q, "k": k, "v": v, "window_size": window_size, **arguments})
    check_heads(q, k, v, _HALF)
    left, right = check_window(window_size[:2])
    if not arguments["causal"]:
        assert left != 0, "read as unbounded"
        assert right != 0, "read as unbounded"
    out, lse = attend(function, q, k, v, window_size=(left, right), sinks=sink_ptr, **arguments)
    return (out, lse.masked_fill(lse == float("-inf"), float("inf"))) if return_lse else out


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1, 0),  # -1 means infinite context window, 0 means no sink
    bias=None,
    alibi_slopes=None,
    deterministic=True,
    return_lse=False,
    return_attn_probs=False,
    how_v3_bf16_cvt=1,
    cu_seqlens_q=None,
    cu_seqlens_kv=None,
    sink_ptr=None,
    num_splits=0,
):
    return _run(
        "aiter.flash_attn_func",
        "flash_attn_func",
        q,
        k,
        v,
        window_size,
        return_lse,
        sink_ptr,
        softmax_scale=softmax_scale,
        causal=causal,
    )


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    min_seqlen_q=0,
    dropout_p=0.0,
    softmax_scale=None,
    logits_soft_cap=0.0,
    causal=False,
    window_size=(-1, -1, 0),  # -1 means infinite context window, 0 means no sink
    bias=None,
    alibi_slopes=None,
    deterministic=False,
    return_lse=False,
    return_attn_probs=False,
    how_v3_bf16_cvt=1,
    block_table=None,
    out=None,
    cu_seqlens_q_padded=None,
    cu_seqlens_k_padded=None,
    sink_ptr=None,
):
    return _run(
        "aiter.flash_attn_varlen_func",
        "flash_attn_varlen_func",
        q,
        k,
        v,
        window_size,
        return_lse,
        sink_ptr,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        softmax_scale=softmax_scale,
        softcap=logits_soft_cap,
        causal=causal,
        **({} if out is None else {"out": out}),
    )
