"""Stand-in for FlashAttention 2's functions."""

from tests.stand_ins import record
from tests.stand_ins.compute import attend, check_heads, check_int32, check_rotary, check_window
from tests.stand_ins.fa2_calls import HALF, varlen


def _run(name, function, q, k, v, **arguments):
    record(name, {"q": q, "k": k, "v": v, **arguments})
    check_heads(q, k, v, HALF)
    assert q.shape[-1] == v.shape[-1] <= 256
    assert q.shape[-1] % 8 == 0
    check_window(arguments["window_size"])
    table = arguments.pop("block_table", None)
    assert table is None or k.shape[1] % 256 == 0, (
        "Paged KV cache block size must be divisible by 256"
    )
    check_int32(table)
    k_new, v_new = arguments.pop("k_new", None), arguments.pop("v_new", None)
    given = {key: value for key, value in arguments.items() if value is not None}
    if k_new is not None:
        assert k_new.dtype == k.dtype
        given |= {"k": k_new, "v": v_new}
    if table is not None:
        given["page_table"] = table
    out, lse = _attend(function, q, k, v, given)
    return out, lse.masked_fill(lse == float("-inf"), float("inf"))


def _attend(function, q, k, v, given):
    if "k" not in given:
        return attend(function, q, k, v, **given)
    import headway

    k_new, v_new = given.pop("k"), given.pop("v")
    return headway.flash_attn_with_kvcache(
        q, k, v, k_new, v_new, return_lse=True, backend="reference", **given
    )


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),  # -1 means infinite context window
    softcap=0.0,  # 0.0 means deactivated
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    out, lse = _run(
        "flash_attn.flash_attn_func",
        "flash_attn_func",
        q,
        k,
        v,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
    )
    return (out, lse, None) if return_attn_probs else out


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),  # -1 means infinite context window
    softcap=0.0,  # 0.0 means deactivated
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    given = {"q": q, "k": k, "v": v, "max_seqlen_q": max_seqlen_q}
    record("flash_attn.flash_attn_varlen_func", given)
    assert block_table is None or k.shape[1] % 256 == 0, (
        "Paged KV cache block size must be divisible by 256"
    )
    out, lse = varlen(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        None,
        block_table,
        max_seqlen_q,
        max_seqlen_k,
        causal,
        window_size,
        softmax_scale=softmax_scale,
        softcap=softcap,
    )
    return (out, lse, None) if return_attn_probs else out


def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    block_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),  # -1 means infinite context window
    softcap=0.0,  # 0.0 means deactivated
    rotary_interleaved=True,
    alibi_slopes=None,
    num_splits=0,
    return_softmax_lse=False,
):
    check_rotary(rotary_cos, rotary_sin, q, k)
    assert block_table is None or (cache_batch_idx is None and cache_leftpad is None)
    assert q.dim() == 4
    assert 0 <= num_splits <= 128
    out, lse = _run(
        "flash_attn.flash_attn_with_kvcache",
        "flash_attn_with_kvcache",
        q,
        k_cache,
        v_cache,
        k_new=k,
        v_new=v,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        cache_seqlens=cache_seqlens,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        block_table=block_table,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        rotary_interleaved=rotary_interleaved,
    )
    return (out, lse) if return_softmax_lse else out
