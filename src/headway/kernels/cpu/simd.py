"""Vector building blocks for the compiled CPU kernels, as numba intrinsics.

Each intrinsic emits LLVM vector code directly: the products of a small tile of query rows with a
    block of keys, the accumulation of probabilities times values, and the row-wise pieces of an
    online softmax. They take addresses and plain numbers, so they serve any cache layout, and they
    are the only place that knows how wide a vector is.

Memory is addressed by ``int64`` byte addresses; indices and strides count elements. All arithmetic
is float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import binding as llvm
from llvmlite import ir
from numba import extending, types
from numba.core import cgutils

intrinsic: Any = extending.intrinsic

_INT32 = ir.IntType(32)
_INT64 = ir.IntType(64)
_FLOAT = ir.FloatType()
_CONTRACT = ("contract",)


def _float_lanes() -> int:
    """Lanes of float32 per vector: one AVX-512 register, else one of 256 bits or two of 128."""
    return 16 if llvm.get_host_cpu_features().get("avx512f", False) else 8


LANES = _float_lanes()
"""float32 lanes of a vector here. Rows handed to the tile functions are padded to a multiple."""

_VECTOR = ir.VectorType(_FLOAT, LANES)
_VECTOR_INT = ir.VectorType(_INT32, LANES)
_VECTOR_COLUMNS = 4
_KEEP_CLOSE = 3  # the locality operand of llvm.prefetch: all cache levels
_ROUND_TO_INTEGER = 12582912.0  # 1.5 * 2**23: a float32 near it has no fraction bits left


def _constant(value: float) -> ir.Constant:
    return ir.Constant(_VECTOR, [float(value)] * LANES)


def _constant_int(value: int) -> ir.Constant:
    return ir.Constant(_VECTOR_INT, [value] * LANES)


def _broadcast(builder: Any, scalar: Any) -> Any:
    single = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), scalar, _INT32(0))
    return builder.shuffle_vector(
        single, ir.Constant(_VECTOR, ir.Undefined), ir.Constant(_VECTOR_INT, [0] * LANES)
    )


def _pointer(builder: Any, address: Any, index: Any, element: Any) -> Any:
    base = builder.inttoptr(address, element.as_pointer())
    return builder.gep(base, [index])


def _load_floats(builder: Any, address: Any, index: Any) -> Any:
    pointer = _pointer(builder, address, index, _FLOAT)
    return builder.load(builder.bitcast(pointer, _VECTOR.as_pointer()), align=4)


def _store_floats(builder: Any, address: Any, index: Any, value: Any) -> None:
    pointer = _pointer(builder, address, index, _FLOAT)
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer()), align=4)


def _load_bfloats(builder: Any, address: Any, index: Any) -> Any:
    half = ir.VectorType(ir.IntType(16), LANES)
    pointer = _pointer(builder, address, index, ir.IntType(16))
    bits = builder.load(builder.bitcast(pointer, half.as_pointer()), align=2)
    wide = builder.shl(builder.zext(bits, _VECTOR_INT), _constant_int(16))
    return builder.bitcast(wide, _VECTOR)


def _load_halves(builder: Any, address: Any, index: Any) -> Any:
    half = ir.VectorType(ir.HalfType(), LANES)
    pointer = _pointer(builder, address, index, ir.HalfType())
    return builder.fpext(
        builder.load(builder.bitcast(pointer, half.as_pointer()), align=2), _VECTOR
    )


_VECTOR_LOADS: dict[str, Callable[..., Any]] = {
    "float32": _load_floats,
    "bfloat16": _load_bfloats,
    "float16": _load_halves,
}

VECTOR_DTYPES = tuple(_VECTOR_LOADS)
"""Names of the element types that the tile functions can read from memory without a conversion pass."""


def _prefetch(builder: Any, address: Any) -> None:
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, _INT32, _INT32, _INT32])
    prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    pointer = builder.inttoptr(address, byte)
    builder.call(prefetch, [pointer, _INT32(0), _INT32(_KEEP_CLOSE), _INT32(1)])


def _multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return builder.fadd(builder.fmul(a, b, flags=_CONTRACT), c, flags=_CONTRACT)


def _shuffle(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_INT32, len(lanes)), lanes))


def _interleaved_sums(builder: Any, vectors: list[Any]) -> Any:
    """Reduce LANES vectors to one whose lane i is the sum of the lanes of vector i.

    Two rounds add neighbours inside 128-bit quarters, the others add neighbouring quarters: every
    round halves the number of vectors, so a sum costs three instructions rather than a whole
    reduction.
    """
    quarters = LANES // 4
    in_quarter = [
        [4 * x + base + offset for x in range(quarters) for base in (0, LANES) for offset in pair]
        for pair in ((0, 2), (1, 3))
    ]
    across = [
        [4 * x + lane for x in range(start, 2 * quarters, 2) for lane in range(4)]
        for start in (0, 1)
    ]
    level = 0
    while len(vectors) > 1:
        even, odd = in_quarter if level < 2 else across
        vectors = [
            builder.fadd(_shuffle(builder, a, b, even), _shuffle(builder, a, b, odd))
            for a, b in zip(vectors[::2], vectors[1::2], strict=True)
        ]
        level += 1
    return vectors[0]


def _exp2(builder: Any, x: Any) -> Any:
    """2**x per lane for x <= 0 and moderate positive x; 0 below -126. Relative error about 1e-7."""
    tiny = builder.fcmp_ordered("<", x, _constant(-126.0))
    bounded = builder.select(tiny, _constant(-126.0), x)
    shifted = builder.fadd(bounded, _constant(_ROUND_TO_INTEGER))
    whole = builder.fsub(shifted, _constant(_ROUND_TO_INTEGER))
    part = builder.fsub(bounded, whole)
    result = _constant(1.5403530393381609e-4)
    for coefficient in (
        1.3333558146428443e-3,
        9.6181291076284772e-3,
        5.5504108664821580e-2,
        2.4022650695910072e-1,
        6.9314718055994531e-1,
        1.0,
    ):
        result = _multiply_add(builder, result, part, _constant(coefficient))
    exponent = builder.add(builder.fptosi(whole, _VECTOR_INT), _constant_int(127))
    power = builder.bitcast(builder.shl(exponent, _constant_int(23)), _VECTOR)
    return builder.select(tiny, _constant(0.0), builder.fmul(result, power))


def _reduced(builder: Any, vector: Any, combine: Callable[[Any, Any], Any]) -> Any:
    width = LANES
    while width > 1:
        half = width // 2
        low = _shuffle(builder, vector, vector, list(range(half)))
        high = _shuffle(builder, vector, vector, list(range(half, width)))
        vector, width = combine(low, high), half
    return builder.extract_element(vector, _INT32(0))


def _larger(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _variables(builder: Any, initial: list[Any]) -> list[Any]:
    slots = [cgutils.alloca_once(builder, value.type) for value in initial]
    for slot, value in zip(slots, initial, strict=True):
        builder.store(value, slot)
    return slots


def make_scores(dtype: str, rows: int, *, prefetch: bool) -> Any:
    """An intrinsic for the products of ``rows`` query rows (1, 2 or 4) with a block of keys.

    The intrinsic is
    ``scores(q, q_stride, keys, ahead_k, ahead_v, num_keys, head_dim, out, out_stride)``:
    float32 query rows at ``q``, ``keys`` the address of ``num_keys`` int64 row addresses of
    elements of ``dtype``, out[row, key] float32. ``num_keys`` is a multiple of ``LANES // rows``
    and ``head_dim`` of LANES. With ``prefetch``, the rows whose addresses lie at ``ahead_k``
    and ``ahead_v`` are asked for meanwhile, a piece for every piece computed: a core that asks for
    many lines at once waits for them, and one that asks for none waits for each.
    """
    group = LANES // rows
    load = _VECTOR_LOADS[dtype]
    piece = LANES * (4 if dtype == "float32" else 2)

    def emit_group(
        builder: Any, q: Any, q_stride: Any, addresses: list[Any], ahead: list[Any], head_dim: Any
    ) -> Any:
        sums = _variables(builder, [_constant(0.0)] * LANES)
        with cgutils.for_range_slice(builder, _INT64(0), head_dim, _INT64(LANES)) as (at, step):
            keys = [load(builder, address, at) for address in addresses]
            for address in ahead:
                offset = builder.mul(step, _INT64(piece))
                _prefetch(builder, builder.add(address, offset))
            for row in range(rows):
                start = builder.add(builder.mul(q_stride, _INT64(row)), at)
                query = _load_floats(builder, q, start)
                for key in range(group):
                    slot = sums[row * group + key]
                    total = _multiply_add(builder, query, keys[key], builder.load(slot))
                    builder.store(total, slot)
        return _interleaved_sums(builder, [builder.load(slot) for slot in sums])

    def row_addresses(builder: Any, table: Any, first: Any) -> list[Any]:
        return [
            builder.load(_pointer(builder, table, builder.add(first, _INT64(k)), _INT64))
            for k in range(group)
        ]

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        q, q_stride, keys, ahead_k, ahead_v, num_keys, head_dim, out, out_stride = args
        with cgutils.for_range_slice(builder, _INT64(0), num_keys, _INT64(group)) as (first, _):
            addresses = row_addresses(builder, keys, first)
            ahead = []
            if prefetch:
                ahead = row_addresses(builder, ahead_k, first)
                ahead += row_addresses(builder, ahead_v, first)
            result = emit_group(builder, q, q_stride, addresses, ahead, head_dim)
            for row in range(rows):
                lanes = list(range(row * group, (row + 1) * group))
                start = builder.add(builder.mul(out_stride, _INT64(row)), first)
                _store_floats(builder, out, start, _shuffle(builder, result, result, lanes))
        return context.get_dummy_value()

    @intrinsic
    def scores(typingctx, q, q_stride, keys, ahead_k, ahead_v, num_keys, head_dim, out, out_stride):  # type: ignore[no-untyped-def]
        return types.void(*[types.int64] * 9), codegen

    return scores


def make_accumulate(dtype: str, rows: int) -> Any:
    """An intrinsic that adds probabilities times values to ``rows`` output rows.

    The intrinsic is ``accumulate(p, p_stride, values, num_keys, head_dim, out, out_stride)``:
    float32 probabilities p[row, key], ``values`` the address of ``num_keys`` int64 row addresses of
    elements of ``dtype``, out[row, :] float32, read and written. ``head_dim`` is a multiple of
    LANES; ``num_keys`` is any number.
    """
    load = _VECTOR_LOADS[dtype]

    def emit_columns(builder: Any, args: Any, first: Any, columns: int) -> None:
        p, p_stride, values, num_keys, _, out, out_stride = args
        starts = [
            builder.add(builder.add(builder.mul(out_stride, _INT64(row)), first), _INT64(LANES * c))
            for row in range(rows)
            for c in range(columns)
        ]
        sums = _variables(builder, [_load_floats(builder, out, start) for start in starts])
        with cgutils.for_range(builder, num_keys) as loop:
            address = builder.load(_pointer(builder, values, loop.index, _INT64))
            value = [
                load(builder, address, builder.add(first, _INT64(LANES * c)))
                for c in range(columns)
            ]
            for row in range(rows):
                at = builder.add(builder.mul(p_stride, _INT64(row)), loop.index)
                weight = _broadcast(builder, builder.load(_pointer(builder, p, at, _FLOAT)))
                for c in range(columns):
                    slot = sums[row * columns + c]
                    total = _multiply_add(builder, weight, value[c], builder.load(slot))
                    builder.store(total, slot)
        for start, slot in zip(starts, sums, strict=True):
            _store_floats(builder, out, start, builder.load(slot))

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        head_dim = args[4]
        wide = _INT64(_VECTOR_COLUMNS * LANES)
        aligned = builder.sub(head_dim, builder.srem(head_dim, wide))
        with cgutils.for_range_slice(builder, _INT64(0), aligned, wide) as (first, _):
            emit_columns(builder, args, first, _VECTOR_COLUMNS)
        with cgutils.for_range_slice(builder, aligned, head_dim, _INT64(LANES)) as (first, _):
            emit_columns(builder, args, first, 1)
        return context.get_dummy_value()

    @intrinsic
    def accumulate(typingctx, p, p_stride, values, num_keys, head_dim, out, out_stride):  # type: ignore[no-untyped-def]
        return types.void(*[types.int64] * 7), codegen

    return accumulate


def make_widen(dtype: str) -> Any:
    """An intrinsic ``widen(source, target, count, factor)``: target[i] = float32(source[i]) * factor.

    ``count`` is any number; a tail shorter than a vector is handled element by element, so nothing
    past it is read.
    """
    load = _VECTOR_LOADS[dtype]

    def load_one(builder: Any, source: Any, index: Any) -> Any:
        if dtype == "bfloat16":
            bits = builder.load(_pointer(builder, source, index, ir.IntType(16)))
            return builder.bitcast(builder.shl(builder.zext(bits, _INT32), _INT32(16)), _FLOAT)
        if dtype == "float16":
            return builder.fpext(
                builder.load(_pointer(builder, source, index, ir.HalfType())), _FLOAT
            )
        return builder.load(_pointer(builder, source, index, _FLOAT))

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, target, count, factor = args
        aligned = builder.sub(count, builder.srem(count, _INT64(LANES)))
        factors = _broadcast(builder, factor)
        with cgutils.for_range_slice(builder, _INT64(0), aligned, _INT64(LANES)) as (at, _):
            wide = builder.fmul(load(builder, source, at), factors)
            _store_floats(builder, target, at, wide)
        with cgutils.for_range_slice(builder, aligned, count, _INT64(1)) as (at, _):
            one = builder.fmul(load_one(builder, source, at), factor)
            builder.store(one, _pointer(builder, target, at, _FLOAT))
        return context.get_dummy_value()

    @intrinsic
    def widen(typingctx, source, target, count, factor):  # type: ignore[no-untyped-def]
        return types.void(types.int64, types.int64, types.int64, types.float32), codegen

    return widen


def make_narrow(dtype: str) -> Any:
    """An intrinsic ``narrow(source, target, i, factor)``: target[i] = dtype(source[i] * factor).

    Rounds to nearest even; NaN stays NaN.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, target, index, factor = args
        value = builder.fmul(builder.load(_pointer(builder, source, index, _FLOAT)), factor)
        _store_narrow(builder, dtype, value, target, index)
        return context.get_dummy_value()

    @intrinsic
    def narrow(typingctx, source, target, index, factor):  # type: ignore[no-untyped-def]
        return types.void(types.int64, types.int64, types.int64, types.float32), codegen

    return narrow


