"""Rows of 16-bit floats as float8, by a scale for each row, in the registers of one warpgroup.

Two floats stay one word until they are scaled, and four float8 leave as one: taken apart, they would cost
twice the instructions.
"""

from __future__ import annotations

from headway.kernels._triton import gl, gluon
from headway.kernels.hopper.quantise_blocks import SMALLEST_SCALE


@gluon.constexpr_function
def _infinity(dtype: gl.dtype) -> int:
    return 0x7C00 if dtype == gl.float16 else 0x7F80


@gluon.jit
def _greater(a, b):
    """Of two pairs of int16, whichever is greater in each half."""
    return gl.inline_asm_elementwise(
        "max.s16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def largest_pairs(words, dtype: gl.constexpr):
    """Of the words (64, n) of each row, pairs of ``dtype``: (64, 2) that hold the largest magnitudes.

    The order of magnitudes is that of their bits. Here these begin so high that what is not finite becomes
    negative; :func:`scale_of` takes that back.
    """
    START: gl.constexpr = (0x8000 - _infinity(dtype)) * 0x10001
    largest = (words & 0x7FFF7FFF) + START
    for _ in gl.static_range(words.shape[1].bit_length() - 2):
        pairs = gl.reshape(largest, [64, largest.shape[1] // 2, 2])
        even, odd = gl.split(pairs)
        largest = _greater(even, odd)
    return largest


@gluon.jit
def scale_of(wide, narrow, dtype: gl.constexpr):
    """(64,) scales that put the largest magnitudes of rows at 448, from two :func:`largest_pairs`."""
    START: gl.constexpr = 0x8000 - _infinity(dtype)
    pairs = _greater(wide, gl.convert_layout(narrow, wide.type.layout, assert_trivial=True))
    largest = gl.max(gl.maximum(pairs << 16 >> 16, pairs >> 16), 1)
    bits = (gl.maximum(largest, START) - START).to(gl.int16)
    size = bits.to(dtype, bitcast=True).to(gl.float32)
    return gl.where(size > 0.0, gl.maximum(size / 448.0, SMALLEST_SCALE), 1.0)


@gluon.constexpr_function
def _cast_asm(dtype: gl.dtype) -> str:
    """PTX: four floats in two words, times a factor, as four float8 in one word."""
    if dtype == gl.float16:
        words = (
            "mov.b32 {h0, h1}, $1; mov.b32 {h2, h3}, $2; cvt.f32.f16 a, h0; cvt.f32.f16 b, h1;"
            " cvt.f32.f16 c, h2; cvt.f32.f16 d, h3;"
        )
    else:
        words = (
            "shl.b32 a, $1, 16; and.b32 b, $1, 0xffff0000;"
            " shl.b32 c, $2, 16; and.b32 d, $2, 0xffff0000;"
        )
    return (
        "{ .reg .b32 a, b, c, d; .reg .b16 h0, h1, h2, h3; "
        f"{words} mul.f32 a, a, $3; mul.f32 b, b, $3; mul.f32 c, c, $3; mul.f32 d, d, $3; "
        "cvt.rn.satfinite.e4m3x2.f32 h0, b, a; cvt.rn.satfinite.e4m3x2.f32 h1, d, c; "
        "mov.b32 $0, {h0, h1}; }"
    )


@gluon.jit
def cast(words, factor, dtype: gl.constexpr):
    """Words (64, n), pairs of ``dtype``, times ``factor`` (64,): words (64, n / 2) of four float8."""
    even, odd = gl.split(gl.reshape(words, [64, words.shape[1] // 2, 2]))
    rows: gl.constexpr = gl.SliceLayout(1, even.type.layout)
    factor = gl.expand_dims(gl.convert_layout(factor, rows, assert_trivial=True), 1)
    return gl.inline_asm_elementwise(
        _cast_asm(dtype),
        "=r,r,r,f",
        [even, odd, gl.broadcast(factor, even)[0]],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )
