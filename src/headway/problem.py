"""Problem: one attention call, checked and normalised. It says *what* is computed, never *how*.

The functions of :mod:`headway.interface` put their arguments into one of these; providers read it and
never look at user arguments. Checks that need only shapes, dtypes, strides and devices always run.
Checks that need the *values* of a tensor run where looking costs no device synchronisation (CPU
tensors), and everywhere inside :func:`debug_checks`.
"""

from __future__ import annotations

import contextlib
import contextvars
import enum
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor

from headway import environ
from headway.errors import InvalidInputError
from headway.plan import Plan, PlanKey

FLOAT8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz)
FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

#: Windows and chunks are bounded by this. No sequence is as long, so wider ones are no different, and
#: positions plus a window stay inside the 32 bits that kernels have for them.
WIDEST_WINDOW = 1 << 30

#: ``score_mod(score, b, h, q_idx, kv_idx[, aux])`` and ``mask_mod(b, h, q_idx, kv_idx[, aux])``.
ScoreMod = Callable[..., Any]
MaskMod = Callable[..., Any]

#: Whether this is inside :func:`debug_checks`.
debug_context = contextvars.ContextVar("headway_debug_checks", default=False)


class KVLayout(enum.Enum):
    """How keys and values lie in memory."""

    DENSE = "dense"  # (rows, seqlen, num_kv_heads, head_dim)
    RAGGED = "ragged"  # (total_k, num_kv_heads, head_dim) with cu_seqlens_k
    PAGED = "paged"  # (num_pages, page_size, num_kv_heads, head_dim) with page_table


#: Shapes of keys by layout, as messages say them.
KEY_SHAPES = {
    KVLayout.DENSE: "(batch, seqlen_k, num_kv_heads, head_dim)",
    KVLayout.RAGGED: "(total_k, num_kv_heads, head_dim) with cu_seqlens_k",
    KVLayout.PAGED: "(num_pages, page_size, num_kv_heads, head_dim) with page_table",
}


@dataclass(frozen=True)
class Names:
    """What a caller's function calls the keys, the values and their lengths: messages say the same."""

    k: str = "k"
    v: str = "v"
    seqlens_k: str = "seqused_k / cache_seqlens"


@dataclass(frozen=True)
class Mask:
    """Which keys a query sees. ``causal`` always implies ``window_right == 0``.

    A query at absolute position p sees keys in [p - window_left, p + window_right] (None: unbounded),
    of its own chunk p // attention_chunk (0: no chunks), for which mask_mod is true.
    """

    causal: bool = False
    window_left: int | None = None
    window_right: int | None = None
    attention_chunk: int = 0
    mask_mod: MaskMod | None = None

    @property
    def is_local(self) -> bool:
        """Whether a query's view is bounded by its position on any side (causal alone is not)."""
        right = self.window_right is not None and not self.causal
        return self.window_left is not None or right or self.attention_chunk > 0


@dataclass(frozen=True)
class Scores:
    """How scaled dot products become softmax inputs: scale, softcap, score_mod, and the sinks."""

    softmax_scale: float
    softcap: float = 0.0
    sinks: Tensor | None = None  # (Hq,)
    score_mod: ScoreMod | None = None


@dataclass(frozen=True)
class Descales:
    """Factors, float32 (B, Hkv), that turn stored float8 values back into numbers. None: 1."""

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None


@dataclass(frozen=True)
class Rotary:
    """Rotary embedding applied to appended keys and to queries. cos/sin: (max_pos, rotary_dim / 2)."""

    cos: Tensor
    sin: Tensor
    interleaved: bool
    seqlens: Tensor | None  # (B,) first position of each sequence's new tokens; None: cache_seqlens


@dataclass(frozen=True)
class Append:
    """New keys and values, written behind ``seqlens_k`` in place before attention sees them."""

    k: Tensor  # (B, Snew, Hkv, D), or (total_new, Hkv, D) with cu_seqlens
    v: Tensor
    cu_seqlens: Tensor | None
    rotary: Rotary | None


@dataclass(frozen=True)
class Hints:
    """Wishes about *how*. They change speed and never results, so a provider may overrule them."""

    num_splits: int = 0
    pack_gqa: bool | None = None
    sm_margin: int = 0
    deterministic: bool = False


@dataclass(frozen=True)
class Problem:
    """One attention call. Shapes: B sequences, Hq query heads, Hkv key/value heads, D and Dv head dims."""

    q: Tensor  # (B, Sq, Hq, D) or (total_q, Hq, D)
    k: Tensor
    v: Tensor
    kv_layout: KVLayout
    batch_size: int
    max_seqlen_q: int
    max_seqlen_k: int
    mask: Mask
    scores: Scores
    cu_seqlens_q: Tensor | None = None
    seqused_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    seqlens_k: Tensor | None = None  # (B,) keys present before any append; None: all of them
    leftpad_k: Tensor | None = None
    cache_batch_idx: Tensor | None = None
    page_table: Tensor | None = None
    qv: Tensor | None = None
    append: Append | None = None
    descales: Descales = Descales()
    aux_tensors: tuple[Tensor, ...] = ()
    out: Tensor | None = None
    return_lse: bool = False
    hints: Hints = Hints()
    plan: Plan | None = None
    ver: Literal[3, 4] | None = None
    backend: str | None = None

    @property
    def device(self) -> torch.device:
        return self.q.device

    @property
    def ragged_q(self) -> bool:
        return self.cu_seqlens_q is not None

    @property
    def num_q_heads(self) -> int:
        return self.q.shape[-2]

    @property
    def num_kv_heads(self) -> int:
        return self.k.shape[-2]

    @property
    def head_dim(self) -> int:
        return self.q.shape[-1]

    @property
    def head_dim_v(self) -> int:
        return self.v.shape[-1]

    @property
    def page_size(self) -> int | None:
        return self.k.shape[1] if self.kv_layout is KVLayout.PAGED else None

    @property
    def is_decode(self) -> bool:
        """One query token per sequence, known without looking at lengths."""
        return self.max_seqlen_q == 1

    @cached_property
    def out_dtype(self) -> torch.dtype:
        if self.out is not None:
            return self.out.dtype
        return torch.bfloat16 if self.q.dtype in FLOAT8_DTYPES else self.q.dtype

    @property
    def out_shape(self) -> tuple[int, ...]:
        return (*self.q.shape[:-1], self.head_dim_v)

    @property
    def lse_shape(self) -> tuple[int, ...]:
        if self.ragged_q:
            return (self.num_q_heads, self.q.shape[0])
        return (self.batch_size, self.num_q_heads, self.q.shape[1])

    @property
    def plan_geometry(self) -> tuple[Any, ...]:
        """``plan_key.geometry``: every call of a planned step is compared, so no key is built."""
        mask = self.mask
        return (
            self.device,
            self.batch_size,
            self.max_seqlen_q,
            self.max_seqlen_k,
            self.num_q_heads,
            self.num_kv_heads,
            self.head_dim,
            self.head_dim_v,
            self.page_size,
            mask.causal,
            mask.window_left,
            mask.window_right,
            mask.attention_chunk,
        )

    @property
    def plan_key(self) -> PlanKey:
        """What a schedule for this call depends on."""
        mask, hints, append = self.mask, self.hints, self.append
        new_keys = 0
        if append is not None:
            new_keys = append.k.shape[1] if append.cu_seqlens is None else -1
        return PlanKey(
            device=self.device,
            batch_size=self.batch_size,
            max_seqlen_q=self.max_seqlen_q,
            max_seqlen_k=self.max_seqlen_k,
            num_q_heads=self.num_q_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            head_dim_v=self.head_dim_v,
            page_size=self.page_size,
            causal=mask.causal,
            window_left=mask.window_left,
            window_right=mask.window_right,
            attention_chunk=mask.attention_chunk,
            q_dtype=self.q.dtype,
            kv_dtype=self.k.dtype,
            ragged_q=self.ragged_q,
            new_keys=new_keys,
            num_splits=hints.num_splits,
            pack_gqa=hints.pack_gqa,
            sm_margin=hints.sm_margin,
            softcap=self.scores.softcap,
            softmax_scale=self.scores.softmax_scale,
            has_sinks=self.scores.sinks is not None,
            has_qv=self.qv is not None,
        )

    def of_sequences(self, some: slice) -> Problem:
        """The call for some of its sequences, alone. Its ``out``, its plan, and what mods know as the
        sequence's number stay those of all; so do ragged tensors, of which ends say where each begins."""

        def cut(of_each: Any) -> Any:
            return None if of_each is None else of_each[some]

        def cut_ends(cu_seqlens: Any) -> Any:
            return None if cu_seqlens is None else cu_seqlens[some.start : some.stop + 1]

        by_row = self.kv_layout is KVLayout.DENSE and self.cache_batch_idx is None
        new = self.append
        if new is not None:
            ragged = new.cu_seqlens is not None
            new = Append(
                new.k if ragged else cut(new.k),
                new.v if ragged else cut(new.v),
                cut_ends(new.cu_seqlens),
                new.rotary and replace(new.rotary, seqlens=cut(new.rotary.seqlens)),
            )
        return replace(
            self,
            q=self.q if self.ragged_q else cut(self.q),
            qv=self.qv if self.ragged_q else cut(self.qv),
            k=cut(self.k) if by_row else self.k,
            v=cut(self.v) if by_row else self.v,
            batch_size=len(range(self.batch_size)[some]),
            cu_seqlens_q=cut_ends(self.cu_seqlens_q),
            seqused_q=cut(self.seqused_q),
            cu_seqlens_k=cut_ends(self.cu_seqlens_k),
            seqlens_k=cut(self.seqlens_k),
            leftpad_k=cut(self.leftpad_k),
            cache_batch_idx=cut(self.cache_batch_idx),
            page_table=cut(self.page_table) if self.cache_batch_idx is None else self.page_table,
            append=new,
            descales=Descales(cut(self.descales.q), cut(self.descales.k), cut(self.descales.v)),
        )

    def empty_out(self) -> Tensor:
        """The caller's ``out``, or a new one."""
        if self.out is not None:
            return self.out
        return torch.empty(self.out_shape, dtype=self.out_dtype, device=self.device)

    def empty_lse(self) -> Tensor:
        return torch.empty(self.lse_shape, dtype=torch.float32, device=self.device)


@contextlib.contextmanager
def debug_checks(enabled: bool = True) -> Iterator[None]:
    """Inside this context, also check what only a device synchronisation can see.

    Lengths against capacities, order of cu_seqlens, page numbers against the pool. Slow on a GPU, and
    not allowed under CUDA graph capture. ``HEADWAY_DEBUG_CHECKS=1`` switches it on for a process.
    """
    token = debug_context.set(enabled)
    try:
        yield
    finally:
        debug_context.reset(token)


def values_visible(device: torch.device) -> bool:
    """Whether checks look at the values of tensors on this device."""
    return device.type == "cpu" or debug_context.get() or _checks_everywhere()


def _checks_everywhere() -> bool:
    value = environ.DEBUG_CHECKS.get()
    if value not in (None, "", "0", "1"):
        raise InvalidInputError(environ.DEBUG_CHECKS.name, repr(value), "0 or 1")
    return value == "1"


# --- normalisation of arguments ---------------------------------------------------------------------


def as_int(name: str, value: object, wanted: str) -> int:
    """A plain or numpy integer, or a tensor of one, that is not negative."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise InvalidInputError(name, repr(value), wanted) from None
    if number < 0:
        raise InvalidInputError(name, value, wanted)
    return number


def as_float(name: str, value: Any) -> float:
    """Whatever Python reads as a number."""
    try:
        return float(value)
    except (TypeError, ValueError):
        raise InvalidInputError(name, repr(value), "a number") from None


def normalise_mask(
    causal: bool,
    window_size: Sequence[int | None] | None,
    attention_chunk: int | None,
    mask_mod: MaskMod | None = None,
) -> Mask:
    """One meaning for the window conventions in use: -1 and None are unbounded, per side or for both."""
    if isinstance(causal, Tensor):
        raise InvalidInputError("causal", "a tensor", "True or False, for all sequences")
    if window_size is None:
        window_size = (None, None)
    if not isinstance(window_size, Sequence) or len(window_size) != 2:
        raise InvalidInputError("window_size", window_size, "a pair (left, right)")
    sides: list[int | None] = []
    for side in window_size:
        integral = isinstance(side, Integral) and not isinstance(side, bool)
        if side is not None and (not integral or side < -1):
            wanted = "non-negative integers, -1 or None for unbounded"
            raise InvalidInputError("window_size", tuple(window_size), wanted)
        sides.append(None if side in (None, -1) else min(int(side), WIDEST_WINDOW))
    chunk = as_int("attention_chunk", attention_chunk or 0, "0 (off) or a positive length")
    chunk = min(chunk, WIDEST_WINDOW)
    if mask_mod is not None and not callable(mask_mod):
        raise InvalidInputError("mask_mod", type(mask_mod).__name__, "a callable or None")
    return Mask(bool(causal), sides[0], 0 if causal else sides[1], chunk, mask_mod)


def lengths_as_tensor(
    name: str, lengths: int | Tensor | None, batch_size: int, device: torch.device
) -> Tensor | None:
    """An int length stands for every sequence of the batch."""
    if isinstance(lengths, Integral):
        if not 0 <= lengths <= torch.iinfo(torch.int32).max:
            raise InvalidInputError(name, lengths, "between 0 and the capacity of each sequence")
        return torch.full((batch_size,), int(lengths), dtype=torch.int32, device=device)
    if lengths is not None and not isinstance(lengths, Tensor):
        raise InvalidInputError(name, type(lengths).__name__, "an int or an int32 tensor (B,)")
    return lengths


# --- checks -----------------------------------------------------------------------------------------


def check(problem: Problem, names: Names | None = None) -> Problem:
    """Every check of every argument; returns the problem or raises InvalidInputError."""
    names = names or Names()
    _check_tensors(problem, names)
    _check_queries(problem)
    _check_keys(problem, names)
    _check_heads(problem, names)
    _check_qv(problem)
    _check_scores(problem)
    _check_descales(problem)
    if problem.append is not None:
        _check_append(problem, problem.append)
    _check_out(problem)
    _check_hints(problem)
    if values_visible(problem.device):
        _check_values(problem, names)
    return problem


def _require_tensor(name: str, value: object, wanted: str = "a tensor") -> None:
    if not isinstance(value, Tensor):
        raise InvalidInputError(name, type(value).__name__, wanted)


def _rows_lie_together(t: Tensor) -> bool:
    """Whether elements of the last dimension are behind one another."""
    return t.stride(-1) == 1 or t.shape[-1] <= 1


def _check_tensors(p: Problem, names: Names) -> None:
    for name, tensor in (("q", p.q), (names.k, p.k), (names.v, p.v)):
        _require_tensor(name, tensor)
        if tensor.device != p.q.device:
            raise InvalidInputError(name, tensor.device, f"the device of q, {p.q.device}")
        if not _rows_lie_together(tensor):
            raise InvalidInputError(
                name, f"last-dimension stride {tensor.stride(-1)}", "1 (call .contiguous() on it)"
            )
        if tensor.dtype not in FLOAT_DTYPES and tensor.dtype not in FLOAT8_DTYPES:
            raise InvalidInputError(name, tensor.dtype, "a floating-point or float8 dtype")
    if p.v.dtype != p.k.dtype:
        raise InvalidInputError(names.v, p.v.dtype, f"the dtype of {names.k}, {p.k.dtype}")
    if p.q.dtype != p.k.dtype and not (
        p.k.dtype in FLOAT8_DTYPES and p.q.dtype in (torch.bfloat16, torch.float16, torch.float32)
    ):
        wanted = f"the dtype of {names.k}, {p.k.dtype} (or keys and values float8 beside a wider q)"
        raise InvalidInputError("q", p.q.dtype, wanted)


def _check_int32(name: str, tensor: object, shape: tuple[int | None, ...], p: Problem) -> None:
    text = "(" + ", ".join("any" if n is None else str(n) for n in shape) + ")"
    _require_tensor(name, tensor, f"an int32 tensor of shape {text}")
    assert isinstance(tensor, Tensor)
    if tensor.dtype != torch.int32:
        raise InvalidInputError(name, tensor.dtype, "torch.int32")
    if tensor.device != p.device:
        raise InvalidInputError(name, tensor.device, f"the device of q, {p.device}")
    if tensor.dim() != len(shape) or any(
        want is not None and have != want for have, want in zip(tensor.shape, shape, strict=True)
    ):
        raise InvalidInputError(name, f"shape {tuple(tensor.shape)}", text)
    if not _rows_lie_together(tensor):
        raise InvalidInputError(name, f"last-dimension stride {tensor.stride(-1)}", "1")


def _check_queries(p: Problem) -> None:
    if p.ragged_q:
        if p.q.dim() != 3:
            raise InvalidInputError(
                "q", f"shape {tuple(p.q.shape)}", "(total_q, num_heads, head_dim) with cu_seqlens_q"
            )
        _check_int32("cu_seqlens_q", p.cu_seqlens_q, (p.batch_size + 1,), p)
    elif p.q.dim() != 4:
        raise InvalidInputError(
            "q",
            f"shape {tuple(p.q.shape)}",
            "(batch, seqlen_q, num_heads, head_dim), or three dimensions with cu_seqlens_q",
        )
    if p.seqused_q is not None:
        _check_int32("seqused_q", p.seqused_q, (p.batch_size,), p)
    if p.max_seqlen_q < 0:
        raise InvalidInputError("max_seqlen_q", p.max_seqlen_q, "a non-negative length")


def _check_keys(p: Problem, names: Names) -> None:
    b = p.batch_size
    want_dims = 3 if p.kv_layout is KVLayout.RAGGED else 4
    for name, t in ((names.k, p.k), (names.v, p.v)):
        if t.dim() != want_dims:
            raise InvalidInputError(name, f"shape {tuple(t.shape)}", KEY_SHAPES[p.kv_layout])
    if p.v.shape[:-1] != p.k.shape[:-1]:
        wanted = f"the shape of {names.k}, {tuple(p.k.shape)}, but for head_dim"
        raise InvalidInputError(names.v, f"shape {tuple(p.v.shape)}", wanted)
    if p.kv_layout is KVLayout.RAGGED:
        _check_int32("cu_seqlens_k", p.cu_seqlens_k, (b + 1,), p)
        if p.cache_batch_idx is not None:
            raise InvalidInputError(
                "cache_batch_idx", "a tensor", "None with cu_seqlens_k (it picks cache rows)"
            )
    if p.seqlens_k is not None:
        _check_int32(names.seqlens_k, p.seqlens_k, (b,), p)
    if p.leftpad_k is not None:
        _check_int32("cache_leftpad", p.leftpad_k, (b,), p)
    if p.cache_batch_idx is not None:
        _check_int32("cache_batch_idx", p.cache_batch_idx, (b,), p)
    if p.kv_layout is KVLayout.PAGED:
        rows = None if p.cache_batch_idx is not None else b
        _check_int32("page_table", p.page_table, (rows, None), p)
        if p.k.shape[1] == 0:
            raise InvalidInputError(names.k, "page_size 0", "a page_size of at least 1")
    elif p.kv_layout is KVLayout.DENSE and p.cache_batch_idx is None and p.k.shape[0] != b:
        raise InvalidInputError(
            names.k,
            f"{p.k.shape[0]} rows",
            f"{b}, the batch size of q (or cache_batch_idx, or page_table)",
        )


def _check_heads(p: Problem, names: Names) -> None:
    if p.q.shape[-1] != p.k.shape[-1]:
        wanted = f"that of {names.k}, {p.k.shape[-1]}"
        raise InvalidInputError("q", f"head_dim {p.head_dim}", wanted)
    for name, t in (("q", p.q), (names.k, p.k), (names.v, p.v)):
        if 0 in t.shape[-2:]:
            wanted = "at least one head, at least 1 wide"
            raise InvalidInputError(name, f"shape {tuple(t.shape)}", wanted)
    if p.num_q_heads % p.num_kv_heads:
        raise InvalidInputError(
            "q", f"{p.num_q_heads} heads", f"a multiple of the {p.num_kv_heads} key/value heads"
        )


def _check_qv(p: Problem) -> None:
    if p.qv is None:
        return
    _require_tensor("qv", p.qv)
    want = (*p.q.shape[:-1], p.head_dim_v)
    if tuple(p.qv.shape) != want:
        raise InvalidInputError(
            "qv", f"shape {tuple(p.qv.shape)}", f"{want}, q's with v's head_dim"
        )
    if p.qv.dtype != p.q.dtype or p.qv.device != p.device:
        raise InvalidInputError(
            "qv", f"{p.qv.dtype} on {p.qv.device}", f"q's {p.q.dtype} on {p.device}"
        )
    if not _rows_lie_together(p.qv):
        given = f"last-dimension stride {p.qv.stride(-1)}"
        raise InvalidInputError("qv", given, "1 (call .contiguous() on it)")


def _check_scores(p: Problem) -> None:
    s = p.scores
    if not math.isfinite(s.softmax_scale):
        raise InvalidInputError("softmax_scale", s.softmax_scale, "a finite number")
    if not 0 <= s.softcap <= torch.finfo(torch.float32).max:
        raise InvalidInputError("softcap", s.softcap, "0 (off) or a positive float32 number")
    if s.score_mod is not None and not callable(s.score_mod):
        raise InvalidInputError("score_mod", type(s.score_mod).__name__, "a callable or None")
    if s.sinks is not None:
        _require_tensor("sinks", s.sinks, f"a tensor of shape ({p.num_q_heads},)")
        if tuple(s.sinks.shape) != (p.num_q_heads,):
            raise InvalidInputError(
                "sinks", f"shape {tuple(s.sinks.shape)}", f"({p.num_q_heads},), one per query head"
            )
        if s.sinks.dtype not in FLOAT_DTYPES or s.sinks.device != p.device:
            raise InvalidInputError(
                "sinks", f"{s.sinks.dtype} on {s.sinks.device}", f"a float dtype on {p.device}"
            )
        if not _rows_lie_together(s.sinks):
            raise InvalidInputError("sinks", f"stride {s.sinks.stride(0)}", "1")
    for i, aux in enumerate(p.aux_tensors):
        _require_tensor(f"aux_tensors[{i}]", aux, f"a tensor on {p.device}")
        if aux.device != p.device:
            wanted = f"the device of q, {p.device}"
            raise InvalidInputError(f"aux_tensors[{i}]", aux.device, wanted)
    if p.aux_tensors and s.score_mod is None and p.mask.mask_mod is None:
        raise InvalidInputError("aux_tensors", "tensors", "a score_mod or mask_mod that uses them")


def _check_descales(p: Problem) -> None:
    want = (p.batch_size, p.num_kv_heads)
    for name, t, of in (
        ("q", p.descales.q, p.q),
        ("v", p.descales.v, p.v),  # before k's, which it is itself with only_qv
        ("k", p.descales.k, p.k),
    ):
        if t is None:
            continue
        if of.dtype not in FLOAT8_DTYPES:
            raise InvalidInputError(
                f"{name}_descale",
                f"a tensor beside {name} of {of.dtype}",
                f"None unless {name} is float8",
            )
        _require_tensor(f"{name}_descale", t, f"a float32 tensor of shape {want}")
        if t.dtype != torch.float32 or tuple(t.shape) != want or t.device != p.device:
            raise InvalidInputError(
                f"{name}_descale",
                f"{t.dtype} {tuple(t.shape)} on {t.device}",
                f"float32 {want}, (batch, num_kv_heads), on {p.device}; expand() a scalar to it",
            )


def _check_append(p: Problem, a: Append) -> None:
    if p.kv_layout is KVLayout.RAGGED:
        raise InvalidInputError("k", "new tokens beside ragged k_cache", "a dense or paged cache")
    if p.seqlens_k is None:
        raise InvalidInputError("cache_seqlens", None, "given when k and v are appended")
    for name, cache in (("k_cache", p.k), ("v_cache", p.v)):
        rows = zip(cache.shape[:3], cache.stride(), strict=False)
        if any(n > 1 and step == 0 for n, step in rows):
            wanted = "memory of its own for every row that is written (it looks expanded)"
            raise InvalidInputError(name, f"strides {cache.stride()} with new k and v", wanted)
    for name, t, dim in (("k", a.k, p.head_dim), ("v", a.v, p.head_dim_v)):
        _require_tensor(name, t)
        if a.cu_seqlens is not None:
            want: tuple[int, ...] = (a.k.shape[0], p.num_kv_heads, dim)
        else:
            want = (p.batch_size, a.k.shape[1] if a.k.dim() > 1 else 0, p.num_kv_heads, dim)
        if tuple(t.shape) != want:
            raise InvalidInputError(name, f"shape {tuple(t.shape)}", f"{want} for the new tokens")
        if t.device != p.device or not _rows_lie_together(t):
            raise InvalidInputError(
                name, f"{t.device}, strides {t.stride()}", f"{p.device}, last 1"
            )
        if t.dtype != p.k.dtype and not (p.k.dtype in FLOAT8_DTYPES and t.dtype in FLOAT_DTYPES):
            raise InvalidInputError(
                name,
                t.dtype,
                f"the dtype of the cache, {p.k.dtype} (float8 caches quantise wider ones)",
            )
    if a.cu_seqlens is not None:
        _check_int32("cu_seqlens_k_new", a.cu_seqlens, (p.batch_size + 1,), p)
    if a.rotary is not None:
        _check_rotary(p, a.rotary)


def _check_rotary(p: Problem, r: Rotary) -> None:
    for name, t in (("rotary_cos", r.cos), ("rotary_sin", r.sin)):
        if not isinstance(t, Tensor) or t.dim() != 2 or t.shape != r.cos.shape:
            raise InvalidInputError(
                name, getattr(t, "shape", t), "(max_position, rotary_dim / 2), cos and sin alike"
            )
        fits = t.device == p.device and t.dtype in FLOAT_DTYPES
        if not (fits and _rows_lie_together(t)):
            raise InvalidInputError(
                name,
                f"{t.dtype} on {t.device}, strides {t.stride()}",
                f"a float dtype on {p.device}",
            )
    rotary_dim = 2 * r.cos.shape[1]
    if rotary_dim > p.head_dim:
        raise InvalidInputError(
            "rotary_cos", f"rotary_dim {rotary_dim}", f"at most head_dim, {p.head_dim}"
        )
    if r.seqlens is not None:
        _check_int32("rotary_seqlens", r.seqlens, (p.batch_size,), p)


def _check_out(p: Problem) -> None:
    if p.out is None:
        return
    _require_tensor("out", p.out, f"a tensor of shape {p.out_shape}")
    if tuple(p.out.shape) != p.out_shape:
        raise InvalidInputError("out", f"shape {tuple(p.out.shape)}", str(p.out_shape))
    if p.out.device != p.device or not _rows_lie_together(p.out):
        raise InvalidInputError(
            "out",
            f"{p.out.device}, strides {p.out.stride()}",
            f"{p.device}, last-dimension stride 1",
        )
    if any(n > 1 and step == 0 for n, step in zip(p.out.shape, p.out.stride(), strict=True)):
        wanted = "rows of its own for every query and head (it looks expanded)"
        raise InvalidInputError("out", f"strides {p.out.stride()}", wanted)
    if p.out.dtype not in FLOAT_DTYPES:
        raise InvalidInputError("out", p.out.dtype, "a 16-, 32- or 64-bit floating-point dtype")


def _check_hints(p: Problem) -> None:
    as_int("num_splits", p.hints.num_splits, "0 (automatic) or a positive count")
    as_int("sm_margin", p.hints.sm_margin, "0 or more multiprocessors")
    if p.ver not in (None, 3, 4):
        raise InvalidInputError("ver", repr(p.ver), "3, 4, or None for the fastest")
    if p.backend is not None and not isinstance(p.backend, str):
        raise InvalidInputError("backend", repr(p.backend), "the name of a provider, or None")
    if p.plan is not None and p.plan.key.geometry != p.plan_geometry:
        differences = p.plan.key.differences(p.plan_key)
        raise InvalidInputError(
            "scheduler_metadata",
            "a plan made for another call: " + ", ".join(differences),
            "the result of get_scheduler_metadata with this call's arguments",
        )


# --- checks of values ---------------------------------------------------------------------------------


def _check_values(p: Problem, names: Names) -> None:
    if p.cu_seqlens_q is not None:
        _check_cu_seqlens("cu_seqlens_q", p.cu_seqlens_q, p.q.shape[0])
    if p.cu_seqlens_k is not None:
        _check_cu_seqlens("cu_seqlens_k", p.cu_seqlens_k, p.k.shape[0])
    if p.append is not None and p.append.cu_seqlens is not None:
        _check_cu_seqlens("cu_seqlens_k_new", p.append.cu_seqlens, p.append.k.shape[0])
    if p.seqused_q is not None:
        rows = _row_capacity(p.cu_seqlens_q, p.q, p)
        if bool(((p.seqused_q > rows) | (p.seqused_q < 0)).any()):
            wanted = f"between 0 and the rows of q, {rows.tolist()}"
            raise InvalidInputError("seqused_q", p.seqused_q.tolist(), wanted)
    longest = int(query_lengths(p).max()) if p.batch_size else 0
    if longest > p.max_seqlen_q:
        raise InvalidInputError("max_seqlen_q", p.max_seqlen_q, f"at least {longest}")
    _check_key_values(p, names)
    sinks = p.scores.sinks
    if sinks is not None and not bool(sinks.max() < math.inf):
        wanted = "finite numbers, or -inf for a head without one"
        raise InvalidInputError("sinks", sinks.tolist(), wanted)
    if p.append is not None and p.append.rotary is not None:
        _check_rotary_positions(p, p.append.rotary)


def _check_cu_seqlens(name: str, cu: Tensor, total: int) -> None:
    values = cu.tolist()
    if values[0] != 0 or any(a > b for a, b in itertools.pairwise(values)):
        raise InvalidInputError(name, values, "0 first, then never decreasing")
    if values[-1] > total:
        raise InvalidInputError(
            name, f"last value {values[-1]}", f"at most the {total} rows there are"
        )


def _row_capacity(cu: Tensor | None, t: Tensor, p: Problem) -> Tensor:
    if cu is not None:
        return cu[1:] - cu[:-1]
    return torch.full((p.batch_size,), t.shape[1], dtype=torch.int32, device=p.device)


def query_lengths(p: Problem) -> Tensor:
    """(B,) int32, on the problem's device: query rows in use per sequence."""
    return p.seqused_q if p.seqused_q is not None else _row_capacity(p.cu_seqlens_q, p.q, p)