def _store_narrow(builder: Any, dtype: str, value: Any, target: Any, index: Any) -> None:
    if dtype == "bfloat16":
        bits = builder.bitcast(value, _INT32)
        upper = builder.lshr(bits, _INT32(16))
        bias = builder.add(builder.and_(upper, _INT32(1)), _INT32(0x7FFF))
        rounded = builder.lshr(builder.add(bits, bias), _INT32(16))
        is_nan = builder.fcmp_unordered("uno", value, value)
        narrowed = builder.select(is_nan, builder.or_(upper, _INT32(0x40)), rounded)
        short = ir.IntType(16)
        builder.store(builder.trunc(narrowed, short), _pointer(builder, target, index, short))
    elif dtype == "float16":
        half = ir.HalfType()
        builder.store(builder.fptrunc(value, half), _pointer(builder, target, index, half))
    else:
        builder.store(value, _pointer(builder, target, index, _FLOAT))


@intrinsic
def row_max(typingctx, row, count):  # type: ignore[no-untyped-def]
    """Largest of ``count`` float32 at ``row``; ``count`` is a positive multiple of LANES."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        (best,) = _variables(builder, [_constant(float("-inf"))])
        with cgutils.for_range_slice(builder, _INT64(0), args[1], _INT64(LANES)) as (at, _):
            builder.store(
                _larger(builder, _load_floats(builder, args[0], at), builder.load(best)), best
            )
        return _reduced(builder, builder.load(best), lambda a, b: _larger(builder, a, b))

    return types.float32(types.int64, types.int64), codegen


@intrinsic
def row_exp2(typingctx, row, count, offset):  # type: ignore[no-untyped-def]
    """row[i] = 2**(row[i] - offset) in place; returns the sum. ``count`` is a multiple of LANES."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        row, count, offset = args
        offsets = _broadcast(builder, offset)
        (total,) = _variables(builder, [_constant(0.0)])
        with cgutils.for_range_slice(builder, _INT64(0), count, _INT64(LANES)) as (at, _):
            power = _exp2(builder, builder.fsub(_load_floats(builder, row, at), offsets))
            _store_floats(builder, row, at, power)
            builder.store(builder.fadd(builder.load(total), power), total)
        return _reduced(builder, builder.load(total), lambda a, b: builder.fadd(a, b))

    return types.float32(types.int64, types.int64, types.float32), codegen


