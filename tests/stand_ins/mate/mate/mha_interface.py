"""Stand-in for MATE's functions.

``get_scheduler_metadata`` writes a digest of its arguments where the original writes a schedule, and the
attention functions recompute it from theirs: metadata of any other call does not match.
"""

import hashlib

import torch
from tests.stand_ins import record
from tests.stand_ins.compute import attend, check_heads, check_int32, check_rotary, check_window

_HALF = (torch.bfloat16, torch.float16)


def _digest(batch_size, *facts):
    """int32 (4 * B), as metadata is, that tells calls apart."""
    text = repr([f.tolist() if isinstance(f, torch.Tensor) else f for f in facts])
    seed = int(hashlib.sha256(text.encode()).hexdigest()[:12], 16)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**31, (4 * batch_size,), generator=generator).to(torch.int32)


def get_scheduler_metadata(
    batch_size,
    max_seqlen_q,
    max_seqlen_k,
    num_heads_q,
    num_heads_kv,
    headdim,
    seqused_q=None,
    seqused_k=None,
    qkv_dtype=torch.bfloat16,
    headdim_v=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    cu_seqlens_k_new=None,
    cache_leftpad=None,
    page_size=None,
    max_seqlen_k_new=0,
    causal=False,
    window_size=(-1, -1),  # -1 means infinite context window
    attention_chunk=0,
    has_softcap=False,
    num_splits=0,  # Can be tuned for speed
    pack_gqa=None,  # Can be tuned for speed
    mp_margin=0,  # Can be tuned if some MPs are used for communication
):
    record("mate.get_scheduler_metadata", dict(locals()))
    assert isinstance(pack_gqa, bool), "left open, planner and kernel may cut queries differently"
    check_int32(seqused_q, seqused_k, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, cache_leftpad)
    return _digest(
        batch_size,
        batch_size,
        max_seqlen_q,
        max_seqlen_k,
        num_heads_q,
        num_heads_kv,
        headdim,
        headdim if headdim_v is None else headdim_v,
        qkv_dtype,
        seqused_q,
        seqused_k,
        cu_seqlens_q,
        cu_seqlens_k,
        cu_seqlens_k_new,
        cache_leftpad,
        page_size,
        max_seqlen_k_new,
        causal,
        check_window(window_size),
        attention_chunk,
        has_softcap,
        num_splits,
        pack_gqa,
        mp_margin,
    )


def _check_metadata(metadata, q, k, v, new, **a):
    if metadata is None:
        return
    page_size = k.shape[1] if a["page_table"] is not None else None
    if page_size is not None:
        capacity, batch_size = a["page_table"].shape[1] * page_size, a["page_table"].shape[0]
    else:
        capacity = k.shape[1] if k.dim() == 4 else a["max_seqlen_k"]
        cu = a["cu_seqlens_q"]
        batch_size = q.shape[0] if cu is None else cu.shape[0] - 1
    lengths = a["seqused_k"]
    if lengths is None and a["cu_seqlens_k"] is None:
        lengths = torch.full((batch_size,), capacity, dtype=torch.int32)
    wanted = _digest(
        batch_size,
        batch_size,
        q.shape[1] if q.dim() == 4 else a["max_seqlen_q"],
        capacity,
        q.shape[-2],
        k.shape[-2],
        q.shape[-1],
        v.shape[-1],
        q.dtype,
        a["seqused_q"],
        lengths,
        a["cu_seqlens_q"],
        a["cu_seqlens_k"],
        a["cu_seqlens_k_new"],
        a["leftpad_k"],
        page_size,
        0 if new is None or a["cu_seqlens_k_new"] is not None else new.shape[1],
        a["causal"],
        a["window_size"],
        a["attention_chunk"],
        a["softcap"] > 0,
        a["num_splits"],
        a["pack_gqa"],
        a["sm_margin"],
    )
    assert metadata.shape == wanted.shape, "scheduler metadata of another batch"
    assert torch.equal(metadata, wanted), "scheduler metadata of another call"


def _check(q, k, v, window_size, sinks, descales):
    check_heads(q, k, v, _HALF)
    check_window(window_size)
    assert sinks is None or sinks.dtype == torch.bfloat16
    assert all(d is None for d in descales), "accepted and not used by the original"
    d, dv = q.shape[-1], v.shape[-1]
    assert d == dv <= 512 or (d, dv) in ((192, 128), (64, 512))


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    seqused_q=None,
    seqused_k=None,
    page_table=None,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    learnable_sink=None,
    attention_chunk=0,
    softcap=0.0,
    scheduler_metadata=None,
    num_splits=0,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_softmax_lse=False,
    backend="auto",  # "auto", "mutlass", "mubin"
    cp_world_size=1,
    cp_rank=0,
    cp_tot_seqused_k=None,
    out=None,
):
    record("mate.flash_attn_varlen_func", dict(locals()))
    _check(q, k, v, window_size, learnable_sink, (q_descale, k_descale, v_descale))
    assert qv is None, "absorbed MLA goes through flash_attn_with_kvcache"
    assert backend == "mutlass" or (softcap == 0 and attention_chunk == 0)
    _check_metadata(
        scheduler_metadata,
        q,
        k,
        v,
        None,
        page_table=page_table,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        seqused_q=seqused_q,
        seqused_k=seqused_k,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        cu_seqlens_k_new=None,
        leftpad_k=None,
        causal=causal,
        window_size=window_size,
        attention_chunk=attention_chunk,
        softcap=softcap,
        num_splits=num_splits,
        pack_gqa=pack_gqa,
        sm_margin=sm_margin,
    )
    result = attend(
        "flash_attn_varlen_func",
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q if cu_seqlens_q is not None else None,
        max_seqlen_k=max_seqlen_k if cu_seqlens_k is not None else None,
        seqused_q=seqused_q,
        seqused_k=seqused_k,
        page_table=page_table,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        sinks=learnable_sink,
        attention_chunk=attention_chunk,
        softcap=softcap,
        **({} if out is None else {"out": out}),
    )
    return result if return_softmax_lse else result[0]


