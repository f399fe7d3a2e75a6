"""FlashAttention 4, the package flash-attn-4: ``flash_attn.cute``, in the folder of FlashAttention 2.

None is the only way it spells "unbounded": a negative window is an offset there. Its LSE has another
layout with ``qv``. Where a build has it, the function beneath the public ones is called, because it alone
takes ``out`` and descales.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from headway import devices
from headway.problem import FLOAT8_DTYPES, KVLayout, Problem
from headway.providers._packages import Package, at_least, delivered, given, remembered
from headway.providers.base import (
    Capabilities,
    DimRange,
    Exclusion,
    Feature,
    HeadDims,
    Provider,
    Trait,
    excludes,
)

PACKAGE = Package("flash_attn.cute", "flash-attn-4", source="interface.py")

#: What a public function must take to be FlashAttention 4: flash-attn ships an early draft in this folder.
_NEEDED = frozenset({"seqused_k", "page_table", "learnable_sink", "window_size"})
_BENEATH = frozenset({"out", "return_lse", "q_descale", "window_size_left", "page_table"})

_HALF = frozenset({(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16)})
_FLOAT8 = frozenset({(dtype, dtype) for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)})
_ANY_SINK = frozenset({torch.bfloat16, torch.float16, torch.float32})
_256 = DimRange((256, 256), (256, 256))
_LATENT = DimRange((64, 64), (512, 512))

_APPEND = "FlashAttention 4 writes no caches; write first, or use ver=3 or Headway's kernels"
_DESCALE = "float8 with descales runs on compute capability 10.x only"
_MODS = (
    "FlashAttention 4 takes functions of its own language, over relative positions, in place of causal"
    " and window"
)
_LACKS = {
    Feature.APPEND: _APPEND,
    Feature.ROTARY: "FlashAttention 4 rotates nothing; rotate first, or use ver=3 or Headway's kernels",
    Feature.LEFTPAD: "FlashAttention 4 has none; Headway's kernels do",
    Feature.BATCH_IDX: "FlashAttention 4 has none; put the rows in order (index_select page_table)",
    Feature.CHUNK: "FlashAttention 4 has none; ver=3 and Headway's kernels do",
    Feature.SCORE_MOD: _MODS,
    Feature.MASK_MOD: _MODS,
    Feature.DESCALE: _DESCALE,
    Feature.QV: "absorbed MLA runs on compute capability 10.x only",
}
_EVERYWHERE = frozenset(
    {
        Feature.CAUSAL,
        Feature.WINDOW,
        Feature.SOFTCAP,
        Feature.SINKS,
        Feature.RAGGED_Q,
        Feature.SEQUSED_Q,
        Feature.SEQUSED_K,
        Feature.UNEQUAL_HEAD_DIMS,
        Feature.GQA,
        Feature.LSE,
        Feature.OUT,
    }
)


class Fa4Provider(Provider):
    name = "fa4"
    generation = 4
    is_package = True

    def unavailable(self, device: torch.device) -> str | None:
        what = devices.of(device)
        if what.vendor != "nvidia":
            return f"runs on NVIDIA GPUs from sm80 to sm121, this is {what}"
        if what.capability[0] not in (8, 9, 10, 11, 12):
            return f"runs on sm80 to sm121, this is {what}"
        if not PACKAGE.found():
            return PACKAGE.missing()
        lacking = _NEEDED - PACKAGE.parameters("flash_attn_varlen_func")
        if lacking:
            return (
                f"flash_attn.cute is an early one without {', '.join(sorted(lacking))}"
                " (pip install flash-attn-4)"
            )
        return PACKAGE.broken()

    def package(self) -> tuple[str, str] | None:
        return PACKAGE.installed()

    def capabilities(self, device: torch.device) -> Capabilities:
        return _capabilities(devices.of(device).capability[0], device.type)

    def documented(self) -> Mapping[str, Capabilities]:
        kinds = {"sm90": 9, "sm100": 10, "sm80, sm120": 8}
        return {kind: _build(major, "cuda", True, _ANY_SINK) for kind, major in kinds.items()}

    def load(self) -> None:
        _functions()

    def run(self, problem: Problem) -> tuple[Tensor, Tensor | None]:
        functions = _functions()
        if functions.beneath is not None:
            out, lse = _run_beneath(functions.beneath, problem)
        else:
            out, lse = _run_public(functions, problem)
        if lse is not None and problem.qv is not None:
            lse = lse.transpose(-1, -2).contiguous()
        return delivered(problem, out), (lse if problem.return_lse else None)


# --- capabilities -------------------------------------------------------------------------------------


@remembered
def _capabilities(major: int, device_type: str) -> Capabilities:
    has_beneath = PACKAGE.parameters("_flash_attn_fwd") >= _BENEATH
    return _build(major, device_type, has_beneath, _sink_dtypes())


def _build(
    major: int, device_type: str, has_beneath: bool, sink_dtypes: frozenset[torch.dtype]
) -> Capabilities:
    blackwell = major in (10, 11)
    features, dtypes = _EVERYWHERE, _HALF
    if blackwell:
        features |= {Feature.QV}
    if major == 10 and has_beneath:
        features, dtypes = features | {Feature.DESCALE}, dtypes | _FLOAT8
    return Capabilities(
        device_types=frozenset({device_type}),
        dtypes=dtypes,
        features=features,
        head_dims=_head_dims(blackwell),
        kv_layouts=frozenset(KVLayout) - ({KVLayout.PAGED} if major in (8, 12) else set()),
        float8_head_dims=HeadDims(maximum=128, multiple_of=16, pairs=frozenset({(192, 128)})),
        paged_head_dims=HeadDims(
            maximum=128 if blackwell else 192,
            multiple_of=16,
            unequal=None if blackwell else _UNEQUAL,
        ),
        qv_head_dims=_LATENT,
        sink_dtypes=sink_dtypes,
        kv_alignment_bytes=16,
        needs_finite_tails=True,
        exclusions=_exclusions(blackwell),
        lacks=_LACKS,
    )


#: SM90's tiles are chosen by the head_dim of k alone. Values of a wider class than that do not fit their
#: registers: ptxas refuses 64/256.
_UNEQUAL = tuple(
    DimRange((low, high), (8, high))
    for low, high in ((8, 64), (65, 96), (97, 128), (129, 192), (193, 256))
)


def _head_dims(blackwell: bool) -> HeadDims:
    if blackwell:
        return HeadDims(maximum=128, pairs=frozenset({(192, 128), (256, 256)}))
    return HeadDims(maximum=256, unequal=_UNEQUAL)


def _sink_dtypes() -> frozenset[torch.dtype]:
    """Sinks are bfloat16 alone before 4.0.0b36."""
    if at_least(PACKAGE.version(), 4, 0, 0, 36):
        return _ANY_SINK
    return frozenset({torch.bfloat16})


def _exclusions(blackwell: bool) -> tuple[Exclusion, ...]:
    common = (
        excludes(Trait.DENSE_Q, KVLayout.RAGGED, why="takes ragged queries with ragged keys"),
        excludes(Feature.SEQUSED_Q, Trait.DENSE_Q, why="takes seqused_q with cu_seqlens_q"),
    )
    if not blackwell:
        wrong = "4.0.0b36 returns wrong results there"
        return (*common, excludes(KVLayout.PAGED, why=wrong, dims=DimRange((65, 96), (8, 96))))
    narrow = "the kernel for head_dim 256 has none"
    latent = "the kernel for absorbed MLA has none"
    with_256 = (
        Feature.WINDOW,
        Feature.SOFTCAP,
        Feature.SINKS,
        Feature.SEQUSED_Q,
        Feature.SEQUSED_K,
    )
    with_qv = (Feature.WINDOW, Feature.SOFTCAP, Feature.SINKS, Feature.DESCALE)
    return (
        *common,
        *(excludes(feature, why=narrow, dims=_256) for feature in with_256),
        *(excludes(Feature.QV, feature, why=latent) for feature in with_qv),
    )


# --- calls --------------------------------------------------------------------------------------------


class _Functions:
    """The package's functions. ``beneath`` is None in builds whose inner function is another."""

    def __init__(self, interface: Any) -> None:
        self.dense = interface.flash_attn_func
        self.varlen = interface.flash_attn_varlen_func
        takes = PACKAGE.parameters("_flash_attn_fwd")
        self.beneath = interface._flash_attn_fwd if takes >= _BENEATH else None


