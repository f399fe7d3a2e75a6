"""Softmax over blocks of keys, in base 2, with the running maximum raised only when it must be."""

from __future__ import annotations

from headway.kernels._triton import gl, gluon

#: Row maxima may lag the true ones by this many powers of two. Probabilities stay below 2^8, which
#: bfloat16 and float16 hold as exactly as values below 1, and rescaling becomes rare.
LAG: gl.constexpr = gl.constexpr(8.0)
LN2: gl.constexpr = gl.constexpr(0.6931471805599453)
LOG2E: gl.constexpr = gl.constexpr(1.4426950408889634)


@gluon.jit
def partial_sums(probabilities):
    """Row sums of (64, BLOCK_N) as far as one thread holds them: (64, 4), one column per thread of a row.

    The four are added once per tile, which spares every block two rounds of shuffles.
    """
    BLOCK_N: gl.constexpr = probabilities.shape[1]
    parts = gl.reshape(probabilities, [64, BLOCK_N // 8, 4, 2])
    return gl.sum(gl.sum(parts, 3), 1)


@gluon.jit
def softmax_block(scores, row_max, row_sum, scale_log2, MASKED: gl.constexpr):
    """One block of scores: (probabilities, row_max, row_sum, factor for what was accumulated before).

    ``row_max`` is in units of log2, -inf for a row that has seen nothing; ``row_sum`` is as partial_sums
    makes it. MASKED: rows may hold only -inf.
    """
    block_max = gl.maximum(row_max, gl.max(scores, 1) * scale_log2)
    new_max = gl.where(block_max - row_max > LAG, block_max, row_max)
    if MASKED:
        finite_max = gl.where(new_max == float("-inf"), 0.0, new_max)
    else:
        finite_max = new_max
    factor = gl.exp2(row_max - finite_max)
    probabilities = gl.exp2(scores * scale_log2 - gl.expand_dims(finite_max, 1))
    spread: gl.constexpr = gl.SliceLayout(1, row_sum.type.layout)
    row_factor = gl.expand_dims(gl.convert_layout(factor, spread, assert_trivial=True), 1)
    row_sum = row_sum * row_factor + partial_sums(probabilities)
    return probabilities, new_max, row_sum, factor


@gluon.constexpr_function
def _rescale_asm(count: int) -> str:
    """PTX that multiplies one thread's ``count`` accumulators, which lie in two rows, unless every
    factor in the warp is 1: then the branch saves a third of the instructions of a d256 iteration."""
    first, second = 2 * count, 2 * count + 2
    products = " ".join(f"mul.f32 ${e}, ${e}, ${2 * count + e};" for e in range(count))
    return (
        f"{{ .reg .pred p; setp.neu.f32 p, ${first}, 0f3F800000; "
        f"setp.neu.or.f32 p, ${second}, 0f3F800000, p; "
        f"vote.sync.any.pred p, p, 0xffffffff; @!p bra DONE; {products} DONE: }}"
    )


@gluon.constexpr_function
def _rescale_constraints(count: int) -> str:
    return ",".join(["=f"] * count + [str(e) for e in range(count)] + ["f"] * count)


@gluon.jit
def rescale(accumulator, factor):
    """``accumulator`` (64, n) times ``factor`` (64,), in the accumulator's row layout."""
    COUNT: gl.constexpr = accumulator.shape[0] * accumulator.shape[1] // 128
    return gl.inline_asm_elementwise(
        _rescale_asm(COUNT),
        _rescale_constraints(COUNT),
        [accumulator, gl.expand_dims(factor, 1)],
        dtype=gl.float32,
        is_pure=True,
        pack=COUNT,
    )


@gluon.jit
def soft_cap(scores, scale, cap):
    """cap * tanh(scale * scores / cap). The hardware's own tanh is off by up to cap * 2^-11."""
    power = gl.exp2(scores * (scale / cap * (2 * LOG2E)))
    return cap - (2 * cap) / (1.0 + power)


@gluon.jit
def finish(row_max, row_sum, sink):
    """(factor for the output, natural-log LSE); ``sink`` in natural log, -inf where there is none."""
    sink = sink * LOG2E
    top = gl.maximum(row_max, sink)
    top = gl.where(top == float("-inf"), 0.0, top)
    seen = gl.exp2(row_max - top)
    total = row_sum * seen + gl.exp2(sink - top)
    lse = gl.where(total == 0.0, float("-inf"), (top + gl.log2(total)) * LN2)
    return gl.where(row_sum == 0.0, 0.0, seen / gl.where(total == 0.0, 1.0, total)), lse
