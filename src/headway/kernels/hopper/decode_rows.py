"""Packed query rows in memory: where output and LSE of a row go, and the numbers that belong to it."""

from __future__ import annotations

from headway.kernels._triton import gl, gluon


@gluon.jit
def store_out(out_ptr, out, rows, columns, span, batch, head, call, cfg: gl.constexpr):
    """Write finished rows of packed queries; ``rows`` and ``columns`` in slices of out's layout."""
    token = rows // cfg.group
    offsets = batch.to(gl.int64) * call.stride_out_batch
    offsets += (span.q_first + token).to(gl.int64) * call.stride_out_row
    offsets += (head * cfg.group + rows % cfg.group) * call.stride_out_head
    inside = (rows < call.num_rows) & (token < span.q_rows)
    mask = gl.expand_dims(inside, 1) & gl.expand_dims(columns < cfg.head_dim_v, 0)
    if cfg.abreast > 1:
        offsets, own = own_columns(offsets, rows, columns, gl.constexpr(cfg.head_dim_v), cfg)
        mask = mask & own
    pointers = out_ptr + gl.expand_dims(offsets, 1) + gl.expand_dims(columns, 0)
    pointers = gl.multiple_of(pointers, [16, 16])
    gl.store(pointers, out.to(out_ptr.dtype.element_ty), mask=mask)


@gluon.jit
def store_lse(lse_ptr, lse, rows, span, batch, head, call, cfg: gl.constexpr):
    if lse_ptr is not None:
        token = rows // cfg.group
        offsets = batch.to(gl.int64) * call.stride_lse_batch + (span.q_first + token)
        offsets += (head * cfg.group + rows % cfg.group).to(gl.int64) * call.stride_lse_head
        gl.store(lse_ptr + offsets, lse, mask=(rows < call.num_rows) & (token < span.q_rows))


@gluon.jit
def load_sinks(sinks, head, rows, call, cfg: gl.constexpr):
    """Sinks of packed rows, -inf where there are none."""
    if sinks is None:
        return gl.full(rows.shape, float("-inf"), gl.float32, rows.type.layout)
    else:
        at = sinks + head * cfg.group + rows % cfg.group
        return gl.load(at, mask=rows < call.num_rows, other=0.0).to(gl.float32)


@gluon.jit
def side_of(rows, cfg: gl.constexpr):
    """Which of the KV heads that are read as one a packed row belongs to."""
    return rows % cfg.group // (cfg.group // cfg.abreast)


@gluon.jit
def own_columns(offsets, rows, columns, WIDTH: gl.constexpr, cfg: gl.constexpr):
    """Of tiles as wide as all KV heads that are read as one: (where packed rows would begin if they were,
    which columns are theirs)."""
    OWN: gl.constexpr = WIDTH // cfg.abreast
    begin = side_of(rows, cfg) * OWN
    past = gl.expand_dims(columns, 0) - gl.expand_dims(begin, 1)
    return offsets - begin, (past >= 0) & (past < OWN)


@gluon.jit
def row_descales(descale, batch, unit, rows, cfg: gl.constexpr):
    """A float8 tensor's factor for packed rows: one for all, or one each where heads are read as one."""
    if cfg.abreast == 1:
        return load_descale(descale, batch, unit)
    else:
        ones = gl.full(rows.shape, 1.0, gl.float32, rows.type.layout)
        return ones * load_descale(descale, batch, unit * cfg.abreast + side_of(rows, cfg))


@gluon.jit
def load_descale(descale, batch, head):
    """A float8 tensor's factor for a sequence and KV head; descale is (pointer or None, strides)."""
    pointer, stride_batch, stride_head = descale
    if pointer is None:
        return 1.0
    else:
        return gl.load(pointer + batch * stride_batch + head * stride_head)
