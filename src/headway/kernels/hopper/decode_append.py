"""Rotation of queries and new keys in the decode kernel, and the write of new tokens to the cache.

A block of keys is read by one worker, and who reads a block writes its new rows first: the consumer, when
it begins the unit and would otherwise wait for data, while the producer brings in blocks of older keys and
waits before the first that holds new ones. No worker waits for another one.
"""

from __future__ import annotations

from headway.kernels._triton import cta_barrier, gl, gluon
from headway.kernels.hopper.decode_plan import MOST_PLACES


@gluon.jit
def rotated(x, ptr, offsets, inside, columns, positions, angles, cfg: gl.constexpr):
    """Rows x, which lie at ptr + ``offsets``, with their first 2 * rotary_half columns rotated: float32.

    The expression is that of headway.kernels.portable.append, whose results these equal.
    """
    cos, sin, _seqlens, stride_cos, stride_sin = angles
    if cfg.interleaved:
        partner = columns ^ 1
        angle = columns // 2
        first = columns % 2 == 0
    else:
        first = columns < cfg.rotary_half
        partner = columns + gl.where(first, cfg.rotary_half, -cfg.rotary_half)
        angle = columns % cfg.rotary_half
    turns = gl.expand_dims(inside, 1) & gl.expand_dims(columns < 2 * cfg.rotary_half, 0)
    partners = ptr + gl.expand_dims(offsets, 1) + gl.expand_dims(partner, 0)
    at = gl.expand_dims(positions.to(gl.int64), 1)
    angle = gl.expand_dims(angle, 0)
    cos_at = cos + at * stride_cos + angle
    sin_at = sin + at * stride_sin + angle
    if cfg.rotary_half % 8 == 0 and not cfg.interleaved:
        # What is not visible through the choice of a partner: eight columns are 16 bytes in a row.
        partners = gl.multiple_of(gl.max_contiguous(partners, [1, 8]), [16, 16])
        cos_at = gl.multiple_of(gl.max_contiguous(cos_at, [1, 8]), [16, 16])
        sin_at = gl.multiple_of(gl.max_contiguous(sin_at, [1, 8]), [16, 16])
    other = gl.load(partners, mask=turns, other=0.0)
    c = gl.load(cos_at, mask=turns, other=1.0).to(gl.float32)
    s = gl.load(sin_at, mask=turns, other=0.0).to(gl.float32)
    sign = gl.expand_dims(gl.where(first, -1.0, 1.0), 0)
    return x.to(gl.float32) * c + sign * other.to(gl.float32) * s


@gluon.jit
def due_from(span, first, count, cfg: gl.constexpr):
    """The end of a block from which on a worker's blocks of a unit hold new rows; beyond its last block
    where none of them does. The worker that has the unit's last block is due then, if not before: new rows
    that no query sees are in no block."""
    end = (span.first_block + first + count) * cfg.block_n
    fresh = span.keys + span.pad - cfg.new_tokens + 1
    return gl.where(first + count == span.blocks, gl.minimum(fresh, end), fresh)


@gluon.jit
def is_due(span, first, count, cfg: gl.constexpr):
    """Whether a worker's blocks of a unit wait for rows to be written."""
    end = (span.first_block + first + count) * cfg.block_n
    return (count > 0) & (end >= due_from(span, first, count, cfg))


@gluon.jit
def new_tokens_of(sources, batch):
    """(first row among the new tokens, their number) of a sequence."""
    cu_seqlens, number = sources[2], sources[3]
    if cu_seqlens is None:
        return batch * 0, number
    else:
        first = gl.load(cu_seqlens + batch)
        return first, gl.load(cu_seqlens + batch + 1) - first


@gluon.jit
def rotary_base(span, new, batch):
    """The position that a sequence's first new token is rotated by."""
    seqlens = new[1][2]
    if seqlens is None:
        return span.keys + span.pad - new_tokens_of(new[0], batch)[1]
    else:
        return gl.load(seqlens + batch)


@gluon.jit
def _fetch_rows(
    ptr,
    strides,
    batch,
    head,
    first,
    inside,
    base,
    angles,
    HEAD_DIM: gl.constexpr,
    WIDTH: gl.constexpr,
    layout: gl.constexpr,
    TURNS: gl.constexpr,
    cfg: gl.constexpr,
):
    """New rows of a head, in their own dtype; rotated if ``TURNS``."""
    stride_batch, stride_row, stride_head = strides
    token = gl.arange(0, cfg.new_tokens, layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout))
    offsets = batch.to(gl.int64) * stride_batch + head.to(gl.int64) * stride_head
    offsets += (first + token).to(gl.int64) * stride_row
    mask = gl.expand_dims(inside, 1) & gl.expand_dims(columns < HEAD_DIM, 0)
    pointers = ptr + gl.expand_dims(offsets, 1) + gl.expand_dims(columns, 0)
    rows = gl.load(gl.multiple_of(pointers, [16, 16]), mask=mask, other=0.0)
    if TURNS:
        turned = rotated(rows, ptr, offsets, inside, columns, base + token, angles, cfg)
        rows = turned.to(rows.dtype)
    return rows


