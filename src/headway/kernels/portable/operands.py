"""From a Problem to the arguments of the attention kernel: pointers, strides, and compile-time facts."""

from __future__ import annotations

import functools
import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headway.kernels._triton import INTERPRETED, next_power_of_2
from headway.kernels.portable.tiles import Tile
from headway.problem import FLOAT8_DTYPES, WIDEST_WINDOW, KVLayout, Problem

if TYPE_CHECKING:
    from headway.kernels.mods import ModArguments

LOG2E = math.log2(math.e)

#: Values are padded to at least this width: Triton 3.6's wgmma reads past the end of narrower float16
#: tiles that were converted from float8.
NARROWEST_VALUES = 64


@dataclass(frozen=True)
class Device:
    """What kernels and their launchers need to know of a device."""

    arch: str  # a name in the tile tables
    multiprocessors: int
    converts_float8: bool  # float8_e4m3 elements can be loaded as such
    multiplies_float8: bool


#: What ahead-of-time compilation assumes of each target. RDNA3 has no instruction for float8: what Triton
#: makes of its conversions there takes minutes to compile.
TARGETS = {
    "sm80": Device("sm80", 108, False, False),
    "sm90": Device("sm90", 132, True, True),
    "sm100": Device("sm100", 148, True, True),
    "sm120": Device("sm120", 188, True, True),
    "gfx942": Device("gfx942", 304, True, False),
    "gfx950": Device("gfx950", 256, True, True),
    "gfx1100": Device("gfx1100", 96, False, False),
}


def device_of(device: torch.device) -> Device:
    """Facts about a device, by index.

    The interpreter counts as a device with few multiprocessors; meta tensors stand for the target that
    HEADWAY_TARGET names, for compiling without a device.
    """
    if device.type == "meta":  # one process compiles for several
        return TARGETS[os.environ["HEADWAY_TARGET"]]
    return _facts(device)


@functools.cache
def _facts(device: torch.device) -> Device:
    if INTERPRETED.value:
        return Device("interpreter", 4, False, False)
    properties = torch.cuda.get_device_properties(device)
    count = properties.multi_processor_count
    if torch.version.hip is not None:
        arch = properties.gcnArchName.split(":")[0]
        return Device(arch, count, arch[:5] != "gfx11", arch in ("gfx950", "gfx1200", "gfx1201"))
    capability = properties.major * 10 + properties.minor
    return Device(f"sm{capability}", count, capability >= 89, capability >= 89)


def knows_float8(dtype: torch.dtype, device: Device) -> bool:
    """Whether kernels read and round to a float8 format there: to e4m3fn everywhere, if need be as bits."""
    if dtype == torch.float8_e4m3fnuz:
        return device.arch.startswith("gfx94")
    return dtype == torch.float8_e4m3fn or device.converts_float8


def dependent_launch(device: torch.device) -> dict[str, bool]:
    """Arguments for a short kernel that may start while the one before it ends (it calls gdc_wait before
    it reads anything): a microsecond less between two kernels."""
    dependent = device_of(device).arch in ("sm90", "sm100", "sm103", "sm120")
    return {"DEPENDENT": True, "launch_pdl": True} if dependent else {"DEPENDENT": False}


@dataclass(frozen=True)
class Segments:
    """The dot product of a query and a key as one or two power-of-two pieces, and the values.

    Scores are q1 · k1 (+ q2 · k2). With ``v_is_k`` the values are k1 itself, read once (latent MLA).
    """

    q1: Tensor
    k1: Tensor
    v: Tensor
    d1: int
    q2: Tensor | None = None
    k2: Tensor | None = None
    d2: int = 0
    v_is_k: bool = False
    two_scales: bool = False


def block_width(dim: int, smallest: int = 16) -> int:
    """Padded width of a head dimension inside a kernel."""
    return max(smallest, next_power_of_2(dim))


def segments_of(problem: Problem) -> Segments:
    """Cut head_dim at its largest power of two where that pads less than rounding it up."""
    q, k, v, dim = problem.q, problem.k, problem.v, problem.head_dim
    head = next_power_of_2(dim + 1) // 2
    rest = dim - head
    smallest = 32 if q.dtype in FLOAT8_DTYPES else 16
    if head < 64 or rest == 0 or head + block_width(rest, smallest) >= next_power_of_2(dim):
        return Segments(q, k, v, dim)
    return Segments(q, k, v, head, q[..., head:], k[..., head:], rest)


