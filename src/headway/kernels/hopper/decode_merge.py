"""How a worker ends what it has of a unit: with its output, or with a part that the last to arrive merges.

Parts are added in the order of their keys, whoever merges: results do not depend on timing.
"""

# Gluon reads the annotations of aggregates as classes: no postponed evaluation here.
from headway.kernels._triton import aggregate, cta_barrier, gl, gluon
from headway.kernels.hopper.decode_config import TILE_ROWS as _TILE_ROWS
from headway.kernels.hopper.decode_plan import cost_of
from headway.kernels.hopper.decode_rows import load_sinks, row_descales, store_lse, store_out
from headway.kernels.hopper.softmax import finish

TILE_ROWS: gl.constexpr = gl.constexpr(_TILE_ROWS)


@aggregate
class Parts:
    """Where units that were cut are put together; see DecodePlan."""

    arrivals: gl.tensor
    out: gl.tensor
    sums: gl.tensor

    @gluon.constexpr_function
    def __init__(self, arrivals, out, sums):
        self.arrivals = arrivals
        self.out = out
        self.sums = sums


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


@gluon.jit
def merge_unit(
    out_ptr,
    lse_ptr,
    sinks,
    parts,
    first_slot,
    workers,
    span,
    batch,
    head,
    tile_row,
    begin,
    end,
    first_column,
    v_scale,
    v_descale,
    call,
    cfg: gl.constexpr,
):
    """Put a unit's parts together and write rows [begin, end) of its tile, out_width columns."""
    by_row: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, cfg.merged))
    out_layout: gl.constexpr = gl.SliceLayout(0, cfg.merged)
    columns = first_column + gl.arange(0, cfg.out_width, layout=gl.SliceLayout(0, out_layout))
    for row in range(begin, gl.minimum(call.num_rows - tile_row, end), cfg.merge_rows):
        rows = tile_row + row + gl.arange(0, cfg.merge_rows, layout=by_row)
        out, lse = merge_parts(
            parts.out,
            parts.sums,
            first_slot,
            first_slot + cfg.m_tiles,
            2 * cfg.m_tiles,
            workers,
            row,
            first_column,
            load_sinks(sinks, head, rows, call, cfg),
            cfg,
        )
        out_rows = gl.arange(0, cfg.merge_rows, layout=gl.SliceLayout(1, out_layout))
        out_rows += tile_row + row
        if cfg.abreast > 1:
            out *= gl.expand_dims(row_descales(v_descale, batch, head, out_rows, cfg), 1)
        else:
            out *= v_scale
        store_out(out_ptr, out, out_rows, columns, span, batch, head, call, cfg)
        store_lse(lse_ptr, lse, rows, span, batch, head, call, cfg)


@gluon.jit
def end_unit(
    tensors,
    parts,
    acc,
    row_max,
    row_sum,
    rows,
    columns,
    v_scale,
    span,
    batch,
    unit,
    first,
    count,
    unit_line,
    share,
    call,
    half: gl.constexpr,
    cfg: gl.constexpr,
):
    """What a consumer made of a unit's blocks [first, first + count): written out if that is all of them,
    and otherwise left as a part, which the last worker to leave one merges with the others.

    ``acc`` (rows, columns) is unnormalised; ``row_max`` (base 2), ``row_sum`` and ``rows`` have one layout.
    ``unit_line`` is where the unit begins on the line of which every worker takes ``share`` places.
    Consumers have rows of their own or, where ``cfg.wide``, columns.
    """
    out_ptr, lse_ptr, sinks = tensors[2], tensors[3], tensors[4]
    worker = gl.program_id(0) // cfg.m_tiles
    tile = gl.program_id(0) % cfg.m_tiles
    tile_row = tile * TILE_ROWS
    by_row: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    out_rows = gl.convert_layout(rows, by_row, assert_trivial=True)
    if count == span.blocks:
        row_sinks = load_sinks(sinks, unit, rows, call, cfg)
        factor, lse = finish(row_max, row_sum, row_sinks)
        factor = gl.convert_layout(factor * v_scale, by_row, assert_trivial=True)
        out = acc * gl.expand_dims(factor, 1)
        store_out(out_ptr, out, out_rows, columns, span, batch, unit, call, cfg)
        store_lse(lse_ptr, lse, rows, span, batch, unit, call, cfg)
    elif count > 0:
        # A worker begins at most one unit that others go on with, and goes on with at most one.
        leave_part(
            parts.out,
            parts.sums,
            (2 * worker + gl.where(first == 0, 1, 0)) * cfg.m_tiles + tile,
            acc,
            row_max,
            row_sum,
            rows - tile_row,
            out_rows - tile_row,
            columns,
            gl.minimum(call.num_rows - tile_row, TILE_ROWS),
            cfg,
        )
        if not cfg.tile.combine:
            blocks_line = unit_line + cost_of(span.blocks, cfg)
            first_worker = blocks_line // share
            workers = (blocks_line + span.blocks - 1) // share - first_worker + 1
            arrivals = (batch * call.units + unit) * cfg.m_tiles + tile
            if is_last(parts.arrivals + arrivals * cfg.consumers + half, workers):
                merge_unit(
                    out_ptr,
                    lse_ptr,
                    sinks,
                    parts,
                    (2 * first_worker + 1) * cfg.m_tiles + tile,
                    workers,
                    span,
                    batch,
                    unit,
                    tile_row,
                    0 if cfg.wide else half * cfg.columns,
                    TILE_ROWS if cfg.wide else (half + 1) * cfg.columns,
                    half * cfg.out_width if cfg.wide else 0,
                    v_scale,
                    tensors[5][2],
                    call,
                    cfg,
                )