def append_lengths(p: Problem) -> Tensor | None:
    """(B,) int32: new tokens per sequence, or None where nothing is appended."""
    return None if p.append is None else _row_capacity(p.append.cu_seqlens, p.append.k, p)


def key_ends(p: Problem) -> Tensor:
    """(B,) int32: first row, within a sequence's own KV rows, behind the last valid key."""
    if p.seqlens_k is not None:
        new = append_lengths(p)
        return p.seqlens_k if new is None else p.seqlens_k + new
    if p.kv_layout is KVLayout.PAGED:
        assert p.page_table is not None
        rows = p.page_table.shape[1] * p.k.shape[1]
        return torch.full((p.batch_size,), rows, dtype=torch.int32, device=p.device)
    return _row_capacity(p.cu_seqlens_k, p.k, p)


def _check_rotary_positions(p: Problem, r: Rotary) -> None:
    """The tables hold every position that is looked up."""
    new, queries = append_lengths(p), query_lengths(p)
    assert p.seqlens_k is not None
    assert new is not None
    first = p.seqlens_k if r.seqlens is None else r.seqlens
    if not (p.mask.causal or p.mask.is_local):
        queries = queries.clamp(max=1)  # all at the first position
    steps = torch.maximum(new, queries)
    ends = torch.where(steps > 0, first + steps, 0)
    if bool((torch.where(steps > 0, first, 0) < 0).any()):
        raise InvalidInputError("rotary_seqlens", first.tolist(), "positions from 0 on")
    longest = int(ends.max()) if p.batch_size else 0
    if longest > r.cos.shape[0]:
        raise InvalidInputError(
            "rotary_cos", f"{r.cos.shape[0]} positions", f"at least {longest}, for the new tokens"
        )