def bits(tensor: Tensor | None, native: bool) -> Tensor | None:
    """The tensor, or its float8 elements as uint8 where the device does not know them."""
    if tensor is None or native or tensor.dtype not in FLOAT8_DTYPES:
        return tensor
    return tensor.view(torch.uint8)


def strides(prefix: str, tensor: Tensor | None, names: tuple[str, ...]) -> dict[str, int]:
    """Strides as kernel arguments ``stride_<prefix>_<name>``; all zero without a tensor."""
    values = tensor.stride() if tensor is not None else (0,) * len(names)
    return {f"stride_{prefix}_{n}": s for n, s in zip(names, values, strict=False)}


def _row_strides(prefix: str, tensor: Tensor | None, first: str) -> dict[str, int]:
    """Strides of (first, row, head[, dim]); ragged tensors have no first dimension."""
    if tensor is not None and tensor.dim() == 3:
        return {f"stride_{prefix}_{first}": 0} | strides(prefix, tensor, ("row", "head"))
    return strides(prefix, tensor, (first, "row", "head"))


#: Arguments that say where each sequence's queries and keys lie; :mod:`.spans` reads them.
LENGTHS = (
    "cu_seqlens_q",
    "seqused_q",
    "rows_q",
    "cu_seqlens_k",
    "seqlens_k",
    "num_new",
    "cu_seqlens_new",
    "leftpad_k",
    "cache_batch_idx",
    "capacity",
)


def lengths(problem: Problem) -> dict[str, Any]:
    """The arguments named in LENGTHS."""
    p, new = problem, problem.append
    capacity = 0
    if p.kv_layout is KVLayout.DENSE:
        capacity = p.k.shape[1]
    elif p.page_table is not None:
        capacity = p.page_table.shape[1] * p.k.shape[1]
    return {
        "cu_seqlens_q": p.cu_seqlens_q,
        "seqused_q": p.seqused_q,
        "rows_q": p.max_seqlen_q if p.ragged_q else p.q.shape[1],
        "cu_seqlens_k": p.cu_seqlens_k,
        "seqlens_k": p.seqlens_k,
        "num_new": new.k.shape[1] if new is not None and new.cu_seqlens is None else 0,
        "cu_seqlens_new": new.cu_seqlens if new is not None else None,
        "leftpad_k": p.leftpad_k,
        "cache_batch_idx": p.cache_batch_idx,
        "capacity": capacity,
    }


def mask_arguments(problem: Problem) -> dict[str, Any]:
    """Window and chunk, with the compile-time facts about which of them there are."""
    mask = problem.mask
    left, right = (
        None if side is None or side >= WIDEST_WINDOW else side
        for side in (mask.window_left, mask.window_right)
    )
    return {
        "window_left": left or 0,
        "window_right": right or 0,
        "chunk": mask.attention_chunk,
        "HAS_LEFT": left is not None,
        "HAS_RIGHT": right is not None,
        "HAS_CHUNK": mask.attention_chunk > 0,
    }


