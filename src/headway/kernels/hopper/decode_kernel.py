"""The decode kernel: the partitions of a worker, and what each is given."""

from __future__ import annotations

from headway.kernels._triton import gdc_launch_dependents, gdc_wait, gl, gluon
from headway.kernels.hopper.decode_consumer import Call, consume
from headway.kernels.hopper.decode_load import allocate, produce_boxes, produce_gathered
from headway.kernels.hopper.decode_merge import Parts
from headway.kernels.hopper.decode_paired import allocate_paired, consume_paired, produce_paired
from headway.kernels.hopper.decode_wide import consume_wide, score_wide
from headway.kernels.hopper.decode_widen import produce_widened

_UNSPECIALISED = [
    "units",
    "num_rows",
    "num_pages",
    "stride_q_batch",
    "stride_q_row",
    "stride_q_head",
    "stride_qv_batch",
    "stride_qv_row",
    "stride_qv_head",
    "stride_k_page",
    "stride_k_row",
    "stride_k_head",
    "stride_v_page",
    "stride_v_row",
    "stride_v_head",
    "stride_out_batch",
    "stride_out_row",
    "stride_out_head",
    "stride_lse_batch",
    "stride_lse_head",
    "stride_table",
    "stride_q_descale_batch",
    "stride_q_descale_head",
    "stride_k_descale_batch",
    "stride_k_descale_head",
    "stride_v_descale_batch",
    "stride_v_descale_head",
    "window_left",
    "window_right",
    "chunk",
]


@gluon.jit(do_not_specialize=_UNSPECIALISED)
def decode_kernel(
    k_desc,
    v_desc,
    q_ptr,
    qv_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    sinks,
    q_descale,
    k_descale,
    v_descale,
    page_table,
    spans,
    works,
    share_ptr,
    arrivals,
    parts,
    part_sums,
    units,
    num_rows,
    num_pages,
    stride_q_batch,
    stride_q_row,
    stride_q_head,
    stride_qv_batch,
    stride_qv_row,
    stride_qv_head,
    stride_k_page,
    stride_k_row,
    stride_k_head,
    stride_v_page,
    stride_v_row,
    stride_v_head,
    stride_out_batch,
    stride_out_row,
    stride_out_head,
    stride_lse_batch,
    stride_lse_head,
    stride_table,
    stride_q_descale_batch,
    stride_q_descale_head,
    stride_k_descale_batch,
    stride_k_descale_head,
    stride_v_descale_batch,
    stride_v_descale_head,
    scale,
    softcap,
    window_left,
    window_right,
    chunk,
    aux,
    new,
    score_mod: gl.constexpr,
    mask_mod: gl.constexpr,
    cfg: gl.constexpr,
    num_warps: gl.constexpr,
):
    """One program per worker of the plan and tile of packed rows; ``prepare`` in decode.py says what it is
    given. Keys and values come through descriptors, or through pointers where ``cfg.gathered``. ``new`` are
    new tokens and angles, or None."""
    buffers = allocate_paired(cfg) if cfg.tile.paired else allocate(cfg)
    # Up to here the kernel before may still run; the one behind may come up as workers finish.
    gdc_wait()
    gdc_launch_dependents()
    call = Call(
        units,
        num_rows,
        stride_q_batch,
        stride_q_row,
        stride_q_head,
        stride_qv_batch,
        stride_qv_row,
        stride_qv_head,
        stride_out_batch,
        stride_out_row,
        stride_out_head,
        stride_lse_batch,
        stride_lse_head,
        scale,
        softcap,
        window_left,
        window_right,
        chunk,
    )
    merging = Parts(arrivals, parts, part_sums)
    descales = (
        (q_descale, stride_q_descale_batch, stride_q_descale_head),
        (k_descale, stride_k_descale_batch, stride_k_descale_head),
        (v_descale, stride_v_descale_batch, stride_v_descale_head),
    )
    tensors = q_ptr, qv_ptr, out_ptr, lse_ptr, sinks, descales, spans, works, share_ptr
    k_strides = stride_k_page, stride_k_row, stride_k_head
    v_strides = stride_v_page, stride_v_row, stride_v_head
    work = buffers, page_table, spans, works, units, stride_table
    if cfg.new_tokens > 0:
        cache = k_ptr, v_ptr, k_strides, v_strides, page_table, stride_table
        given = tensors, buffers, merging, call, aux, (new[0], new[1], cache)
    else:
        given = tensors, buffers, merging, call, aux, new
    boxes = k_desc, v_desc, num_pages
    rows = k_ptr, v_ptr, k_strides, v_strides
    # Partitions can only be named where they are started.
    if cfg.tile.paired:
        gl.warp_specialize(
            [
                (_consume_paired, (given, score_mod, mask_mod, 0, cfg)),
                (_consume_paired, (given, score_mod, mask_mod, 1, cfg)),
                (_produce, (boxes, rows, work, 0, cfg)),
            ],
            cfg.worker_warps,
            cfg.worker_registers,
        )
    elif cfg.wide:
        gl.warp_specialize(
            [
                (_score_wide, (given, score_mod, mask_mod, cfg)),
                (_consume_wide, (given, 0, cfg)),
                (_consume_wide, (given, 1, cfg)),
                (_produce, (boxes, rows, work, 0, cfg)),
            ],
            cfg.worker_warps,
            cfg.worker_registers,
        )
    elif cfg.consumers == 2 and cfg.producers == 4:
        gl.warp_specialize(
            [
                (_consume, (given, score_mod, mask_mod, 0, cfg)),
                (_consume, (given, score_mod, mask_mod, 1, cfg)),
                (_produce, (boxes, rows, work, 0, cfg)),
                (_produce, (boxes, rows, work, 1, cfg)),
                (_produce, (boxes, rows, work, 2, cfg)),
                (_produce, (boxes, rows, work, 3, cfg)),
            ],
            cfg.worker_warps,
            cfg.worker_registers,
        )
    elif cfg.consumers == 2:
        gl.warp_specialize(
            [
                (_consume, (given, score_mod, mask_mod, 0, cfg)),
                (_consume, (given, score_mod, mask_mod, 1, cfg)),
                (_produce, (boxes, rows, work, 0, cfg)),
            ],
            cfg.worker_warps,
            cfg.worker_registers,
        )
    elif cfg.producers == 4:
        gl.warp_specialize(
            [
                (_consume, (given, score_mod, mask_mod, 0, cfg)),
                (_produce, (boxes, rows, work, 0, cfg)),
                (_produce, (boxes, rows, work, 1, cfg)),
                (_produce, (boxes, rows, work, 2, cfg)),
                (_produce, (boxes, rows, work, 3, cfg)),
            ],
            cfg.worker_warps,
            cfg.worker_registers,
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (given, score_mod, mask_mod, 0, cfg)),
                (_produce, (boxes, rows, work, 0, cfg)),
            ],
            cfg.worker_warps,
            cfg.worker_registers,
        )


