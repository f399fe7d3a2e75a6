"""The producer warp of float8 prefill: it walks a CTA's list of work and fetches Q, K and V with TMA."""

from __future__ import annotations

from headway.kernels._triton import cta_barrier, gl, gluon, mbarrier, tma_load
from headway.kernels.hopper.mla_prefill_pipeline import (
    FACTS,
    Q_EVENTS,
    RECORD_BYTES,
    Tile,
    await_empty,
)
from headway.kernels.hopper.quantise_blocks import RECORD


@gluon.jit
def _load(desc, at, full, smem):
    tma_load(desc, at, full, smem._reinterpret(desc.dtype, desc.block_shape, desc.layout))


@gluon.jit
def _publish(buffers, order, tile, cfg: gl.constexpr):
    """Describe a tile in slot ``order`` % q_slots, once both warpgroups have left it."""
    slot = await_empty(buffers.q_empty, order, cfg.q_slots)
    facts = (
        tile.blocks,
        tile.first_key,
        tile.end_key,
        tile.position,
        tile.rows,
        tile.first_row,
        tile.head,
        tile.partial,
        tile.scale.to(gl.int32, bitcast=True),
        tile.v_scale.to(gl.int32, bitcast=True),
        tile.q_scale.to(gl.int32, bitcast=True),
    )
    for i in gl.static_range(FACTS):
        fact = gl.full([1], 0, gl.int32, cfg.one_warp) + facts[i]
        buffers.facts.index(slot * FACTS + i).store(fact)
    cta_barrier()
    return slot


@gluon.jit
def _push_q(q_wide, q_narrow, buffers, order, tile, row, cfg: gl.constexpr):
    slot = _publish(buffers, order, tile, cfg)
    full = buffers.q_full.index(slot)
    if tile.blocks > 0:
        mbarrier.expect(full, cfg.block_m * 192)
        wide = buffers.q_wide._reinterpret(gl.float8e4nv, [cfg.q_slots, cfg.block_m, 128], cfg.wide)
        narrow = buffers.q_narrow._reinterpret(
            gl.float8e4nv, [cfg.q_slots, cfg.block_m, 64], cfg.narrow
        )
        _load(q_wide, [tile.head, row, 0], full, wide.index(slot))
        _load(q_narrow, [tile.head, row, 128], full, narrow.index(slot))
    else:
        mbarrier.arrive(full, count=1)


@gluon.jit
def _push_q_to_cast(q_wide, q_narrow, buffers, order, event, tile, row, cfg: gl.constexpr):
    """Queries of 16 bits go through the ring, where K lies otherwise, a stage for each warpgroup."""
    slot = _publish(buffers, order, tile, cfg)
    mbarrier.arrive(buffers.q_full.index(slot), count=1)
    if tile.blocks > 0:
        for i in gl.static_range(Q_EVENTS):
            stage = await_empty(buffers.empty, event + i, cfg.stages)
            mbarrier.arrive(buffers.v_full.index(stage), count=1)
            full = buffers.k_full.index(stage)
            mbarrier.expect(full, 64 * 192 * 2)
            _load(q_wide, [tile.head, row + i * 64, 0], full, buffers.k_wide.index(stage))
            _load(q_narrow, [tile.head, row + i * 64, 128], full, buffers.k_narrow.index(stage))