@gluon.jit
def _quantised(rows, descale, batch, head, ptr):
    """Rows as the cache holds them."""
    if rows.dtype == ptr.dtype.element_ty:
        return rows
    else:
        pointer, stride_batch, stride_head = descale
        factor = 1.0
        if pointer is not None:
            factor = gl.load(pointer + batch * stride_batch + head * stride_head)
        return (rows.to(gl.float32) / factor).to(ptr.dtype.element_ty)


@gluon.jit
def _places(span, first, count, begin, new, cache, layout: gl.constexpr, cfg: gl.constexpr):
    """(which new tokens a worker writes, their pages, their rows in these) in a layout of tokens."""
    token = gl.arange(0, cfg.new_tokens, layout=layout)
    at = begin + token
    # Rows outside of all blocks belong to the workers that have the first block and the last.
    low = gl.where(first == 0, 0, (span.first_block + first) * cfg.block_n)
    high = (span.first_block + first + count) * cfg.block_n
    high = gl.where(first + count == span.blocks, MOST_PLACES, high)
    inside = (token < new) & (at >= low) & (at < high)
    page, row = span.cache_row + token * 0, at
    if cfg.page_size > 0:
        table = cache[4] + span.cache_row.to(gl.int64) * cache[5]
        page = gl.load(table + at // cfg.page_size, mask=inside, other=0)
        row = at % cfg.page_size
    return inside, page.to(gl.int64), row.to(gl.int64)


@gluon.jit
def _store_rows(
    rows,
    inside,
    page,
    row,
    ptr,
    strides,
    head,
    HEAD_DIM: gl.constexpr,
    WIDTH: gl.constexpr,
    layout: gl.constexpr,
):
    stride_page, stride_row, stride_head = strides
    columns = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout))
    offsets = page * stride_page + row * stride_row + head.to(gl.int64) * stride_head
    pointers = ptr + gl.expand_dims(offsets, 1) + gl.expand_dims(columns, 0)
    mask = gl.expand_dims(inside, 1) & gl.expand_dims(columns < HEAD_DIM, 0)
    gl.store(gl.multiple_of(pointers, [16, 16]), rows, mask=mask)


@gluon.jit
def fetch_new(new, descales, span, batch, head, first, count, cfg: gl.constexpr):
    """What a worker writes of a unit's new keys and values: (keys and their places, values and theirs)."""
    sources, angles, cache = new
    k_new, v_new, _cu_seqlens, _number, k_strides, v_strides = sources
    _q_descale, k_descale, v_descale = descales
    at, number = new_tokens_of(sources, batch)
    base = rotary_base(span, new, batch) if cfg.rotates else number
    begin = span.keys + span.pad - number
    k_tokens: gl.constexpr = gl.SliceLayout(1, cfg.new_k_rows)
    v_tokens: gl.constexpr = gl.SliceLayout(1, cfg.new_v_rows)
    k_inside, k_page, k_row = _places(span, first, count, begin, number, cache, k_tokens, cfg)
    v_inside, v_page, v_row = _places(span, first, count, begin, number, cache, v_tokens, cfg)
    k = _fetch_rows(
        k_new,
        k_strides,
        batch,
        head,
        at,
        k_inside,
        base,
        angles,
        gl.constexpr(cfg.head_dim),
        gl.constexpr(cfg.new_k_width),
        gl.constexpr(cfg.new_k_rows),
        gl.constexpr(cfg.rotates),
        cfg,
    )
    v = _fetch_rows(
        v_new,
        v_strides,
        batch,
        head,
        at,
        v_inside,
        base,
        angles,
        gl.constexpr(cfg.head_dim_v),
        gl.constexpr(cfg.new_v_width),
        gl.constexpr(cfg.new_v_rows),
        gl.constexpr(False),
        cfg,
    )
    k = _quantised(k, k_descale, batch, head, cache[0])
    v = _quantised(v, v_descale, batch, head, cache[1])
    return (k, k_inside, k_page, k_row), (v, v_inside, v_page, v_row)


@gluon.jit
def write_new(rows, cache, head, cfg: gl.constexpr):
    """Write what :func:`fetch_new` brought, before anything that a thread then lets the copy engine do."""
    k_ptr, v_ptr, k_strides, v_strides, _table, _stride = cache
    k, k_inside, k_page, k_row = rows[0]
    v, v_inside, v_page, v_row = rows[1]
    _store_rows(
        k,
        k_inside,
        k_page,
        k_row,
        k_ptr,
        k_strides,
        head,
        gl.constexpr(cfg.head_dim),
        gl.constexpr(cfg.new_k_width),
        gl.constexpr(cfg.new_k_rows),
    )
    _store_rows(
        v,
        v_inside,
        v_page,
        v_row,
        v_ptr,
        v_strides,
        head,
        gl.constexpr(cfg.head_dim_v),
        gl.constexpr(cfg.new_v_width),
        gl.constexpr(cfg.new_v_rows),
    )
    # Every thread's own: the copy engine reads through another path than stores go.
    threads = gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0]))
    gl.inline_asm_elementwise(
        "fence.proxy.async.global; mov.b32 $0, $1;",
        "=r,r",
        [threads],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )
    cta_barrier()
