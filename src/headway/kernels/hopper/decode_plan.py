"""The plan of a decode step, made on the device: every worker gets an equal share of one line of KV blocks.

The line runs through the sequences, in each through its units, one per KV head, in
each through the blocks of keys that the unit sees, short ones after a place for what a unit costs besides.
Workers take consecutive shares of it, so one sequence of 128k tokens and sixty of 100 balance alike, and a
unit is cut only where a share ends. Nothing is copied to the host, and every buffer keeps its size while
lengths change: a CUDA graph may replay a plan.
"""

# Gluon reads the annotations of aggregates as classes: no postponed evaluation here.
import functools
import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from headway.kernels._triton import aggregate, cta_barrier, gl, gluon, next_power_of_2
from headway.kernels.hopper.decode_config import DecodeTile
from headway.kernels.hopper.direct import DirectLaunch
from headway.kernels.hopper.masks import row_limits

#: Fields of a sequence's record, int32; a worker's record goes on with where its share begins.
FIELDS = 16
FIRST_BLOCK: gl.constexpr = gl.constexpr(0)
BLOCKS: gl.constexpr = gl.constexpr(1)
LO: gl.constexpr = gl.constexpr(2)
HI: gl.constexpr = gl.constexpr(3)
FULL_LO: gl.constexpr = gl.constexpr(4)
FULL_HI: gl.constexpr = gl.constexpr(5)
POSITION: gl.constexpr = gl.constexpr(6)
KEYS: gl.constexpr = gl.constexpr(7)
PAD: gl.constexpr = gl.constexpr(8)
CACHE_ROW: gl.constexpr = gl.constexpr(9)
Q_FIRST: gl.constexpr = gl.constexpr(10)
Q_ROWS: gl.constexpr = gl.constexpr(11)
BATCH: gl.constexpr = gl.constexpr(12)
UNIT: gl.constexpr = gl.constexpr(13)
WITHIN: gl.constexpr = gl.constexpr(14)
LEFT: gl.constexpr = gl.constexpr(15)
WIDTH: gl.constexpr = gl.constexpr(FIELDS)

#: Blocks from which a unit is long.
LONG: gl.constexpr = gl.constexpr(16)

#: A share grows by at most one in so many to be even with units.
ROUNDING: gl.constexpr = gl.constexpr(16)
#: Keys of a share, up to which it grows so that a unit has no more parts than are read at once.
FEW_KEYS: gl.constexpr = gl.constexpr(512)
#: More places than a unit has.
MOST_PLACES: gl.constexpr = gl.constexpr(1 << 30)

#: Sequences that the planning kernel takes at once, at most.
AT_ONCE = 1024


@aggregate
class Span:
    """One sequence of a step. Rows of the cache are counted with its padding, positions without."""

    first_block: gl.tensor  # first block with a visible key, counted from row 0 of the cache
    blocks: gl.tensor  # blocks from there to the last visible key, at least 1
    lo: gl.tensor  # rows [lo, hi) hold every key that some query sees
    hi: gl.tensor
    full_lo: gl.tensor  # all queries see all of [full_lo, full_hi)
    full_hi: gl.tensor
    position: gl.tensor  # of the first query
    keys: gl.tensor  # number of keys
    pad: gl.tensor  # first row that holds a key
    cache_row: gl.tensor
    q_first: gl.tensor  # first query row, 0 unless queries are ragged
    q_rows: gl.tensor  # queries in use

    @gluon.constexpr_function
    def __init__(
        self,
        first_block,
        blocks,
        lo,
        hi,
        full_lo,
        full_hi,
        position,
        keys,
        pad,
        cache_row,
        q_first,
        q_rows,
    ):
        self.first_block = first_block
        self.blocks = blocks
        self.lo = lo
        self.hi = hi
        self.full_lo = full_lo
        self.full_hi = full_hi
        self.position = position
        self.keys = keys
        self.pad = pad
        self.cache_row = cache_row
        self.q_first = q_first
        self.q_rows = q_rows


@aggregate
class Limits:
    """The numbers of a mask."""

    window_left: gl.tensor
    window_right: gl.tensor
    chunk: gl.tensor

    @gluon.constexpr_function
    def __init__(self, window_left, window_right, chunk):
        self.window_left = window_left
        self.window_right = window_right
        self.chunk = chunk


@dataclass(frozen=True)
class PlanConfig:
    """Everything a compiled planning kernel depends on."""

    block_n: int
    unit_cost: int
    at_once: int  # sequences taken at once
    workers: int  # rounded up to a power of two
    merge_parts: int  # parts that the merging worker reads at once; 0: another kernel merges
    has_left: bool
    has_right: bool
    has_chunk: bool
    per_multiprocessor: int = 1  # workers that share one
    whole: int = 0  # places of a unit, at most, that those do not share


