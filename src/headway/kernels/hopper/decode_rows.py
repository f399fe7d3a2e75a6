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
    pointers = out_ptr + gl.expand_dims(offsets, 1) + gl.expand_dims(columns, 0)
    gl.store(
        gl.multiple_of(pointers, [16, 16]),
        out.to(out_ptr.dtype.element_ty),
        mask=gl.expand_dims(inside, 1) & gl.expand_dims(columns < cfg.head_dim_v, 0),
    )


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
def load_descale(descale, batch, head):
    """A float8 tensor's factor for a sequence and KV head; descale is (pointer or None, strides)."""
    pointer, stride_batch, stride_head = descale
    if pointer is None:
        return 1.0
    else:
        return gl.load(pointer + batch * stride_batch + head * stride_head)
