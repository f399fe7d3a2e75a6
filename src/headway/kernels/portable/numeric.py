"""Conversions between number formats, on every device and under the interpreter.

float8 tensors reach kernels as float8 where the device converts them, otherwise as uint8; the element
type itself says which, so kernels call these functions and need no flag.
"""

from __future__ import annotations

from headway.kernels._triton import INTERPRETED, jit, tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@jit
def widen(x, dtype: tl.constexpr):
    """float8 values (float8 or uint8 elements) as a 16-bit dtype, exactly; others unchanged."""
    if x.dtype == tl.uint8:
        # e4m3's exponent and mantissa, moved to float16's places, are the value times 2^-8.
        bits = ((x & 0x80).to(tl.uint16) << 8) | ((x & 0x7F).to(tl.uint16) << 7)
        return cast(bits.to(tl.float16, bitcast=True) * 256.0, dtype)
    elif x.dtype.primitive_bitwidth == 8:
        return x.to(dtype)
    else:
        return x


@jit
def widen_even(x):
    """Of pairs of float8_e4m3 values, one uint16 each, the first ones as float16, exactly."""
    if INTERPRETED:
        return widen((x & 0xFF).to(tl.uint8), tl.float16)
    else:
        return _half_of_pairs("cvt.rn.f16x2.e4m3x2 $0, even;", x)


@jit
def widen_odd(x):
    """The second ones."""
    if INTERPRETED:
        return widen((x >> 8).to(tl.uint8), tl.float16)
    else:
        return _half_of_pairs("cvt.rn.f16x2.e4m3x2 $0, odd;", x)


@jit
def _half_of_pairs(CONVERT: tl.constexpr, x):
    # The bytes of two pairs are put in order once for both halves: assembly that is alike is merged.
    SORT: tl.constexpr = """{
        .reg .b32 sorted;
        .reg .b16 even, odd;
        prmt.b32 sorted, $1, 0, 0x3120;
        mov.b32 {even, odd}, sorted;
        """
    return tl.inline_asm_elementwise(SORT + CONVERT + "}", "=r,r", [x], tl.float16, True, 2)


@jit
def cast(x, dtype: tl.constexpr):
    """Conversion that rounds to nearest even. The interpreter's own to bfloat16 does not."""
    if INTERPRETED and (dtype == tl.bfloat16 and x.dtype != tl.bfloat16):
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        return (rounded >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@jit
def to_e4m3_bits(x):
    """float32 rounded to nearest even and saturated to float8_e4m3fn, as uint8 bits. NaN stays NaN."""
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    is_nan = magnitude > 0x7F800000
    small = tl.minimum(tl.abs(x), 448.0)
    # Below 2^-6 steps are 2^-9: adding 2^14 leaves exactly the rounded count of them in the low bits.
    subnormal = (small + 16384.0).to(tl.uint32, bitcast=True) & 0xFF
    normal = small.to(tl.uint32, bitcast=True)
    normal = (normal + 0x7FFFF + ((normal >> 20) & 1)) >> 20
    normal = normal - (120 << 3)
    code = tl.where(small < 0.015625, subnormal, normal)
    code = tl.where(is_nan, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@jit
def row_magnitude(x):
    """Per row of a block, the power of two just below its largest magnitude; 1 for rows of zeros."""
    top = tl.max(tl.abs(x.to(tl.float32)), 1)
    power = (top.to(tl.uint32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where(power == 0.0, 1.0, power)


@jit
def tanh(x):
    """tanh by one exponential, relative error below 1e-6; saturates without overflow.

    Where the exponential loses an argument's last digits a polynomial has them.
    """
    square = x * x
    small = x * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 - square * (17.0 / 315))))
    return tl.where(square < 0.0625, small, 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0))


@jit
def dot(a, b, acc):
    """a · b + acc in float32. The interpreter multiplies bfloat16 as raw bits, so it gets float32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a, b, acc)


@jit
def recomputed(x, NVIDIA: tl.constexpr):
    """The same scalar, which the compiler takes for another: what follows from it is computed anew."""
    if NVIDIA:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], tl.int32, False, 1)
    else:
        return x


@jit
def program_ids_again(NVIDIA: tl.constexpr):
    """(program_id(0), programs behind this one along axis 1, program_id(2)), like :func:`recomputed`."""
    if NVIDIA:
        behind: tl.constexpr = """{
        .reg .u32 y;
        mov.u32 y, %ctaid.y;
        mov.u32 $0, %nctaid.y;
        sub.u32 $0, $0, y;
        sub.u32 $0, $0, 1;
        }"""
        x = tl.inline_asm_elementwise("mov.u32 $0, %ctaid.x;", "=r", [], tl.int32, False, 1)
        y = tl.inline_asm_elementwise(behind, "=r", [], tl.int32, False, 1)
        z = tl.inline_asm_elementwise("mov.u32 $0, %ctaid.z;", "=r", [], tl.int32, False, 1)
        return x, y, z
    else:
        return tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1), tl.program_id(2)