@gluon.jit
def load_span(record):
    """The Span of a sequence's or a worker's record."""
    return Span(
        gl.load(record + FIRST_BLOCK),
        gl.load(record + BLOCKS),
        gl.load(record + LO),
        gl.load(record + HI),
        gl.load(record + FULL_LO),
        gl.load(record + FULL_HI),
        gl.load(record + POSITION),
        gl.load(record + KEYS),
        gl.load(record + PAD),
        gl.load(record + CACHE_ROW),
        gl.load(record + Q_FIRST),
        gl.load(record + Q_ROWS),
    )


@gluon.jit
def cost_of(blocks, cfg: gl.constexpr):
    """Places of the line for the work around a unit's blocks. Long units have none: next to their blocks
    it is little, and equal shares of equal lengths then cut them at the same places."""
    return gl.where(blocks < LONG, cfg.unit_cost, 0)


@gluon.jit
def take_of(span, within, left, cfg: gl.constexpr):
    """What a worker with ``left`` of its share takes of a unit, from place ``within``: (places, first
    block, blocks)."""
    cost = cost_of(span.blocks, cfg)
    take = gl.minimum(left, span.blocks + cost - within)
    first = gl.maximum(within - cost, 0)
    return take, first, gl.maximum(within + take - cost, 0) - first