@intrinsic
def row_scale(typingctx, row, count, factor):  # type: ignore[no-untyped-def]
    """row[i] *= factor in place; ``count`` is a multiple of LANES."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        row, count, factor = args
        factors = _broadcast(builder, factor)
        with cgutils.for_range_slice(builder, _INT64(0), count, _INT64(LANES)) as (at, _):
            _store_floats(builder, row, at, builder.fmul(_load_floats(builder, row, at), factors))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), codegen


@intrinsic
def row_square_sum(typingctx, row, count):  # type: ignore[no-untyped-def]
    """Sum of the squares of ``count`` float32 at ``row``; ``count`` is a multiple of LANES."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        (total,) = _variables(builder, [_constant(0.0)])
        with cgutils.for_range_slice(builder, _INT64(0), args[1], _INT64(LANES)) as (at, _):
            x = _load_floats(builder, args[0], at)
            builder.store(_multiply_add(builder, x, x, builder.load(total)), total)
        return _reduced(builder, builder.load(total), lambda a, b: builder.fadd(a, b))

    return types.float32(types.int64, types.int64), codegen


@intrinsic
def row_multiply(typingctx, row, count, factors):  # type: ignore[no-untyped-def]
    """row[i] *= factors[i] in place, both float32; ``count`` is a multiple of LANES."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        row, count, factors = args
        with cgutils.for_range_slice(builder, _INT64(0), count, _INT64(LANES)) as (at, _):
            product = builder.fmul(
                _load_floats(builder, row, at), _load_floats(builder, factors, at)
            )
            _store_floats(builder, row, at, product)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def row_softcap(typingctx, row, count, cap):  # type: ignore[no-untyped-def]
    """row[i] = cap * tanh(row[i]) in place; ``count`` is a multiple of LANES."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        row, count, cap = args
        caps = _broadcast(builder, cap)
        with cgutils.for_range_slice(builder, _INT64(0), count, _INT64(LANES)) as (at, _):
            x = _load_floats(builder, row, at)
            _store_floats(builder, row, at, builder.fmul(_tanh(builder, x), caps))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), codegen