def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    qv=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    page_table=None,
    cu_seqlens_q=None,
    cu_seqlens_k_new=None,
    max_seqlen_q=None,
    rotary_seqlens=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),  # -1 means infinite context window
    learnable_sink=None,
    attention_chunk=0,
    softcap=0.0,  # 0.0 means deactivated
    rotary_interleaved=True,
    scheduler_metadata=None,
    num_splits=0,  # Can be tuned for speed
    pack_gqa=None,  # Can be tuned for speed
    sm_margin=0,  # Can be tuned if some SMs are used for communication
    return_softmax_lse=False,
    cp_world_size=1,
    cp_rank=0,
    cp_tot_seqused_k=None,
):
    record("mate.flash_attn_with_kvcache", dict(locals()))
    import headway

    _check(q, k_cache, v_cache, window_size, learnable_sink, (q_descale, k_descale, v_descale))
    assert k is not None or cu_seqlens_k_new is None, "the original adds it to the lengths"
    assert not isinstance(cache_seqlens, int), "the original expands it to the wrong batch"
    check_rotary(rotary_cos, rotary_sin, q, k)
    arguments = {
        "k": k,
        "v": v,
        "qv": qv,
        "rotary_cos": rotary_cos,
        "rotary_sin": rotary_sin,
        "cache_seqlens": cache_seqlens,
        "cache_batch_idx": cache_batch_idx,
        "cache_leftpad": cache_leftpad,
        "page_table": page_table,
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k_new": cu_seqlens_k_new,
        "max_seqlen_q": max_seqlen_q,
        "rotary_seqlens": rotary_seqlens,
        "softmax_scale": softmax_scale,
        "causal": causal,
        "window_size": window_size,
        "sinks": learnable_sink,
        "attention_chunk": attention_chunk,
        "softcap": softcap,
        "rotary_interleaved": rotary_interleaved,
    }
    if qv is not None and qv.shape[-1] == 512 and q.shape[-1] == 64:
        return _absorbed(q, k_cache, v_cache, arguments, scheduler_metadata, return_softmax_lse)
    assert qv is None
    _check_metadata(
        scheduler_metadata,
        q,
        k_cache,
        v_cache,
        k,
        page_table=page_table,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=None,
        seqused_q=None,
        seqused_k=cache_seqlens,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=None,
        cu_seqlens_k_new=cu_seqlens_k_new,
        leftpad_k=cache_leftpad,
        causal=causal,
        window_size=window_size,
        attention_chunk=attention_chunk,
        softcap=softcap,
        num_splits=num_splits,
        pack_gqa=pack_gqa,
        sm_margin=sm_margin,
    )
    out = torch.full((*q.shape[:-1], v_cache.shape[-1]), float("nan"), dtype=q.dtype)
    result = headway.flash_attn_with_kvcache(
        q, k_cache, v_cache, out=out, return_lse=True, backend="reference", **arguments
    )
    return (*result, None) if return_softmax_lse else result[0]


def _absorbed(q, k_cache, v_cache, arguments, metadata, return_lse):
    """Absorbed MLA: a workspace whose first use in a step must say that nothing is in it yet."""
    import headway

    assert metadata is not None, "workspace must be provided"
    workspace, initialised = metadata
    assert workspace.dtype == torch.uint8
    assert workspace.numel() >= 1 << 20
    ignored = ("k", "v", "rotary_cos", "cache_batch_idx", "cache_leftpad", "sinks")
    assert all(arguments[name] is None for name in ignored)
    assert arguments["window_size"] in ((-1, -1), (-1, 0))
    assert arguments["softcap"] == 0
    assert arguments["attention_chunk"] == 0
    lengths = arguments["cache_seqlens"]
    schedule = _digest(2, lengths, q.shape[-2]).view(torch.uint8)
    if initialised:
        found = workspace[: schedule.numel()]
        assert torch.equal(found, schedule), "a stale schedule of another step"
    workspace[: schedule.numel()] = schedule
    out, lse = headway.flash_attn_with_kvcache(
        q, k_cache, v_cache, return_lse=True, backend="reference", **arguments
    )
    if q.dim() == 4:
        lse = lse.transpose(1, 2)
    return (out, lse) if return_lse else out