@gluon.jit
def _consume(
    given,
    score_mod: gl.constexpr,
    mask_mod: gl.constexpr,
    half: gl.constexpr,
    cfg: gl.constexpr,
):
    """A consumer's partition."""
    tensors, buffers, parts, call, aux, new = given
    consume(tensors, buffers, parts, call, score_mod, mask_mod, aux, new, half, cfg)


@gluon.jit
def _score_wide(given, score_mod: gl.constexpr, mask_mod: gl.constexpr, cfg: gl.constexpr):
    tensors, buffers, _parts, call, aux, _new = given
    score_wide(tensors, buffers, call, score_mod, mask_mod, aux, cfg)


@gluon.jit
def _consume_wide(given, half: gl.constexpr, cfg: gl.constexpr):
    tensors, buffers, parts, call, _aux, _new = given
    consume_wide(tensors, buffers, parts, call, half, cfg)


@gluon.jit
def _consume_paired(
    given,
    score_mod: gl.constexpr,
    mask_mod: gl.constexpr,
    half: gl.constexpr,
    cfg: gl.constexpr,
):
    tensors, buffers, parts, call, aux, _new = given
    consume_paired(tensors, buffers, parts, call, score_mod, mask_mod, aux, half, cfg)


@gluon.jit
def _produce(boxes, rows, work, PRODUCER: gl.constexpr, cfg: gl.constexpr):
    """A producer's partition."""
    if cfg.widened:
        produce_widened(boxes, rows, work, cfg)
    elif cfg.gathered:
        k_ptr, v_ptr, k_strides, v_strides = rows
        produce_gathered(k_ptr, v_ptr, k_strides, v_strides, work, cfg)
    else:
        k_desc, v_desc, num_pages = boxes
        if cfg.tile.paired:
            produce_paired(k_desc, v_desc, num_pages, work, cfg)
        else:
            produce_boxes(k_desc, v_desc, num_pages, work, PRODUCER, cfg)