def _tanh(builder: Any, x: Any) -> Any:
    """tanh by one exponential, and by a polynomial where that loses a small argument's last digits."""
    negative = builder.fcmp_ordered("<", x, _constant(0.0))
    size = builder.select(negative, builder.fneg(x), x)
    power = _exp2(builder, builder.fmul(size, _constant(-2.8853900817779268)))
    one = _constant(1.0)
    large = builder.fdiv(builder.fsub(one, power), builder.fadd(one, power))
    square = builder.fmul(x, x)
    small = _constant(-17 / 315)
    for factor in (2 / 15, -1 / 3, 1.0):
        small = _multiply_add(builder, small, square, _constant(factor))
    is_small = builder.fcmp_ordered("<", square, _constant(0.0625))
    signed = builder.select(negative, builder.fneg(large), large)
    return builder.select(is_small, builder.fmul(small, x), signed)


def _make_load(numba_type: Any, element: Any) -> Any:
    @intrinsic
    def load(typingctx, address, index):  # type: ignore[no-untyped-def]
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.load(_pointer(builder, args[0], args[1], element))

        return numba_type(types.int64, types.int64), codegen

    return load


def _make_store(numba_type: Any, element: Any) -> Any:
    @intrinsic
    def store(typingctx, address, index, value):  # type: ignore[no-untyped-def]
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            builder.store(args[2], _pointer(builder, args[0], args[1], element))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, numba_type), codegen

    return store


load_int32 = _make_load(types.int32, _INT32)
load_int64 = _make_load(types.int64, _INT64)
load_uint8 = _make_load(types.uint8, ir.IntType(8))
load_float32 = _make_load(types.float32, _FLOAT)
store_int64 = _make_store(types.int64, _INT64)
store_float32 = _make_store(types.float32, _FLOAT)


@intrinsic
def atomic_increment(typingctx, address):  # type: ignore[no-untyped-def]
    """Add one to the int64 at ``address``, returning what it was; orders memory between threads."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], _INT64.as_pointer())
        return builder.atomic_rmw("add", pointer, _INT64(1), "acq_rel")

    return types.int64(types.int64), codegen
