"""Decode on Hopper: few queries per sequence against a long cache, at the speed of its memory.

Queries of one KV head, tokens times heads that share it, are packed into the 64 rows of one wgmma tile, so
keys and values are read once. Workers, one or two to a multiprocessor, take equal shares of the step's
blocks off a :class:`~headway.kernels.hopper.decode_plan.DecodePlan`; in each, one producer keeps the copy
engine's stages full and one warpgroup consumes them. A unit that was cut is merged by the worker that
finishes it last or, from many large parts, by a second kernel. Nothing waits for another worker.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from headway.errors import InvalidInputError
from headway.kernels._triton import cdiv, gl, next_power_of_2
from headway.kernels.hopper.decode_combine import CombineConfig, combine_kernel
from headway.kernels.hopper.decode_config import (
    APPENDED_AT_LEAST,
    FEW_ROWS,
    MOST_APPENDED,
    AppendForm,
    DecodeConfig,
    DecodeTile,
    parts_to_combine,
    tile_for,
)
from headway.kernels.hopper.decode_kernel import decode_kernel
from headway.kernels.hopper.decode_plan import DecodePlan, empty_plan
from headway.kernels.hopper.direct import Boxes, DirectLaunch, misaligned
from headway.kernels.mods import kind_of
from headway.problem import Append

_NO_STRIDES = (0,) * 6
#: What stands for a descriptor where there is none, and for the kernel's constants.
_NO_MAP = (None,)
_NO_CONSTANTS = (None,) * 4
#: Programs that combine parts, at most, unless there are more tiles.
COMBINING_PROGRAMS = 2048
#: Parts that such a program reads at once, at most, and where they are few, rows of parts.
MANY_PARTS = 64
FEW_PARTS = 16
ROWS_OF_PARTS = 32
#: KV heads of all sequences from which on rows of 128 bytes are read by twos as well: fewer twos are cut
#: into more parts, which costs what longer rows gain.
MANY_HEADS = 512
_GLUON_DTYPES = {
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
    torch.float8_e4m3fn: gl.float8e4nv,
}


def make_plan(
    *,
    batch_size: int,
    num_kv_heads: int,
    group: int,
    max_seqlen_q: int,
    head_dim: int,
    head_dim_v: int,
    device: torch.device,
    itemsize: int = 2,
    page_size: int = 0,
    sm_margin: int = 0,
    abreast: bool = False,
    tile: DecodeTile | None = None,
) -> DecodePlan:
    """Buffers for decode steps of this geometry; :func:`plan_decode` fills them, once per step.

    Args:
        group: query heads per KV head.
        itemsize: bytes per element of keys and values.
        page_size: rows of a page, 0 where keys are not paged.
        sm_margin: multiprocessors to leave to others.
        abreast: steps' keys and values :func:`lie_abreast`: short rows of two heads may be read as one.
        tile: how workers are built; default: the measured one for these head dims.
    """
    heads = batch_size * num_kv_heads
    if abreast and tile is None and are_narrow(head_dim, head_dim_v, itemsize, page_size, heads):
        rows = 2 * group * max_seqlen_q
        if rows <= FEW_ROWS and num_kv_heads % 2 == 0:
            num_kv_heads, group, head_dim_v = num_kv_heads // 2, 2 * group, 2 * head_dim_v
            tile = tile_for(2 * head_dim, head_dim_v, itemsize, rows, page_size)
            tile = dataclasses.replace(tile, abreast=2)
    rows = max_seqlen_q * group
    m_tiles = cdiv(rows, 64)
    tile = tile or tile_for(head_dim, head_dim_v, itemsize, rows, page_size)
    count = _multiprocessors(device) - sm_margin
    workers = max(count * tile.per_multiprocessor // m_tiles, 1)
    if workers >= batch_size * num_kv_heads * parts_to_combine(head_dim_v):
        tile = dataclasses.replace(tile, combine=True)
    return empty_plan(
        tile=tile,
        batch_size=batch_size,
        units=num_kv_heads,
        m_tiles=m_tiles,
        rows=room_for(rows),
        head_dim_v=head_dim_v,
        workers=workers,
        device=device,
    )


def are_narrow(head_dim: int, head_dim_v: int, itemsize: int, page_size: int, heads: int) -> bool:
    """Whether rows of one head, 64 or 128 bytes in boxes of few rows, come slower than rows of two.

    Args:
        heads: KV heads of all sequences.
    """
    if itemsize > 1 or head_dim != head_dim_v or page_size % 128 == 0:
        return False
    return head_dim == 64 or (head_dim == 128 and page_size % 8 == 0 and heads >= MANY_HEADS)


def lie_abreast(t: Tensor) -> bool:
    """Whether the heads of a row of keys or values lie behind one another."""
    return t.stride(2) == t.shape[3]


def _two_as_one(t: Tensor) -> Tensor:
    """(.., H, D), of which heads lie behind one another, as (.., H / 2, 2 · D)."""
    (pages, rows, heads, width), (page, row, head, _) = t.shape, t.stride()
    return t.as_strided((pages, rows, heads // 2, 2 * width), (page, row, 2 * head, 1))


def room_for(rows: int) -> int:
    """Rows of a tile that parts have room for: a power of two, so that few kernels serve all lengths."""
    return next_power_of_2(min(rows, 64))


@functools.lru_cache(maxsize=64)
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    plan: DecodePlan,
    *,
    lse: Tensor | None = None,
    page_table: Tensor | None = None,
    sinks: Tensor | None = None,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    **options: Any,
) -> None:
    """Attention of a planned step: what :func:`prepare` makes of these arguments, called with them."""
    if plan.batch_size == 0:
        return
    others = lse, page_table, sinks, qv, q_descale, k_descale, v_descale
    prepare(q, k, v, out, plan, *others, **options)(plan, q, k, v, out, *others)


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    plan: DecodePlan,
    lse: Tensor | None = None,
    page_table: Tensor | None = None,
    sinks: Tensor | None = None,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    *,
    softmax_scale: float,
    max_seqlen_q: int = 1,
    leftpad: bool = False,
    window_left: int | None = None,
    window_right: int | None = None,
    chunk: int = 0,
    softcap: float = 0.0,
    score_mod: Any = None,
    mask_mod: Any = None,
    aux: Any = None,
    append: Append | None = None,
    longest_new: int = 0,
    whole_rows: bool = False,
) -> Prepared:
    """Attention of planned steps, to be called: all but where tensors lie is decided.

    Lengths, positions and masks are those that the plan was filled with; the mask's numbers are given again
    because rows need them. The result is called with a plan of the same geometry, and with tensors of the
    same shapes, strides, dtypes and device.

    Args:
        q: (B, Sq, Hq, D), or (total_q, Hq, D) where the plan was filled with ``cu_seqlens_q``.
        k, v: (B, S, Hkv, D or Dv), or (num_pages, page_size, Hkv, D or Dv) with ``page_table``
            (B, max_pages) int32. bfloat16 or float16, as q, or float8_e4m3fn beside a q of any of the
            three; last stride 1, other strides multiples of 16 bytes. Beside float8 keys, q keeps
            eight significant bits: all that bfloat16 has.
        out: as q, with Dv, any float dtype. Rows of no query stay as they are.
        lse: (B, Hq, Sq) or (Hq, total_q) float32, last stride 1, natural log; None: not wanted.
        max_seqlen_q: queries of the longest sequence, where q is ragged.
        leftpad: whether the plan was filled with ``leftpad_k``.
        sinks: (Hq,), any float dtype.
        qv: as q, with Dv; given, scores are scale · (q · k + qv · v).
        q_descale, k_descale, v_descale: (B, Hkv) float32 factors of float8 tensors, any strides; that of q
            is not one of qv, but for ``whole_rows``.
        whole_rows: qv and q are columns of the same queries, v and k of the same rows: in scores, the
            descales of q and k are those of both.
        score_mod, mask_mod, aux: Gluon functions and what they look into, from headway.kernels.mods.
        append: new keys and values, of q's dtype, which the kernel writes behind those of each sequence and
            rotates, and q with them, where there is a rotary; what :func:`appends` is true for.
        longest_new: new tokens of a sequence, at most.

    Raises:
        InvalidInputError: rows of q, k, v or out do not start at multiples of 16 bytes.
    """
    named = {"q": q, "k": k, "v": v, "out": out} | ({} if qv is None else {"qv": qv})
    for name, t in named.items():
        if not _is_aligned(t):
            raise misaligned(name, t.data_ptr(), t.stride(), t.element_size())
    head_dim = q.shape[-1]
    if plan.tile.abreast > 1:
        k, v, head_dim = _two_as_one(k), _two_as_one(v), 2 * head_dim
    group = q.shape[-2] // k.shape[2]
    q_turns = window_left is not None or window_right is not None or chunk > 0
    page_size = 0 if page_table is None else k.shape[1]
    if plan.tile.paired and page_size % 8:
        raise InvalidInputError(
            "plan",
            f"made for pages of a multiple of 8 rows, beside pages of {page_size}",
            f"one that was made with page_size={page_size}",
        )
    rows = (max_seqlen_q if q.dim() == 3 else q.shape[1]) * group
    kernel = _kernel_for(
        q.device.index,
        q.dtype,
        k.dtype,
        out.dtype,
        plan.tile,
        head_dim,
        v.shape[-1],
        group,
        rows,
        page_size,
        window_left is not None,
        window_right is not None,
        chunk > 0,
        leftpad,
        softcap > 0,
        lse is not None,
        None if sinks is None else sinks.dtype,
        qv is not None,
        whole_rows,
        q_descale is not None,
        k_descale is not None,
        v_descale is not None,
        score_mod,
        mask_mod,
        kind_of(aux),
        None if append is None else _append_form(append, longest_new, q_turns),
    )
    numbers = (
        plan.units,
        rows,
        k.shape[0],
        *_row_strides(q),
        *((0, 0, 0) if qv is None else _row_strides(qv)),
        *((*k.stride()[:3], *v.stride()[:3]) if kernel.cfg.by_pointer else _NO_STRIDES),
        *_row_strides(out),
        *_lse_strides(lse),
        0 if page_table is None else page_table.stride(0),
        *_descale_strides((q_descale, k_descale, v_descale)),
        softmax_scale,
        softcap,
        window_left or 0,
        window_right or 0,
        chunk or 1,
        aux,
    )
    combine = None
    if plan.tile.combine:
        combine = _Combine(kernel.cfg, plan, rows, out, lse, v_descale)
    return Prepared(kernel, q.device.index, k, v, numbers, combine, append)


class Prepared:
    """Decode calls that differ in where their tensors lie, and in nothing else."""

    def __init__(
        self,
        kernel: _Kernel,
        device_index: int,
        k: Tensor,
        v: Tensor,
        numbers: tuple[Any, ...],
        combine: _Combine | None,
        append: Append | None,
    ) -> None:
        self._kernel = kernel
        self._device_index = device_index
        self._boxes = None if kernel.cfg.gathered else _boxes(k, v, kernel.cfg)
        self._numbers = numbers
        self._combine = combine
        self._addresses = None if append is None else _Addresses(append)
        self._aligned: DirectLaunch | None = None  # for small tensors at multiples of 16 bytes

    def __call__(
        self,
        plan: DecodePlan,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor | None = None,
        page_table: Tensor | None = None,
        sinks: Tensor | None = None,
        qv: Tensor | None = None,
        q_descale: Tensor | None = None,
        k_descale: Tensor | None = None,
        v_descale: Tensor | None = None,
        append: Append | None = None,
    ) -> None:
        q_at, k_at, v_at, out_at = q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr()
        qv_at = 0 if qv is None else qv.data_ptr()
        if (q_at | k_at | v_at | out_at | qv_at) & 15:
            raise _misaligned_address(q=q_at, k=k_at, v=v_at, out=out_at, qv=qv_at)
        lse_at = 0 if lse is None else lse.data_ptr()
        sinks_at = 0 if sinks is None else sinks.data_ptr()
        q_descale_at = 0 if q_descale is None else q_descale.data_ptr()
        k_descale_at = 0 if k_descale is None else k_descale.data_ptr()
        v_descale_at = 0 if v_descale is None else v_descale.data_ptr()
        table_at = 0 if page_table is None else page_table.data_ptr()
        small = lse_at | sinks_at | q_descale_at | k_descale_at | v_descale_at | table_at
        new = None
        if append is not None:
            assert self._addresses is not None
            new, together = self._addresses(append)
            small |= together
        launch, boxes = self._aligned, self._boxes
        if launch is None or small & 15:
            if self._kernel.cfg.abreast > 1:
                k, v = _two_as_one(k), _two_as_one(v)
            pointers = (q, qv, k, v, out, lse, sinks, q_descale, k_descale, v_descale, page_table)
            tensors = None if append is None else _appended(append)
            launch = self._kernel.compiled(pointers, plan.buffers, self._numbers, tensors)
            if not small & 15:
                self._aligned = launch
        k_map = v_map = _NO_MAP
        if boxes is not None:
            k_boxes, v_boxes = boxes
            k_map = k_boxes.maps.get(k_at) or k_boxes(launch, k_at)
            v_map = v_boxes.maps.get(v_at) or v_boxes(launch, v_at)
        args = (
            *k_map,
            *v_map,
            q_at,
            qv_at or None,
            k_at,
            v_at,
            out_at,
            lse_at or None,
            sinks_at or None,
            q_descale_at or None,
            k_descale_at or None,
            v_descale_at or None,
            table_at or None,
            *plan.addresses,
            *self._numbers,
            new,
            *_NO_CONSTANTS,
        )
        launch(plan.grid, self._device_index, args)
        if self._combine is not None:
            self._combine(plan, self._device_index, out, lse, sinks, v_descale)


class _Combine:
    """What is started behind the decode kernel where units are cut into many parts."""

    def __init__(
        self,
        cfg: DecodeConfig,
        plan: DecodePlan,
        rows: int,
        out: Tensor,
        lse: Tensor | None,
        v_descale: Tensor | None,
    ) -> None:
        parts = plan.workers // (plan.batch_size * plan.units)
        at_once = MANY_PARTS if parts > FEW_PARTS else max(next_power_of_2(parts), 4)
        self._cfg = CombineConfig(
            cfg.head_dim_v,
            cfg.group,
            cfg.m_tiles,
            cfg.rows,
            cfg.unit_cost,
            merge_parts=at_once,
            merge_rows=max(ROWS_OF_PARTS // at_once, 1),
            abreast=cfg.abreast,
        )
        tiles = plan.batch_size * plan.units * plan.m_tiles
        # Programs for rows, as many as keep a large device busy: few tiles have one for every row.
        most = cdiv(cfg.rows, self._cfg.merge_rows)
        shares = min(max(COMBINING_PROGRAMS // (tiles * self._cfg.pieces), 1), most)
        self._grid = self._cfg.pieces * shares, tiles, 1
        strides = (0, 0) if v_descale is None else v_descale.stride()
        self._numbers = (plan.units, rows, *_row_strides(out), *_lse_strides(lse), *strides)
        self._compiled: dict[tuple[bool, ...], DirectLaunch] = {}

    def __call__(
        self,
        plan: DecodePlan,
        device_index: int,
        out: Tensor,
        lse: Tensor | None,
        sinks: Tensor | None,
        v_descale: Tensor | None,
    ) -> None:
        tensors = out, lse, sinks, v_descale
        addresses = [None if t is None else t.data_ptr() for t in tensors]
        kind = tuple(at is None or at % 16 == 0 for at in addresses)
        launch = self._compiled.get(kind)
        if launch is None:
            options: dict[str, Any] = {"num_warps": 4, "launch_pdl": True, "grid": (1,)}
            given = (*tensors, *plan.combined, *self._numbers)
            compiled = combine_kernel.warmup(*given, self._cfg, **options)
            launch = self._compiled[kind] = DirectLaunch(compiled)
        numbers = (*plan.combined_addresses, *self._numbers)
        launch(self._grid, device_index, (*addresses, *numbers, None, None))


class _Kernel:
    """A decode kernel of one configuration, compiled as it is needed for the alignment of its tensors."""

    def __init__(self, cfg: DecodeConfig, score_mod: Any, mask_mod: Any) -> None:
        self.cfg = cfg
        self._mods = score_mod, mask_mod
        self._compiled: dict[Hashable, DirectLaunch] = {}

    def compiled(
        self,
        tensors: tuple[Tensor | None, ...],
        plan_tensors: tuple[Tensor, ...],
        numbers: tuple[Any, ...],
        new: tuple[Any, ...] | None,
    ) -> DirectLaunch:
        kind = _specialised(tensors), _specialised(new)
        found = self._compiled.get(kind)
        if found is None:
            found = self._compiled[kind] = self._compile(tensors, plan_tensors, (*numbers, new))
        return found

    def _compile(
        self,
        tensors: tuple[Tensor | None, ...],
        plan_tensors: tuple[Tensor, ...],
        numbers: tuple[Any, ...],
    ) -> DirectLaunch:
        cfg = self.cfg
        q, qv, k, v, out, *others = tensors
        assert k is not None
        assert v is not None
        descriptors: tuple[Any, Any] = (None, None)
        if not cfg.gathered:
            k_boxes, v_boxes = _boxes(k, v, cfg)
            descriptors = k_boxes.described(k), v_boxes.described(v)
        if not cfg.by_pointer:
            k = v = None
        compiled = decode_kernel.warmup(
            *descriptors,
            q,
            qv,
            k,
            v,
            out,
            *others,
            *plan_tensors,
            *numbers,
            *self._mods,
            cfg,
            num_warps=4,
            maxnreg=cfg.maxnreg,
            launch_pdl=True,
            grid=(1,),
        )
        return DirectLaunch(compiled)


@functools.lru_cache(maxsize=1024)
def _kernel_for(
    device_index: int,
    q_dtype: torch.dtype,
    kv_dtype: torch.dtype,
    out_dtype: torch.dtype,
    tile: DecodeTile,
    head_dim: int,
    head_dim_v: int,
    group: int,
    rows: int,
    page_size: int,
    has_left: bool,
    has_right: bool,
    has_chunk: bool,
    has_pad: bool,
    has_soft_cap: bool,
    has_lse: bool,
    sinks_dtype: torch.dtype | None,
    has_qv: bool,
    whole_rows: bool,
    has_q_descale: bool,
    has_k_descale: bool,
    has_v_descale: bool,
    score_mod: Any,
    mask_mod: Any,
    aux_kind: Hashable,
    append: AppendForm | None,
) -> _Kernel:
    """Compiled kernels by everything they depend on, dtypes and presence of every tensor included."""
    return _Kernel(
        DecodeConfig(
            q_dtype=_GLUON_DTYPES[q_dtype],
            kv_dtype=_GLUON_DTYPES[kv_dtype],
            tile=tile,
            head_dim=head_dim,
            head_dim_v=head_dim_v,
            group=group,
            m_tiles=cdiv(rows, 64),
            rows=room_for(rows),
            page_size=page_size,
            latent=has_qv,
            parted=has_qv and not whole_rows and (has_q_descale or has_k_descale or has_v_descale),
            has_left=has_left,
            has_right=has_right,
            has_chunk=has_chunk,
            has_pad=has_pad,
            has_soft_cap=has_soft_cap,
            append=append,
        ),
        score_mod,
        mask_mod,
    )


def appends(append: Append, q: Tensor, k: Tensor, longest_new: int) -> bool:
    """Whether the kernel writes these new tokens, where they lie, and rotates what is to be rotated."""
    rotary = append.rotary
    return (
        longest_new <= MOST_APPENDED
        and q.dtype in (torch.bfloat16, torch.float16)
        and append.k.dtype == append.v.dtype == q.dtype
        and k.dtype in (q.dtype, torch.float8_e4m3fn)
        and _is_aligned(append.k)
        and _is_aligned(append.v)
        and (rotary is None or (_is_aligned(rotary.cos) and _is_aligned(rotary.sin)))
    )


def _append_form(append: Append, longest_new: int, q_turns: bool) -> AppendForm:
    rotary = append.rotary
    half, dtypes = 0, [append.k.dtype, append.v.dtype]
    if rotary is not None:
        half = rotary.cos.shape[1]
        dtypes += [rotary.cos.dtype, rotary.sin.dtype]
    return AppendForm(
        tokens=max(next_power_of_2(longest_new), APPENDED_AT_LEAST),
        rotary_half=half,
        interleaved=rotary is not None and rotary.interleaved,
        q_turns=q_turns,
        dtypes=tuple(dtypes),
        given=(append.cu_seqlens is not None, rotary is not None and rotary.seqlens is not None),
    )


def _specialised(given: Any) -> Hashable:
    """What of arguments the compiler looks at: of tuples it does at every number."""
    if isinstance(given, tuple):
        return tuple(map(_specialised, given))
    if isinstance(given, int):
        return given == 1, given % 16 == 0, given.bit_length() < 32
    return given is None or given.data_ptr() % 16 == 0


def _appended(append: Append) -> tuple[Any, ...]:
    """New tokens and angles as the kernel takes them, with tensors."""
    k, v, cu, rotary = append.k, append.v, append.cu_seqlens, append.rotary
    number = 0 if cu is not None else k.shape[1]
    sources = k, v, cu, number, _row_strides(k), _row_strides(v)
    if rotary is None:
        return sources, (None, None, None, 0, 0)
    cos, sin = rotary.cos, rotary.sin
    return sources, (cos, sin, rotary.seqlens, cos.stride(0), sin.stride(0))


class _Addresses:
    """The same with addresses, for new tokens of the same shapes and strides."""

    def __init__(self, append: Append) -> None:
        sources, angles = _appended(append)
        self._sources, self._angles = sources[3:], angles[3:]

    def __call__(self, append: Append) -> tuple[tuple[Any, ...], int]:
        """Also the addresses of what need not lie at multiples of 16 bytes, together."""
        cu, rotary = append.cu_seqlens, append.rotary
        cos = sin = turns = None
        cu_at = None if cu is None else cu.data_ptr()
        if rotary is not None:
            seqlens = rotary.seqlens
            cos, sin = rotary.cos.data_ptr(), rotary.sin.data_ptr()
            turns = None if seqlens is None else seqlens.data_ptr()
        sources = (append.k.data_ptr(), append.v.data_ptr(), cu_at, *self._sources)
        return (sources, (cos, sin, turns, *self._angles)), (cu_at or 0) | (turns or 0)


def _row_strides(t: Tensor) -> tuple[int, ...]:
    """Strides of (batch, row, head); a ragged tensor's batches start at their first rows."""
    return t.stride()[:3] if t.dim() == 4 else (0, *t.stride()[:2])