def _check_key_values(p: Problem, names: Names) -> None:
    ends = key_ends(p)
    if p.kv_layout is KVLayout.PAGED:
        assert p.page_table is not None
        capacity = torch.full_like(ends, p.page_table.shape[1] * p.k.shape[1])
    else:
        capacity = _row_capacity(p.cu_seqlens_k, p.k, p)
    if bool((ends > capacity).any()) or bool((ends < 0).any()):
        raise InvalidInputError(
            names.seqlens_k,
            f"keys up to {ends.tolist()} (appended ones included)",
            f"between 0 and the capacity of each sequence, {capacity.tolist()}",
        )
    longest = int(ends.max()) if p.batch_size else 0
    if longest > p.max_seqlen_k:
        raise InvalidInputError("max_seqlen_k", p.max_seqlen_k, f"at least {longest}")
    if p.leftpad_k is not None and bool(((p.leftpad_k < 0) | (p.leftpad_k > ends)).any()):
        raise InvalidInputError(
            "cache_leftpad", p.leftpad_k.tolist(), "between 0 and cache_seqlens"
        )
    if p.cache_batch_idx is not None:
        rows = p.page_table.shape[0] if p.page_table is not None else p.k.shape[0]
        if bool(((p.cache_batch_idx < 0) | (p.cache_batch_idx >= rows)).any()):
            raise InvalidInputError(
                "cache_batch_idx", p.cache_batch_idx.tolist(), f"rows 0 to {rows - 1}"
            )
    if p.page_table is not None:
        _check_page_numbers(p, p.page_table, ends)


def _check_page_numbers(p: Problem, table: Tensor, ends: Tensor) -> None:
    if p.cache_batch_idx is not None:
        table = table.index_select(0, p.cache_batch_idx)
    page_size, num_pages = p.k.shape[1], p.k.shape[0]
    column = torch.arange(table.shape[1], dtype=torch.int32, device=p.device)
    first = p.leftpad_k // page_size if p.leftpad_k is not None else torch.zeros_like(ends)
    used = (column >= first[:, None]) & (column * page_size < ends[:, None])
    if bool((used & ((table < 0) | (table >= num_pages))).any()):
        bad = table[used & ((table < 0) | (table >= num_pages))]
        raise InvalidInputError("page_table", f"page {int(bad[0])}", f"pages 0 to {num_pages - 1}")