@gluon.jit
def _load_or(ptr, offsets, mask, default):
    """Values at ``offsets``, or ``default`` where there is no tensor."""
    if ptr is None:
        return offsets * 0 + default
    else:
        return gl.load(ptr + offsets, mask=mask, other=0)


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _even_share(share, length, units, workers, cfg: gl.constexpr):
    """A share that units of one length end with, or whole shares end with units, unless it is much more
    than ``share``: no worker then begins a second unit or leaves two parts.

    Short units that workers of one multiprocessor would share are left whole: half of the workers then
    read all, one on each multiprocessor, and nothing is merged.
    """
    whole = gl.cdiv(share, length) * length
    part = gl.cdiv(length, gl.maximum(length // share, 1))
    even = gl.where(share >= length, whole, part)
    even = gl.where(even - share <= share // ROUNDING, even, share)
    if cfg.whole > 0:
        most = cfg.per_multiprocessor * share
        alone = (length <= cfg.whole) & (length - most <= most // ROUNDING)
        alone &= (even < length) & (units <= workers // cfg.per_multiprocessor)
        even = gl.where(alone, length, even)
    return even


@gluon.jit
def _plan_sequences(
    spans,
    b,
    inside,
    seqlens_k,
    leftpad_k,
    cache_batch_idx,
    cu_seqlens_q,
    seqused_q,
    cu_seqlens_new,
    rows_q,
    capacity,
    new_tokens,
    limits,
    cfg: gl.constexpr,
):
    """Write the records of sequences ``b``; returns their numbers of blocks."""
    pad = _load_or(leftpad_k, b, inside, 0)
    keys = _load_or(seqlens_k, b, inside, capacity) - pad + new_tokens
    if cu_seqlens_new is not None:
        keys += gl.load(cu_seqlens_new + b + 1, mask=inside, other=0)
        keys -= gl.load(cu_seqlens_new + b, mask=inside, other=0)
    cache_row = b
    if cache_batch_idx is not None:
        cache_row = gl.load(cache_batch_idx + b, mask=inside, other=0)
    q_first = _load_or(cu_seqlens_q, b, inside, 0)
    q_rows = b * 0 + rows_q
    if cu_seqlens_q is not None:
        q_rows = gl.load(cu_seqlens_q + b + 1, mask=inside, other=0) - q_first
    if seqused_q is not None:
        q_rows = gl.load(seqused_q + b, mask=inside, other=0)
    position = keys - q_rows
    lo, full_hi = row_limits(position, keys, limits, cfg)
    full_lo, hi = row_limits(keys - 1, keys, limits, cfg)
    lo = gl.minimum(gl.maximum(lo, 0), keys)
    hi = gl.where(q_rows > 0, gl.maximum(hi, lo), lo)
    first_block = (lo + pad) // cfg.block_n
    blocks = gl.maximum(gl.cdiv(hi + pad, cfg.block_n) - first_block, 1)
    record = spans + b * WIDTH
    gl.store(record + FIRST_BLOCK, first_block, mask=inside)
    gl.store(record + BLOCKS, blocks, mask=inside)
    gl.store(record + LO, lo + pad, mask=inside)
    gl.store(record + HI, hi + pad, mask=inside)
    gl.store(record + FULL_LO, full_lo + pad, mask=inside)
    gl.store(record + FULL_HI, full_hi + pad, mask=inside)
    gl.store(record + POSITION, position, mask=inside)
    gl.store(record + KEYS, keys, mask=inside)
    gl.store(record + PAD, pad, mask=inside)
    gl.store(record + CACHE_ROW, cache_row, mask=inside)
    gl.store(record + Q_FIRST, q_first, mask=inside)
    gl.store(record + Q_ROWS, q_rows, mask=inside)
    return blocks


@gluon.jit(
    do_not_specialize=[
        "batch_size",
        "rows_q",
        "capacity",
        "units",
        "workers",
        "min_share",
        "new_tokens",
        "window_left",
        "window_right",
        "chunk",
    ]
)
def plan_kernel(
    seqlens_k,
    leftpad_k,
    cache_batch_idx,
    cu_seqlens_q,
    seqused_q,
    cu_seqlens_new,
    spans,
    works,
    share_ptr,
    starts,
    batch_size,
    rows_q,
    capacity,
    units,
    workers,
    min_share,
    new_tokens,
    window_left,
    window_right,
    chunk,
    cfg: gl.constexpr,
    num_warps: gl.constexpr,
):
    """One program plans the step; see :class:`DecodePlan` for what it fills."""
    layout: gl.constexpr = gl.BlockedLayout(
        [cfg.at_once // (32 * num_warps)], [32], [num_warps], [0]
    )
    limits = Limits(window_left, window_right, chunk)
    total = 0
    shortest = MOST_PLACES
    longest = 0
    for base in range(0, batch_size, cfg.at_once):
        b = base + gl.arange(0, cfg.at_once, layout=layout)
        inside = b < batch_size
        blocks = _plan_sequences(
            spans,
            b,
            inside,
            seqlens_k,
            leftpad_k,
            cache_batch_idx,
            cu_seqlens_q,
            seqused_q,
            cu_seqlens_new,
            rows_q,
            capacity,
            new_tokens,
            limits,
            cfg,
        )
        length = blocks + cost_of(blocks, cfg)
        shortest = gl.minimum(shortest, gl.min(gl.where(inside, length, MOST_PLACES), 0))
        longest = gl.maximum(longest, gl.max(gl.where(inside, length, 0), 0))
        places = gl.where(inside, length * units, 0)
        ends = gl.associative_scan(places, 0, _add)
        gl.store(starts + b, total + ends - places, mask=inside)
        total += gl.sum(places, 0)
    cta_barrier()

    share = gl.maximum(gl.cdiv(total, workers), min_share)
    if cfg.merge_parts > 0:
        # A few keys more are read sooner than parts are in another turn.
        few = FEW_KEYS // cfg.block_n
        share = gl.maximum(share, gl.minimum(gl.cdiv(longest, cfg.merge_parts), few))
    if shortest == longest:
        share = _even_share(share, longest, batch_size * units, workers, cfg)
    gl.store(share_ptr, share)
    by_worker: gl.constexpr = gl.BlockedLayout(
        [cfg.workers // (32 * num_warps)], [32], [num_warps], [0]
    )
    worker = gl.arange(0, cfg.workers, layout=by_worker)
    start = gl.minimum(worker * share, total - 1)
    low = worker * 0
    high = low + batch_size
    width = batch_size
    while width > 1:  # the last sequence that begins at or before the start is in [low, high)
        middle = (low + high) // 2
        right = gl.load(starts + middle) <= start
        low = gl.where(right, middle, low)
        high = gl.where(right, high, middle)
        width = (width + 1) // 2
    inside = worker < workers
    source = spans + low * WIDTH
    record = works + worker * WIDTH
    for field in gl.static_range(BATCH):
        gl.store(record + field, gl.load(source + field), mask=inside)
    within = start - gl.load(starts + low)
    blocks = gl.load(source + BLOCKS)
    length = blocks + cost_of(blocks, cfg)
    gl.store(record + BATCH, low, mask=inside)
    gl.store(record + UNIT, within // length, mask=inside)
    gl.store(record + WITHIN, within % length, mask=inside)
    left = gl.maximum(gl.minimum(total - worker * share, share), 0)
    gl.store(record + LEFT, left, mask=inside)


#: Buffers begin at multiples of this many elements, 128 bytes.
_LINE = 32


@dataclass(frozen=True)
class _Sizes:
    """How large the buffers of a step are, and where they lie in the two allocations that hold them."""

    ints: dict[str, tuple[int, ...]]  # shapes
    floats: dict[str, tuple[int, ...]]

    @functools.cached_property
    def int_places(self) -> dict[str, int]:
        return _places(self.ints)

    @functools.cached_property
    def float_places(self) -> dict[str, int]:
        return _places(self.floats)


def _places(shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """Where each buffer begins, in elements, and under "" where the last one ends."""
    ends = itertools.accumulate(-(-math.prod(shape) // _LINE) * _LINE for shape in shapes.values())
    return dict(zip((*shapes, ""), (0, *ends), strict=True))


@functools.lru_cache(maxsize=1024)
def _sizes(
    batch_size: int, units: int, m_tiles: int, rows: int, head_dim_v: int, workers: int
) -> _Sizes:
    slots = 2 * workers * m_tiles
    return _Sizes(
        {
            "spans": (batch_size, FIELDS),
            "works": (workers, FIELDS),
            "share": (1,),
            "starts": (batch_size,),
            "arrivals": (batch_size * units * m_tiles * 2,),
        },
        {"parts": (slots, rows, head_dim_v), "part_sums": (slots, 2, rows)},
    )


@dataclass(frozen=True)
class DecodePlan:
    """Device buffers of a step, reused by every layer and every step of the same geometry.

    ``spans`` (B, 16) and ``works`` (workers, 16) are the records above; ``share`` (1,) is how many places
    of the line a worker takes. A worker is ``m_tiles`` programs, one per tile of packed rows, which read
    the same keys at about the same time. ``parts`` holds unfinished output of units that were cut, two per
    worker and tile: (2 · workers · m_tiles, rows, head_dim_v) float32, and ``part_sums`` (.., 2, rows)
    their row maxima (base 2) and sums. ``arrivals`` (B · units · m_tiles · 2,) counts workers that have
    left theirs, by consumer; the last one merges and resets it.

    The integers are one allocation and the floats another: a call without a plan of its own waits for them.
    """

    tile: DecodeTile
    batch_size: int
    units: int
    m_tiles: int
    workers: int
    sizes: _Sizes
    ints: Tensor
    floats: Tensor

    @property
    def spans(self) -> Tensor:
        return self._int("spans")

    @property
    def works(self) -> Tensor:
        return self._int("works")

    @property
    def share(self) -> Tensor:
        return self._int("share")

    @property
    def starts(self) -> Tensor:
        return self._int("starts")

    @property
    def arrivals(self) -> Tensor:
        return self._int("arrivals")

    @property
    def parts(self) -> Tensor:
        return self._float("parts")

    @property
    def part_sums(self) -> Tensor:
        return self._float("part_sums")

    def _int(self, name: str) -> Tensor:
        shape = self.sizes.ints[name]
        return self.ints.narrow(0, self.sizes.int_places[name], math.prod(shape)).view(shape)

    def _float(self, name: str) -> Tensor:
        shape = self.sizes.floats[name]
        return self.floats.narrow(0, self.sizes.float_places[name], math.prod(shape)).view(shape)

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """As the decode kernel takes them."""
        return self.spans, self.works, self.share, self.arrivals, self.parts, self.part_sums

    @property
    def combined(self) -> tuple[Tensor, ...]:
        """As the kernel that combines parts takes them."""
        return self.spans, self.share, self.starts, self.parts, self.part_sums

    @functools.cached_property
    def grid(self) -> tuple[int, int, int]:
        """Of the decode kernel."""
        return self.workers * self.m_tiles, 1, 1

    @functools.cached_property
    def addresses(self) -> tuple[int, ...]:
        """Where ``buffers`` lie."""
        ints, at = self.ints.data_ptr(), self.sizes.int_places
        floats, float_at = self.floats.data_ptr(), self.sizes.float_places
        return (
            ints + 4 * at["spans"],
            ints + 4 * at["works"],
            ints + 4 * at["share"],
            ints + 4 * at["arrivals"],
            floats + 4 * float_at["parts"],
            floats + 4 * float_at["part_sums"],
        )

    @functools.cached_property
    def combined_addresses(self) -> tuple[int, ...]:
        """Where ``combined`` lie."""
        return tuple(t.data_ptr() for t in self.combined)


def empty_plan(
    *,
    batch_size: int,
    units: int,
    m_tiles: int = 1,
    rows: int,
    head_dim_v: int,
    tile: DecodeTile,
    workers: int,
    device: torch.device,
) -> DecodePlan:
    """Buffers for steps of ``batch_size`` sequences of ``units`` units, each of ``m_tiles`` tiles of up to
    ``rows`` query rows."""
    sizes = _sizes(batch_size, units, m_tiles, rows, head_dim_v, workers)
    # Zeros: a worker of a plan that was never filled has nothing to do.
    ints = torch.zeros(sizes.int_places[""], dtype=torch.int32, device=device)
    floats = torch.empty(sizes.float_places[""], dtype=torch.float32, device=device)
    return DecodePlan(tile, batch_size, units, m_tiles, workers, sizes, ints, floats)


def plan_decode(
    plan: DecodePlan,
    *,
    seqlens_k: Tensor | None,
    capacity: int,
    rows_q: int,
    leftpad_k: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    seqused_q: Tensor | None = None,
    new_tokens: int = 0,
    cu_seqlens_new: Tensor | None = None,
    window_left: int | None = None,
    window_right: int | None = None,
    chunk: int = 0,
    min_share: int = 1,
) -> None:
    """Fill ``plan`` for the lengths on the device now; one kernel, no synchronisation.

    Args:
        seqlens_k: (B,) int32, end of each sequence's keys in its cache rows; None: ``capacity`` each.
        rows_q: queries per sequence, unless ``cu_seqlens_q`` (B+1,) or ``seqused_q`` (B,) say.
        new_tokens, cu_seqlens_new: keys that the step appends behind ``seqlens_k``: so many of each
            sequence, or of every one its own number by (B+1,) int32 ends.
        window_left, window_right, chunk: the mask, as :class:`headway.problem.Mask` has it.
        min_share: places of the line below which work is not cut further.
    """
    if plan.batch_size == 0:
        return
    lengths = seqlens_k, leftpad_k, cache_batch_idx, cu_seqlens_q, seqused_q, cu_seqlens_new
    addresses = [None if t is None else t.data_ptr() for t in lengths]
    numbers = (
        plan.batch_size,
        rows_q,
        capacity,
        plan.units,
        plan.workers,
        min_share,
        new_tokens,
        window_left or 0,
        window_right or 0,
        max(chunk, 1),
    )
    launches = _launches_for(
        plan.ints.device.index,
        plan.tile.block_n,
        plan.tile.unit_cost,
        plan.tile.per_multiprocessor,
        plan.tile.whole_keys // plan.tile.block_n,
        0 if plan.tile.combine else plan.tile.merge_parts,
        plan.batch_size,
        plan.workers,
        window_left is not None,
        window_right is not None,
        chunk > 0,
    )
    launches(plan, lengths, addresses, numbers)


class _Launches:
    """Planning kernels of one configuration, by which lengths there are and how they are aligned."""

    def __init__(self, cfg: PlanConfig) -> None:
        self._cfg = cfg
        self._compiled: dict[tuple[int | None, ...], DirectLaunch] = {}

    def __call__(
        self,
        plan: DecodePlan,
        lengths: tuple[Tensor | None, ...],
        addresses: list[int | None],
        numbers: tuple[int, ...],
    ) -> None:
        kind = tuple([None if at is None else at & 15 for at in addresses])
        launch = self._compiled.get(kind)
        if launch is None:
            launch = self._compiled[kind] = self._compile(plan, lengths, numbers)
        spans, works, share, *_ = plan.addresses
        starts = plan.ints.data_ptr() + 4 * plan.sizes.int_places["starts"]
        args = (*addresses, spans, works, share, starts, *numbers, None, None)
        launch((1, 1, 1), plan.ints.device.index, args)

    def _compile(
        self, plan: DecodePlan, lengths: tuple[Tensor | None, ...], numbers: tuple[int, ...]
    ) -> DirectLaunch:
        buffers = plan.spans, plan.works, plan.share, plan.starts
        compiled = plan_kernel.warmup(
            *lengths, *buffers, *numbers, self._cfg, num_warps=8, grid=(1,)
        )
        return DirectLaunch(compiled)


@functools.lru_cache(maxsize=1024)
def _launches_for(
    device_index: int,
    block_n: int,
    unit_cost: int,
    per_multiprocessor: int,
    whole: int,
    merge_parts: int,
    batch_size: int,
    workers: int,
    has_left: bool,
    has_right: bool,
    has_chunk: bool,
) -> _Launches:
    return _planner(
        device_index,
        PlanConfig(
            block_n=block_n,
            unit_cost=unit_cost,
            per_multiprocessor=per_multiprocessor,
            whole=whole,
            at_once=min(max(next_power_of_2(batch_size), 256), AT_ONCE),
            workers=max(next_power_of_2(workers), 256),
            merge_parts=merge_parts,
            has_left=has_left,
            has_right=has_right,
            has_chunk=has_chunk,
        ),
    )


@functools.cache
def _planner(device_index: int, cfg: PlanConfig) -> _Launches:
    """One for all batch sizes that the configuration serves."""
    return _Launches(cfg)