def _lse_strides(lse: Tensor | None) -> tuple[int, ...]:
    if lse is None:
        return 0, 0
    return lse.stride()[:2] if lse.dim() == 3 else (0, lse.stride(0))


def _descale_strides(descales: tuple[Tensor | None, ...]) -> tuple[int, ...]:
    if descales == (None, None, None):
        return _NO_STRIDES
    return tuple(n for d in descales for n in (d.stride() if d is not None else (0, 0)))


def _boxes(k: Tensor, v: Tensor, cfg: DecodeConfig) -> tuple[Boxes, Boxes]:
    """Keys and values with heads before rows, as they are copied."""

    def boxes(t: Tensor, width: int, layout: Any) -> Boxes:
        (pages, rows, heads, columns), (page, row, head, column) = t.shape, t.stride()
        shape, strides = (pages, heads, rows, columns), (page, head, row, column)
        return Boxes(t.dtype, shape, strides, (1, 1, cfg.box_rows, width), layout)

    return boxes(k, cfg.k_width, cfg.k_boxes), boxes(v, cfg.v_box_width, cfg.v_boxes)


def _is_aligned(t: Tensor) -> bool:
    """Whether every row starts at a multiple of 16 bytes and is contiguous."""
    *strides, last = t.stride()
    together = functools.reduce(operator.or_, strides)
    return last == 1 and not (t.data_ptr() | together * t.element_size()) & 15


def _misaligned_address(**addresses: int) -> InvalidInputError:
    name, at = next((name, at) for name, at in addresses.items() if at % 16)
    return InvalidInputError(
        name, f"an address {at % 16} bytes above a multiple of 16", "a multiple of 16"
    )