def operands(
    problem: Problem,
    segments: Segments,
    out: Tensor,
    lse: Tensor | None,
    tile: Tile,
    pack: int,
    mods: ModArguments | None = None,
) -> dict[str, Any]:
    """All arguments of the attention kernel but the work list and the partial results."""
    p, s, device = problem, segments, device_of(problem.device)
    native = device.converts_float8
    scale = p.scores.softmax_scale
    score_mod = None if mods is None else mods.score_mod
    scores_first = p.scores.softcap > 0 or score_mod is not None or scale <= 0
    both_float8 = p.q.dtype in FLOAT8_DTYPES and p.k.dtype in FLOAT8_DTYPES
    page_size = p.page_size or 0
    k2 = s.k2 if s.k2 is not None else s.k1
    arguments = {
        "q1_ptr": bits(s.q1, native),
        "q2_ptr": bits(s.q2 if s.q2 is not None else s.q1, native),
        "k1_ptr": bits(s.k1, native),
        "k2_ptr": bits(k2, native),
        "v_ptr": bits(s.v, native),
        "out_ptr": out,
        "lse_ptr": lse,
        "sinks": p.scores.sinks,
        "page_table": p.page_table,
        "stride_table": p.page_table.stride(0) if p.page_table is not None else 0,
        "stride_lse_batch": 0 if p.ragged_q or lse is None else lse.stride(0),
        "stride_lse_head": 0 if lse is None else lse.stride(-2),
        "softmax_scale": scale if scores_first else scale * LOG2E,
        "softcap": p.scores.softcap,
        "score_mod": score_mod,
        "mask_mod": None if mods is None else mods.mask_mod,
        "aux": () if mods is None else mods.aux,
        "HAS_SOFTCAP": p.scores.softcap > 0,
        "SCORES_FIRST": scores_first,
        "TWO_SCALES": s.two_scales,
        "ROW_SCALES": p.q.dtype == torch.bfloat16 and p.k.dtype in FLOAT8_DTYPES,
        "FP8_DOT": both_float8 and device.multiplies_float8 and not s.v_is_k,
        "HEADS_PER_KV": p.num_q_heads // p.num_kv_heads,
        "PACK": pack,
        "PAGE_SIZE": page_size,
        "ALIGNED": page_size > 0 and page_size % tile.block_n == 0 and p.leftpad_k is None,
        "V_IS_K": s.v_is_k,
        "D1": s.d1,
        "D2": s.d2,
        "DV": p.head_dim_v,
        "BLOCK_D1": block_width(s.d1, NARROWEST_VALUES if s.v_is_k or both_float8 else 16),
        "BLOCK_D2": block_width(s.d2, 32 if both_float8 else 16) if s.d2 else 0,
        "BLOCK_DV": block_width(p.head_dim_v, NARROWEST_VALUES),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "EDGE_STAGES": min(tile.num_stages, 2),
        "HOIST": tile.hoist,
        "NVIDIA": device.arch.startswith("sm"),
        "K1_ROW": s.k1.stride(-3) if s.v_is_k else 0,
        "K2_ROW": k2.stride(-3) if s.v_is_k else 0,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
    arguments |= lengths(p) | mask_arguments(p)
    arguments |= _row_strides("q1", s.q1, "batch") | _row_strides("q2", s.q2, "batch")
    arguments |= _row_strides("k1", s.k1, "page") | _row_strides("k2", k2, "page")
    arguments |= _row_strides("v", s.v, "page") | _row_strides("out", out, "batch")
    for name, descale in (("q", p.descales.q), ("k", p.descales.k), ("v", p.descales.v)):
        arguments[f"{name}_descale"] = descale
        arguments |= strides(f"{name}_descale", descale, ("batch", "head"))
    units = _in_units(arguments, p.k.element_size())
    paired = units["STRIDE_UNIT"] > 1 and _in_pairs(s.v, tile, device)
    return arguments | units | {"PAIRED": paired}


def _in_pairs(v: Tensor, tile: Tile, device: Device) -> bool:
    """Whether float8 values are read as uint16: for NVIDIA's tensor cores that read registers, which
    want several rows of a column. Those of Hopper that read shared memory take 64 rows of queries."""
    paired = v.dtype in FLOAT8_DTYPES and v.data_ptr() % 2 == 0 and tile.block_m < 64
    native = device.arch.startswith("sm") and device.converts_float8
    return paired and (native or device.arch == "interpreter")


def _in_units(arguments: dict[str, Any], itemsize: int) -> dict[str, Any]:
    """Strides of keys and values in units of 16 bytes, where all of them are multiples of it.

    The compiler learns of integer arguments only whether 16 divides them; told of the unit, it can copy
    16 bytes at once for head dims such as 40 as well. Float8 of such widths gets units of 8 bytes.
    """
    names = [f"stride_{t}_{n}" for t in ("k1", "k2", "v") for n in ("page", "row", "head")]
    common = math.gcd(16 // itemsize, *(arguments[name] for name in names))
    unit = common if common >= 8 else 1
    return {name: arguments[name] // unit for name in names} | {"STRIDE_UNIT": unit}
