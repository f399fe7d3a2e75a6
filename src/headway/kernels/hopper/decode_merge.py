"""Merging what several workers left of one unit, by the last of them to arrive.

Parts are added in the order of their keys, whoever merges: results do not depend on timing.
"""

from __future__ import annotations

from headway.kernels._triton import cta_barrier, gl, gluon
from headway.kernels.hopper.softmax import finish


@gluon.jit
def leave_part(
    parts,
    part_sums,
    slot,
    acc,
    row_max,
    row_sum,
    rows,
    o_rows,
    columns,
    num_rows,
    cfg: gl.constexpr,
):
    """Store an unnormalised part: (rows, head_dim_v) float32, and each row's maximum (base 2) and sum."""
    at = slot * cfg.rows
    pointers = (
        parts + (at + gl.expand_dims(o_rows, 1)) * cfg.head_dim_v + gl.expand_dims(columns, 0)
    )
    mask = gl.expand_dims(o_rows < num_rows, 1) & gl.expand_dims(columns < cfg.head_dim_v, 0)
    gl.store(pointers, acc, mask=mask)
    gl.store(part_sums + at * 2 + rows, row_max, mask=rows < num_rows)
    gl.store(part_sums + at * 2 + cfg.rows + rows, row_sum, mask=rows < num_rows)


@gluon.jit
def is_last(arrivals, parts_of_unit):
    """Count this worker's arrival at a unit. True for the last, which then sees all parts."""
    cta_barrier()
    arrived = gl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu")
    last = arrived == parts_of_unit - 1
    if last:
        gl.store(arrivals, 0)
    return last


@gluon.jit
def merge_parts(
    parts,
    part_sums,
    first_slot,
    second_slot,
    step,
    parts_of_unit,
    first_row,
    first_column,
    sinks,
    cfg: gl.constexpr,
):
    """(out, lse) of rows first_row.. from part ``first_slot`` and then second_slot and on, ``step`` apart.

    ``sinks`` (natural log) are those of the rows. Results are in slices of the layout ``cfg.merged``.
    """
    layout: gl.constexpr = cfg.merged
    flat: gl.constexpr = gl.SliceLayout(2, layout)
    index = gl.arange(0, cfg.merge_parts, layout=gl.SliceLayout(1, flat))
    rows = gl.arange(0, cfg.merge_rows, layout=gl.SliceLayout(0, flat))
    columns = gl.arange(0, cfg.out_width, layout=gl.SliceLayout(0, gl.SliceLayout(0, layout)))
    columns += first_column
    columns = gl.expand_dims(gl.expand_dims(columns, 0), 0)
    acc = gl.full([cfg.merge_rows, cfg.out_width], 0.0, gl.float32, gl.SliceLayout(0, layout))
    row_max = gl.full([cfg.merge_rows], float("-inf"), gl.float32, gl.SliceLayout(0, flat))
    row_sum = gl.full([cfg.merge_rows], 0.0, gl.float32, gl.SliceLayout(0, flat))
    for base in range(0, parts_of_unit, cfg.merge_parts):
        part = base + index
        slot = gl.where(part == 0, first_slot, second_slot + step * (part - 1))
        inside = gl.expand_dims(part < parts_of_unit, 1) & gl.expand_dims(
            first_row + rows < cfg.rows, 0
        )
        at = gl.expand_dims(slot * cfg.rows, 1) + gl.expand_dims(first_row + rows, 0)
        sums = gl.expand_dims(slot * (2 * cfg.rows), 1) + gl.expand_dims(first_row + rows, 0)
        part_max = gl.load(part_sums + sums, mask=inside, other=float("-inf"), cache_modifier=".cg")
        part_sum = gl.load(
            part_sums + sums + cfg.rows, mask=inside, other=0.0, cache_modifier=".cg"
        )
        mask = gl.expand_dims(inside, 2) & (columns < cfg.head_dim_v)
        part_out = gl.load(
            parts + gl.expand_dims(at * cfg.head_dim_v, 2) + columns,
            mask=mask,
            other=0.0,
            cache_modifier=".cg",
        )
        new_max = gl.maximum(row_max, gl.max(part_max, 0))
        finite_max = gl.where(new_max == float("-inf"), 0.0, new_max)
        weight = gl.exp2(part_max - gl.expand_dims(finite_max, 0))
        factor = gl.exp2(row_max - finite_max)
        row_sum = row_sum * factor + gl.sum(part_sum * weight, 0)
        factor = gl.convert_layout(factor, gl.SliceLayout(1, gl.SliceLayout(0, layout)))
        acc = acc * gl.expand_dims(factor, 1) + gl.sum(part_out * gl.expand_dims(weight, 2), 0)
        row_max = new_max
    factor, lse = finish(row_max, row_sum, sinks)
    factor = gl.convert_layout(factor, gl.SliceLayout(1, gl.SliceLayout(0, layout)))
    return acc * gl.expand_dims(factor, 1), lse