@remembered
def _functions() -> _Functions:
    PACKAGE.load()
    return _Functions(Package("flash_attn.cute.interface", str(PACKAGE)).load())


def _run_beneath(function: Any, p: Problem) -> tuple[Tensor, Tensor | None]:
    arguments = _common(p)
    d = p.descales
    given(
        arguments,
        window_size_left=p.mask.window_left,
        window_size_right=p.mask.window_right,
        q_descale=d.q,
        k_descale=d.k,
        v_descale=d.v,
        out=_in_place(p),
    )
    result = function(p.q, p.k, p.v, return_lse=p.return_lse, **arguments)
    return result[0], result[1]  # what follows differs between builds


def _run_public(functions: _Functions, p: Problem) -> tuple[Tensor, Tensor | None]:
    arguments = _common(p)
    arguments["window_size"] = (p.mask.window_left, p.mask.window_right)
    arguments["return_lse"] = p.return_lse
    lengths = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "page_table")
    if not any(name in arguments for name in lengths):
        for name in ("max_seqlen_q", "max_seqlen_k"):
            del arguments[name]
        out, lse = functions.dense(p.q, p.k, p.v, **arguments)
    else:
        out, lse = functions.varlen(p.q, p.k, p.v, **arguments)
    return out, lse


def _common(p: Problem) -> dict[str, Any]:
    return given(
        {
            "softmax_scale": p.scores.softmax_scale,
            "causal": p.mask.causal,
            "softcap": p.scores.softcap,
            "num_splits": _num_splits(p),
            "pack_gqa": p.hints.pack_gqa,
            "max_seqlen_q": p.max_seqlen_q,
            "max_seqlen_k": p.max_seqlen_k,
        },
        qv=p.qv,
        cu_seqlens_q=p.cu_seqlens_q,
        cu_seqlens_k=p.cu_seqlens_k,
        seqused_q=p.seqused_q,
        seqused_k=p.seqlens_k,
        page_table=p.page_table,
        learnable_sink=p.scores.sinks,
    )


def _num_splits(p: Problem) -> int:
    """Only SM100's kernels for narrow heads split; elsewhere another number is an assertion."""
    splits = devices.of(p.device).capability[0] in (10, 11)
    narrow = max(p.head_dim, p.head_dim_v) <= 128 and p.qv is None
    return p.hints.num_splits if splits and narrow else 1


def _in_place(p: Problem) -> Tensor | None:
    """``out`` where the kernel can write it itself."""
    if p.out is None:
        return None
    kernels = torch.bfloat16 if p.q.dtype in FLOAT8_DTYPES else p.q.dtype
    aligned = p.out.data_ptr() % 16 == 0 and all(
        stride * p.out.element_size() % 16 == 0 for stride in p.out.stride()[:-1]
    )
    return p.out if p.out.dtype == kernels and aligned else None


PROVIDER = Fa4Provider()
