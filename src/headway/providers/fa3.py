"""FlashAttention 3, from whichever package has it: sgl_kernel, FA3's own build, fa3-fwd, vLLM's fork.

They differ in arguments (sinks, out), in what was compiled into them, and in what they accept and then
ignore. Each is called through the function that honours the call: paged keys never go through
``flash_attn_varlen_func``, which takes a ``page_table`` in sgl_kernel and passes on none.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headway import devices
from headway.problem import KVLayout, Problem
from headway.providers import _vllm
from headway.providers._packages import (
    Package,
    asks_nothing,
    delivered,
    first_of,
    given,
    in_place,
    nothing,
    remembered,
    window,
)
from headway.providers.base import (
    ALL_FEATURES,
    Capabilities,
    DimRange,
    Exclusion,
    Feature,
    HeadDims,
    Provider,
    Trait,
    excludes,
)

_VLLM = _vllm.package(3)

#: In the order in which they are taken where several are installed: the most arguments first.
PACKAGES = (
    Package("sgl_kernel.flash_attn", "sglang-kernel"),
    Package(
        "flash_attn_interface",
        "flash_attn_3",
        install="flash_attn_3, built from flash-attention/hopper",
    ),
    Package("fa3_fwd_interface", "fa3-fwd"),
    _VLLM,
)

#: More are an error.
_MOST_SPLITS = 256

_HALF = frozenset({(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16)})
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e4m3fn)

#: Compute capabilities with kernels; 8.x takes 16-bit inputs only.
_CAPABILITIES = frozenset({(8, 0), (8, 6), (8, 7), (8, 9), (9, 0)})

_NARROW_WITH_WIDE = DimRange((8, 64), (8, 512))
_192_WITH_128 = DimRange((136, 192), (104, 128))
_LATENT = DimRange((8, 64), (256, 512))

_MODS = "FlashAttention 3 has no callables in its kernels; portable and hopper run them"
_LACKS = {
    Feature.SCORE_MOD: _MODS,
    Feature.MASK_MOD: _MODS,
    Feature.SINKS: "this build has none; sglang-kernel's and vLLM's do",
    Feature.CHUNK: "this build has no attention_chunk",
    Feature.WINDOW: "this build was made without local attention",
}


class Fa3Provider(Provider):
    name = "fa3"
    generation = 3
    is_package = True

    def unavailable(self, device: torch.device) -> str | None:
        what = devices.of(device)
        if what.vendor != "nvidia":
            return f"runs on NVIDIA GPUs of compute capability 8.0 to 9.0, this is {what}"
        if what.capability not in _CAPABILITIES:
            return f"runs on sm80 to sm90, this is {what} (FlashAttention 4 runs on newer ones)"
        toolkit = devices.toolkit_version()
        if toolkit is not None and toolkit < (12, 3):
            return f"needs CUDA 12.3, torch was built for {'.'.join(map(str, toolkit))}"
        package = _installed()
        if package is None:
            return (
                "no package of FlashAttention 3 is installed: sglang-kernel, flash_attn_3, fa3-fwd, vllm"
                " (pip install sglang-kernel)"
            )
        if package is _VLLM and what.capability < (9, 0):
            return f"vLLM's build of FlashAttention 3 runs on sm90 alone, this is {what}"
        return package.broken()

    def package(self) -> tuple[str, str] | None:
        package = _installed()
        return None if package is None else package.installed()

    def capabilities(self, device: torch.device) -> Capabilities:
        package = _installed()
        assert package is not None, "asked for the capabilities of what is not available"
        return _capabilities(package, devices.of(device).capability[0], device.type)

    def documented(self) -> Mapping[str, Capabilities]:
        newest = frozenset({"sinks", "attention_chunk", "qv", "q_descale"})
        return {"sm90": _build(newest, {}, 9, "cuda"), "sm80": _build(newest, {}, 8, "cuda")}

    def load(self) -> None:
        package = _installed()
        if package is not None:
            _calls(package)

    def run(self, problem: Problem) -> tuple[Tensor, Tensor | None]:
        package = _installed()
        assert package is not None
        if asks_nothing(problem):
            return nothing(problem)
        calls = _calls(package)
        if calls.kvcache is None:
            packed = _vllm.packed(problem)
            return _vllm.unpacked(problem, *_finished(packed, calls.run_vllm(packed)))
        if problem.kv_layout is KVLayout.RAGGED:
            return _finished(problem, calls.run_varlen(problem))
        return _finished(problem, calls.run_kvcache(problem))


def _finished(p: Problem, result: Any) -> tuple[Tensor, Tensor | None]:
    if not p.return_lse:
        return delivered(p, result), None
    out, lse, *_ = result
    if p.k.numel() == 0:
        lse.fill_(float("-inf"))  # without a single key, the host writes +inf
    return delivered(p, out), lse


@remembered
def _installed() -> Package | None:
    return next((package for package in PACKAGES if package.found()), None)


# --- what a build can do ------------------------------------------------------------------------------


@remembered
def _capabilities(package: Package, major: int, device_type: str) -> Capabilities:
    takes = package.parameters("flash_attn_with_kvcache")
    vllm = not takes
    if vllm:
        takes = package.parameters("flash_attn_varlen_func")
    return _build(takes, _build_flags(package), major, device_type, vllm)


def _build(
    takes: frozenset[str],
    flags: Mapping[str, bool],
    major: int,
    device_type: str,
    vllm: bool = False,
) -> Capabilities:
    """The capabilities of a build: by the arguments of its functions and what was compiled in."""
    features = set(ALL_FEATURES - {Feature.SCORE_MOD, Feature.MASK_MOD})
    by_argument = {
        Feature.SINKS: first_of(takes, "sinks", "s_aux", "learnable_sink"),
        Feature.CHUNK: first_of(takes, "attention_chunk"),
        Feature.QV: first_of(takes, "qv", "q_v"),
        Feature.DESCALE: first_of(takes, "q_descale"),
    }
    features -= {feature for feature, name in by_argument.items() if name is None}
    if vllm:
        features -= _vllm.LACKS
    if flags.get("LOCAL"):
        features -= {Feature.WINDOW, Feature.CHUNK}
    if flags.get("APPENDKV"):
        features -= {Feature.APPEND, Feature.ROTARY}
    if flags.get("SOFTCAP"):
        features -= {Feature.SOFTCAP}
    if major < 9:
        features -= {Feature.QV, Feature.DESCALE}
    layouts = set(_vllm.LAYOUTS if vllm else KVLayout)
    if flags.get("PAGEDKV"):
        layouts -= {KVLayout.PAGED}
    return Capabilities(
        device_types=frozenset({device_type}),
        dtypes=_dtypes(flags, major),
        features=frozenset(features),
        head_dims=HeadDims(unequal=_unequal(flags, major)),
        kv_layouts=frozenset(layouts),
        float8_head_dims=HeadDims(multiple_of=16, pairs=frozenset({(192, 128)}), unequal=()),
        qv_head_dims=_LATENT,
        sink_dtypes=frozenset({torch.bfloat16}),
        rotary_dim_multiple_of=16,
        rotary_in_dtype_of_q=True,
        needs_finite_tails=True,
        exclusions=_exclusions(vllm),
        lacks=_LACKS,
    )


def _dtypes(flags: Mapping[str, bool], major: int) -> frozenset[tuple[torch.dtype, torch.dtype]]:
    pairs = set(_HALF)
    if flags.get("FP16"):
        pairs -= {(torch.float16, torch.float16)}
    if major >= 9 and not flags.get("FP8"):
        pairs |= {_FLOAT8}
    return frozenset(pairs)


def _unequal(flags: Mapping[str, bool], major: int) -> tuple[DimRange, ...]:
    if major < 9:
        return ()
    narrow = () if flags.get("HDIMDIFF64") else (_NARROW_WITH_WIDE,)
    return narrow if flags.get("HDIMDIFF192") else (*narrow, _192_WITH_128)


def _exclusions(vllm: bool) -> tuple[Exclusion, ...]:
    lengths = "only flash_attn_varlen_func has seqused_q, and it takes ragged keys alone"
    found = [
        excludes(Trait.DENSE_Q, KVLayout.RAGGED, why="takes ragged queries with ragged keys"),
        excludes(Feature.SEQUSED_Q, KVLayout.PAGED, why=lengths),
        excludes(Feature.SEQUSED_Q, KVLayout.DENSE, why=lengths),
        excludes(
            Trait.APPEND_QUANTISED,
            why="writes new keys as they are; quantise them first (headway.quant)",
        ),
        excludes(Feature.QV, Trait.FLOAT8, why="takes 16-bit inputs only"),
        excludes(
            Feature.SINKS,
            Feature.LSE,
            why="whether the LSE includes the sink differs between builds",
        ),
    ]
    if vllm:
        found.append(_vllm.ONE_KIND_OF_LENGTHS)
        found.append(
            excludes(Feature.SINKS, Feature.UNEQUAL_HEAD_DIMS, why="takes sinks with one head_dim")
        )
    return tuple(found)


def _build_flags(package: Package) -> dict[str, bool]:
    """What a build leaves out: its config module says so in one literal, {"..._DISABLE_LOCAL": True}."""
    folder = package.folder()
    if folder is None:
        return {}
    for name in ("fa3_fwd_config.py", "flash_attn_config.py"):
        file = folder / name
        if package.module != "fa3_fwd_interface" and name.startswith("fa3_fwd"):
            continue
        if file.exists():
            _, _, literal = file.read_text(encoding="utf-8").partition("CONFIG = ")
            flags = ast.literal_eval(literal.splitlines()[0])["build_flags"]
            pairs = ((key.partition("_DISABLE_")[2], value) for key, value in flags.items())
            return {key: bool(value) for key, value in pairs if key}
    return {}


# --- calls --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Calls:
    """The functions of one package, with the names it gives to what the forks name differently."""

    kvcache: Callable[..., Any] | None
    varlen: Callable[..., Any]
    kvcache_out: bool
    varlen_out: bool
    varlen_lse: str
    sinks: str
    splits: bool  # whether split-KV was compiled in

    def run_kvcache(self, p: Problem) -> Any:
        arguments = self._common(p)
        arguments["cache_seqlens"] = p.seqlens_k
        arguments["return_softmax_lse"] = p.return_lse
        given(
            arguments,
            qv=p.qv,
            page_table=p.page_table,
            cache_batch_idx=p.cache_batch_idx,
            cache_leftpad=p.leftpad_k,
            out=in_place(p) if self.kvcache_out else None,
        )
        if p.ragged_q:
            arguments |= {"cu_seqlens_q": p.cu_seqlens_q, "max_seqlen_q": p.max_seqlen_q}
        if p.append is not None:
            given(arguments, k=p.append.k, v=p.append.v, cu_seqlens_k_new=p.append.cu_seqlens)
            rotary = p.append.rotary
            if rotary is not None:
                arguments |= {"rotary_cos": rotary.cos, "rotary_sin": rotary.sin}
                arguments["rotary_interleaved"] = rotary.interleaved
                given(arguments, rotary_seqlens=rotary.seqlens)
        assert self.kvcache is not None
        return self.kvcache(p.q, p.k, p.v, **arguments)

    def run_varlen(self, p: Problem) -> Any:
        arguments = self._common(p)
        arguments[self.varlen_lse] = p.return_lse
        given(
            arguments,
            qv=p.qv,
            seqused_q=p.seqused_q,
            seqused_k=p.seqlens_k,
            out=in_place(p) if self.varlen_out else None,
        )
        return self.varlen(
            p.q,
            p.k,
            p.v,
            p.cu_seqlens_q,
            p.cu_seqlens_k,
            p.max_seqlen_q,
            p.max_seqlen_k,
            **arguments,
        )

    def run_vllm(self, p: Problem) -> Any:
        """vLLM's build: its function has fewer hints."""
        arguments = self._common(p)
        del arguments["pack_gqa"], arguments["sm_margin"]
        given(arguments, q_v=p.qv, out=in_place(p))
        return _vllm.call(self.varlen, 3, p, **arguments)

    def _common(self, p: Problem) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "softmax_scale": p.scores.softmax_scale,
            "causal": p.mask.causal,
            "window_size": window(p.mask),
            "softcap": p.scores.softcap,
            "num_splits": min(p.hints.num_splits, _MOST_SPLITS) if self.splits else 1,
            "pack_gqa": p.hints.pack_gqa,
            "sm_margin": p.hints.sm_margin,
        }
        if p.mask.attention_chunk:
            arguments["attention_chunk"] = p.mask.attention_chunk
        if p.scores.sinks is not None:
            arguments[self.sinks] = p.scores.sinks
        d = p.descales
        return given(arguments, q_descale=d.q, k_descale=d.k, v_descale=d.v)


@remembered
def _calls(package: Package) -> _Calls:
    module = package.load()
    varlen = package.parameters("flash_attn_varlen_func")
    kvcache = package.parameters("flash_attn_with_kvcache")
    return _Calls(
        kvcache=module.flash_attn_with_kvcache if kvcache else None,
        varlen=module.flash_attn_varlen_func,
        kvcache_out="out" in kvcache,
        varlen_out="out" in varlen,
        varlen_lse=first_of(varlen, "return_softmax_lse", "return_attn_probs") or "",
        sinks=first_of(kvcache | varlen, "sinks", "s_aux", "learnable_sink") or "",
        splits=not _build_flags(package).get("SPLIT"),
    )


PROVIDER = Fa3Provider()