@gluon.jit
def _push_k(k_wide, k_narrow, records, buffers, event, head, row, block, cfg: gl.constexpr):
    stage = await_empty(buffers.empty, event, cfg.stages)
    full = buffers.k_full.index(stage)
    if cfg.scale_blocks:
        mbarrier.expect(full, cfg.block_n * 192 + RECORD * 4)
        of_stage = buffers.records.index(stage * (RECORD_BYTES // (RECORD * 4)))
        _load(records, [head, block, 0], full, of_stage)
    else:
        mbarrier.expect(full, cfg.block_n * 192)
    _load(k_wide, [head, row, 0], full, buffers.k_wide.index(stage))
    _load(k_narrow, [head, row, 128], full, buffers.k_narrow.index(stage))


@gluon.jit
def _push_v(v, buffers, event, head, column, cfg: gl.constexpr):
    # The stage is free: K of this event, which goes ahead, waited for both.
    stage = event % cfg.stages
    full = buffers.v_full.index(stage)
    mbarrier.expect(full, cfg.block_n * 128)
    _load(v, [head, 0, column], full, buffers.v.index(stage))


@gluon.jit
def _scale(ptr, head, stride):
    """One float32 scale, or 1 where there is none."""
    if ptr is None:
        return gl.to_tensor(1.0)
    else:
        return gl.load(ptr + head * stride)


@gluon.jit
def produce(
    q_wide,
    q_narrow,
    k_wide,
    k_narrow,
    v,
    records,
    lists,
    scales,
    buffers,
    cfg: gl.constexpr,
):
    """Fetch what the items of this CTA's list need: Q, and K one block ahead of V."""
    work_indptr, work_info, qo_indptr, kv_indptr, context_lens, value_indptr = lists
    q_scale, k_scale, v_scale, stride_q_scale, stride_k_scale, stride_v_scale, softmax_scale = (
        scales
    )
    event = gl.to_tensor(0)
    order = gl.to_tensor(0)
    zero = gl.to_tensor(0)
    cu = gl.program_id(0)
    for item in range(gl.load(work_indptr + cu), gl.load(work_indptr + cu + 1)):
        fields = work_info + item * 8
        request = gl.load(fields)
        partial_row = gl.load(fields + 1)
        q_start = gl.load(fields + 2)
        q_end = gl.load(fields + 3)
        heads = gl.load(fields + 7)
        first_head = heads & 0xFFFF
        tiles = gl.cdiv(q_end - q_start, cfg.block_m)
        first = gl.load(kv_indptr + request)
        length = gl.load(context_lens + request)
        lo = gl.load(fields + 4) - first
        hi = gl.minimum(gl.load(fields + 5) - first, length)
        shift = length - gl.load(qo_indptr + request + 1)
        v_first = gl.load(value_indptr + request)
        for piece in range(((heads >> 16) - first_head) * tiles):
            head = first_head + piece // tiles
            kv_head = head // cfg.group
            row = q_start + piece % tiles * cfg.block_m
            rows = gl.minimum(q_end - row, cfg.block_m)
            end = hi
            if cfg.causal:
                end = gl.minimum(hi, row + rows + shift)
            blocks = gl.cdiv(gl.maximum(end - lo, 0), cfg.block_n)
            scale = softmax_scale * _scale(q_scale, kv_head, stride_q_scale)
            scale *= _scale(k_scale, kv_head, stride_k_scale)
            partial = gl.where(partial_row < 0, 0, 1)
            tile = Tile(
                blocks,
                lo,
                hi,
                row + shift,
                rows,
                gl.where(partial_row < 0, row, partial_row + row - q_start),
                head,
                partial,
                scale,
                _scale(v_scale, kv_head, stride_v_scale),
                _scale(q_scale, kv_head, stride_q_scale),
            )
            if cfg.casts_q:
                _push_q_to_cast(q_wide, q_narrow, buffers, order, event, tile, row, cfg)
                event += gl.where(blocks > 0, Q_EVENTS, 0)
            else:
                _push_q(q_wide, q_narrow, buffers, order, tile, row, cfg)
            order += 1
            last = lo + (blocks - 1) * cfg.block_n
            for i in range(blocks):
                key = last - i * cfg.block_n
                _push_k(
                    k_wide, k_narrow, records, buffers, event + i, kv_head, first + key,
                    (v_first + key) // cfg.block_n, cfg,
                )  # fmt: skip
                if i > 0:
                    at = v_first + key + cfg.block_n
                    _push_v(v, buffers, event + i - 1, kv_head, at, cfg)
            event += blocks
            if blocks > 0:
                _push_v(v, buffers, event - 1, kv_head, v_first + lo, cfg)
    none = gl.to_tensor(0.0)
    _publish(
        buffers,
        order,
        Tile(zero - 1, zero, zero, zero, zero, zero, zero, zero, none, none, none),
        cfg,
    )
    mbarrier.arrive(buffers.q_full.index(order % cfg.q_slots), count=1)
