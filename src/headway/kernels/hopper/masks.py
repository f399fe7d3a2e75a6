"""Which keys a query row sees, as limits per row and spans of key blocks per tile."""

from __future__ import annotations

from headway.kernels._triton import gl, gluon


@gluon.jit
def row_limits(
    position,
    seqlen_k,
    call,
    cfg: gl.constexpr,
):
    """Keys [lo, hi) that a query at ``position`` sees; scalars or tensors alike. Both never decrease
    with the position, so a tile's span follows from its first and last row. ``hi`` may fall below ``lo``
    or 0: then the query sees nothing."""
    lo = position * 0
    hi = position * 0 + seqlen_k
    if cfg.has_right:
        hi = gl.minimum(hi, position + call.window_right + 1)
    if cfg.has_left:
        lo = gl.maximum(lo, position - call.window_left)
    if cfg.has_chunk:
        # A query before the first key (negative position) is in a chunk that holds no key.
        first = gl.maximum(position, 0) // call.chunk * call.chunk
        lo = gl.maximum(lo, first)
        hi = gl.where(position < 0, 0, gl.minimum(hi, first + call.chunk))
    return lo, hi


@gluon.constexpr_function
def _mask_asm(count: int, has_left: bool) -> str:
    """PTX for one thread's ``count`` scores of an m64 wgmma accumulator.

    Element e of a thread is in row (lane // 4) + 8 * (e // 2 % 2) and column
    2 * (lane % 4) + 8 * (e // 4) + e % 2. Written out, each score costs a comparison with an immediate
    and a select; from tensor operations the compiler builds predicate words that cost three times that.
    """
    hi, lo = 2 * count, 3 * count
    lines = [
        "{ .reg .pred p; .reg .b32 c, h0, h1, l0, l1;",
        "mov.u32 c, %laneid; and.b32 c, c, 3; shl.b32 c, c, 1;",
        f"sub.s32 h0, ${hi}, c; sub.s32 h1, ${hi + 2}, c;",
    ]
    if has_left:
        lines.append(f"sub.s32 l0, ${lo}, c; sub.s32 l1, ${lo + 2}, c;")
    for e in range(count):
        row, column = e // 2 % 2, 8 * (e // 4) + e % 2
        lines.append(f"setp.gt.s32 p, h{row}, {column};")
        if has_left:
            lines.append(f"setp.le.and.s32 p, l{row}, {column}, p;")
        lines.append(f"selp.f32 ${e}, ${count + e}, 0fFF800000, p;")
    return " ".join([*lines, "}"])


@gluon.constexpr_function
def _mask_constraints(count: int, has_left: bool) -> str:
    return ",".join(["=f"] * count + ["f"] * count + ["r"] * count * (2 if has_left else 1))


@gluon.jit
def mask_scores(scores, lo, hi, first_key, HAS_LEFT: gl.constexpr):
    """``scores`` (64, BLOCK_N), with -inf where the key is outside the row's [lo, hi)."""
    COUNT: gl.constexpr = scores.shape[0] * scores.shape[1] // 128
    hi = gl.expand_dims(hi - first_key, 1)
    operands = [scores, hi]
    if HAS_LEFT:
        operands = [scores, hi, gl.expand_dims(lo - first_key, 1)]
    return gl.inline_asm_elementwise(
        _mask_asm(COUNT, HAS_LEFT),
        _mask_constraints(COUNT, HAS_LEFT),
        operands,
        dtype=gl.float32,
        is_pure=True,
        pack=COUNT,
    )
