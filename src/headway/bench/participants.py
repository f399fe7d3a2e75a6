"""Who takes part in ``headway bench attention``: Headway's providers, and packages of other people.

All participants of a case share its tensors. A participant is made once, planning included, and then
called with the number of the set of keys and values to read; one that cannot take part says why.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import headway
from headway import providers
from headway.bench.cases import DTYPES, Case
from headway.errors import InvalidInputError, UnsupportedError
from headway.plan import Plan, PlanKey

#: Runs the case on its i-th set of keys and values; the output, alone or first of several.
Call = Callable[[int], Any]

#: Caches of a decode case are as many sets as read this much, so that none is found in the L2 cache.
ROTATE_BYTES = 256 << 20

#: Sets of keys and values at most.
MOST_SETS = 8

#: Each sequence's keys begin at a multiple of this many rows, so that they are pages of any size.
_ROOM = 256


@dataclass(frozen=True)
class Inputs:
    """Tensors of a case. Keys lie packed, sequence behind sequence, ``rows`` rows apart at ``starts``;
    page tables give each sequence rows of any other: pages are in random order."""

    case: Case
    q: Tensor  # (total_q, Hq, D)
    sets: tuple[tuple[Tensor, Tensor], ...]  # (k, v): (rows, Hkv, D or Dv)
    cu_seqlens_q: Tensor  # (B + 1,) int32
    starts: Tensor  # (B + 1,) int32: first row of each sequence's keys
    seqlens_k: Tensor  # (B,) int32
    page_table: Tensor | None  # (B, max_pages) int32, pages of case.page_size

    @property
    def device(self) -> torch.device:
        return self.q.device

    @property
    def max_seqlen_q(self) -> int:
        return max(self.case.seqlens_q)

    @property
    def max_seqlen_k(self) -> int:
        return max(self.case.seqlens_k)

    @functools.cached_property
    def q_rows(self) -> Tensor:
        """(B, Sq, Hq, D), where all sequences are alike."""
        return self.q.view(self.case.batch_size, self.max_seqlen_q, *self.q.shape[1:])

    def rows(self, i: int) -> tuple[Tensor, Tensor]:
        """Keys and values as (B, rows, Hkv, D or Dv), where all sequences are alike."""
        return self._cut(i, (self.case.batch_size, -1))

    def pages(self, i: int, size: int) -> tuple[Tensor, Tensor]:
        """Keys and values as pages of ``size``, a divisor of 256."""
        return self._cut(i, (-1, size))

    def _cut(self, i: int, sizes: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Made once: a call's host time is not to be that of views."""
        if (i, sizes) not in self._views:
            k, v = self.sets[i]
            k = k.unflatten(0, sizes)
            v = k[..., : v.shape[-1]] if self.case.latent else v.unflatten(0, sizes)
            self._views[i, sizes] = k, v
        return self._views[i, sizes]

    @functools.cached_property
    def _views(self) -> dict[tuple[int, tuple[int, int]], tuple[Tensor, Tensor]]:
        return {}

    def table_in_order(self, size: int) -> Tensor:
        """The page table that reads keys where they lie."""
        first = self.starts[:-1] // size
        count = -(-self.max_seqlen_k // size)
        table = first[:, None] + torch.arange(count, device=self.device, dtype=torch.int32)
        return table.clamp(max=self.sets[0][0].shape[0] // size - 1).contiguous()

    def descales(self, names: str) -> dict[str, Tensor]:
        """Descales of 1 for those of q, k, v that are float8."""
        one = torch.ones((), device=self.device)
        dtypes = {"q": self.case.dtype, "k": self.case.kv_dtype, "v": self.case.kv_dtype}
        shape = self.case.batch_size, self.case.heads_kv
        return {f"{n}_descale": one.expand(shape) for n in names if dtypes[n] == "fp8"}


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Fresh random tensors."""

    def normal(*shape: int, dtype: str) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16).to(DTYPES[dtype])

    def cumulative(lengths: Sequence[int]) -> Tensor:
        ends = [0, *itertools.accumulate(lengths)]
        return torch.tensor(ends, dtype=torch.int32, device=device)

    room = [-(-n // _ROOM) * _ROOM if case.page_size else n for n in case.seqlens_k]
    count = max(1, -(-ROTATE_BYTES // case.kv_bytes)) if case.kind == "decode" else 1
    sets = []
    for _ in range(min(count, MOST_SETS)):
        k = normal(sum(room), case.heads_kv, case.head_dim, dtype=case.kv_dtype)
        if case.latent:
            sets.append((k, k[..., : case.head_dim_v]))
        else:
            v = normal(sum(room), case.heads_kv, case.head_dim_v, dtype=case.kv_dtype)
            sets.append((k, v))
    return Inputs(
        case=case,
        q=normal(sum(case.seqlens_q), case.heads_q, case.head_dim, dtype=case.dtype),
        sets=tuple(sets),
        cu_seqlens_q=cumulative(case.seqlens_q),
        starts=cumulative(room),
        seqlens_k=torch.tensor(case.seqlens_k, dtype=torch.int32, device=device),
        page_table=_shuffled_pages(case, sum(room), device) if case.page_size else None,
    )


def _shuffled_pages(case: Case, rows: int, device: torch.device) -> Tensor:
    counts = [-(-n // case.page_size) for n in case.seqlens_k]
    order = torch.randperm(rows // case.page_size, device=device).to(torch.int32)
    table = order.new_zeros(case.batch_size, max(counts))
    for mine, pages in zip(table, order[: sum(counts)].split(counts), strict=True):
        mine[: len(pages)] = pages
    return table


# --- Headway --------------------------------------------------------------------------------------------


def provider_call(inputs: Inputs, name: str, plan: Plan | None = None) -> Call:
    """A provider through Headway's own interface."""
    case = inputs.case
    window = (case.window_left, 0 if case.causal and case.window_left >= 0 else -1)
    common: dict[str, Any] = {"causal": case.causal, "window_size": window, "backend": name}
    common |= inputs.descales("qkv")
    if case.page_size:
        return lambda i: headway.flash_attn_with_kvcache(
            inputs.q_rows,
            *inputs.pages(i, case.page_size),
            cache_seqlens=inputs.seqlens_k,
            page_table=inputs.page_table,
            scheduler_metadata=plan,
            **common,
        )
    if case.is_uniform:
        return lambda i: headway.flash_attn_func(inputs.q_rows, *inputs.rows(i), **common)
    return lambda i: headway.flash_attn_varlen_func(
        inputs.q,
        *inputs.sets[i],
        cu_seqlens_q=inputs.cu_seqlens_q,
        cu_seqlens_k=inputs.starts,
        max_seqlen_q=inputs.max_seqlen_q,
        max_seqlen_k=inputs.max_seqlen_k,
        **common,
    )


def planned_call(inputs: Inputs, name: str) -> Call:
    """A provider's call; decode by a plan made before, if it makes plans."""
    return provider_call(inputs, name, make_plan(inputs, name))


def make_plan(inputs: Inputs, name: str) -> Plan | None:
    """The plan of a provider for a case; None for prefill, and for those that take none."""
    case = inputs.case
    if case.kind == "prefill" or inputs.page_table is None:
        return None
    key = PlanKey(
        device=inputs.device,
        batch_size=case.batch_size,
        max_seqlen_q=inputs.max_seqlen_q,
        max_seqlen_k=inputs.page_table.shape[1] * case.page_size,
        num_q_heads=case.heads_q,
        num_kv_heads=case.heads_kv,
        head_dim=case.head_dim,
        head_dim_v=case.head_dim_v,
        page_size=case.page_size,
        causal=case.causal,
        window_left=case.window_left if case.window_left >= 0 else None,
        window_right=0 if case.causal else None,
        attention_chunk=0,
    )
    try:
        return providers.get(name).plan(key, inputs.seqlens_k, kv_dtype=DTYPES[case.kv_dtype])
    except NotImplementedError:
        return None


# --- peers ----------------------------------------------------------------------------------------------


def _needs_half(case: Case) -> None:
    if "fp8" in (case.dtype, case.kv_dtype):
        raise UnsupportedError("takes 16-bit tensors")


def fa3_call(inputs: Inputs) -> Call:
    """FlashAttention 3 from the package fa3-fwd; its build has no pages, so caches are packed.

    Steps are planned before, as its get_scheduler_metadata does.
    """
    fa3 = importlib.import_module("fa3_fwd_interface")
    case = inputs.case
    if case.window_left >= 0 or case.dtype != case.kv_dtype:
        raise UnsupportedError("this build has no windows or mixed dtypes")
    common: dict[str, Any] = {"causal": case.causal, **inputs.descales("qkv")}
    if case.latent:
        return _fa3_latent(inputs, fa3, common)
    if case.page_size and case.is_uniform:
        metadata = fa3.get_scheduler_metadata(
            case.batch_size,
            inputs.max_seqlen_q,
            inputs.rows(0)[0].shape[1],
            case.heads_q,
            case.heads_kv,
            case.head_dim,
            inputs.seqlens_k,
            qkv_dtype=DTYPES[case.dtype],
            headdim_v=case.head_dim_v,
            causal=case.causal,
        )
        common |= {"cache_seqlens": inputs.seqlens_k, "scheduler_metadata": metadata}
        return lambda i: fa3.flash_attn_with_kvcache(inputs.q_rows, *inputs.rows(i), **common)
    if case.is_uniform:
        return lambda i: fa3.flash_attn_func(inputs.q_rows, *inputs.rows(i), **common)
    lengths = {"seqused_k": inputs.seqlens_k} if case.page_size else {}
    if case.kind == "decode":
        common["num_splits"] = 0  # as many as it finds best
    return lambda i: fa3.flash_attn_varlen_func(
        inputs.q,
        *inputs.sets[i],
        inputs.cu_seqlens_q,
        inputs.starts,
        inputs.max_seqlen_q,
        inputs.max_seqlen_k,
        **lengths,
        **common,
    )


def _fa3_latent(inputs: Inputs, fa3: Any, common: dict[str, Any]) -> Call:
    """Absorbed MLA: rope parts as q and k, latent parts as qv and v."""
    case, at = inputs.case, inputs.case.head_dim_v
    q = inputs.q_rows
    common |= {"qv": q[..., :at], "softmax_scale": case.head_dim**-0.5}
    common["cache_seqlens"] = inputs.seqlens_k

    def run(i: int) -> Any:
        k, v = inputs.rows(i)
        return fa3.flash_attn_with_kvcache(q[..., at:], k[..., at:], v, **common)

    return run


def vllm_call(inputs: Inputs) -> Call:
    """FlashAttention 3 as vLLM builds and calls it: the same pages as Headway, steps planned before."""
    fa3 = importlib.import_module("vllm.vllm_flash_attn.flash_attn_interface")
    case = inputs.case
    if not case.page_size:
        raise UnsupportedError("compared over pages: without, it is FlashAttention 3's own")
    if case.dtype != case.kv_dtype:
        raise UnsupportedError("has no mixed dtypes")
    window = [case.window_left, 0 if case.causal else -1]
    common: dict[str, Any] = {
        "max_seqlen_q": inputs.max_seqlen_q,
        "cu_seqlens_q": inputs.cu_seqlens_q,
        "max_seqlen_k": inputs.max_seqlen_k,
        "seqused_k": inputs.seqlens_k,
        "block_table": inputs.page_table,
        "softmax_scale": case.head_dim**-0.5,
        "causal": case.causal,
        "window_size": window,
        "fa_version": 3,
        **inputs.descales("qkv"),
    }
    if case.latent:
        return _vllm_latent(inputs, fa3, common)
    common["scheduler_metadata"] = fa3.get_scheduler_metadata(
        case.batch_size,
        inputs.max_seqlen_q,
        inputs.max_seqlen_k,
        case.heads_q,
        case.heads_kv,
        case.head_dim,
        inputs.seqlens_k,
        qkv_dtype=DTYPES[case.dtype],
        headdim_v=case.head_dim_v,
        cu_seqlens_q=inputs.cu_seqlens_q,
        page_size=case.page_size,
        causal=case.causal,
        window_size=window,
    )
    return lambda i: fa3.flash_attn_varlen_func(
        inputs.q, *inputs.pages(i, case.page_size), **common
    )


def _vllm_latent(inputs: Inputs, fa3: Any, common: dict[str, Any]) -> Call:
    """Absorbed MLA, not planned: rope parts as q and k, latent parts as q_v and v."""
    case, at = inputs.case, inputs.case.head_dim_v
    common["q_v"] = inputs.q[..., :at]

    def run(i: int) -> Any:
        k, v = inputs.pages(i, case.page_size)
        return fa3.flash_attn_varlen_func(inputs.q[..., at:], k[..., at:], v, **common)

    return run


def fa4_call(inputs: Inputs) -> Call:
    """FlashAttention 4; caches as pages of 128, in order."""
    fa4 = importlib.import_module("flash_attn.cute")
    case = inputs.case
    _needs_half(case)
    if case.latent:
        raise UnsupportedError("no absorbed MLA on this device")
    window = (case.window_left, 0) if case.window_left >= 0 else (None, None)
    common: dict[str, Any] = {"causal": case.causal, "window_size": window}
    if not case.page_size and case.is_uniform:
        return lambda i: fa4.flash_attn_func(inputs.q_rows, *inputs.rows(i), **common)
    common |= {"cu_seqlens_q": inputs.cu_seqlens_q, "max_seqlen_q": inputs.max_seqlen_q}
    common["max_seqlen_k"] = inputs.max_seqlen_k
    if not case.page_size:
        common["cu_seqlens_k"] = inputs.starts
        return lambda i: fa4.flash_attn_varlen_func(inputs.q, *inputs.sets[i], **common)
    common |= {"seqused_k": inputs.seqlens_k, "page_table": inputs.table_in_order(128)}
    return lambda i: fa4.flash_attn_varlen_func(inputs.q, *inputs.pages(i, 128), **common)


def flashinfer_call(inputs: Inputs) -> Call:
    """FlashInfer: its FA3 kernels for prefill, its tensor-core decode (FA2 kernels), same pages."""
    case = inputs.case
    if case.latent or case.dtype == "fp8":
        raise UnsupportedError("not compared: absorbed MLA and float8 queries")
    if case.page_size:
        return _flashinfer_paged(inputs)
    flashinfer = importlib.import_module("flashinfer")
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(
        _workspace(inputs.device), "NHD", backend="fa3"
    )
    wrapper.plan(
        inputs.cu_seqlens_q,
        inputs.starts,
        case.heads_q,
        case.heads_kv,
        case.head_dim,
        head_dim_vo=case.head_dim_v,
        causal=case.causal,
        window_left=case.window_left,
        q_data_type=DTYPES[case.dtype],
    )
    return lambda i: wrapper.run(inputs.q, *inputs.sets[i])


def _flashinfer_paged(inputs: Inputs) -> Call:
    flashinfer = importlib.import_module("flashinfer")
    case, table = inputs.case, inputs.page_table
    assert table is not None
    counts = -(-inputs.seqlens_k // case.page_size)
    used = torch.arange(table.shape[1], device=inputs.device) < counts[:, None]
    ends = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    last = (inputs.seqlens_k - 1) % case.page_size + 1
    heads = case.heads_q, case.heads_kv, case.head_dim, case.page_size
    common: dict[str, Any] = {
        "q_data_type": DTYPES[case.dtype],
        "kv_data_type": DTYPES[case.kv_dtype],
        "window_left": case.window_left,
    }
    workspace = _workspace(inputs.device)
    if inputs.max_seqlen_q == 1:
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "NHD", use_tensor_cores=True, backend="fa2"
        )
        wrapper.plan(ends, table[used], last, *heads, **common)
    else:
        backend = "fa3" if case.kind == "prefill" else "fa2"
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend=backend)
        common["causal"] = case.causal
        wrapper.plan(inputs.cu_seqlens_q, ends, table[used], last, *heads, **common)
    return lambda i: wrapper.run(inputs.q, inputs.pages(i, case.page_size))


def _workspace(device: torch.device) -> Tensor:
    return torch.empty(512 << 20, dtype=torch.uint8, device=device)


def cudnn_call(inputs: Inputs) -> Call:
    """cuDNN through torch's scaled_dot_product_attention."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    case = inputs.case
    _needs_half(case)
    square = case.seqlens_q == case.seqlens_k and case.is_uniform
    if not square or case.page_size or case.window_left >= 0:
        raise UnsupportedError("compared on dense squares alone")
    q = inputs.q_rows.transpose(1, 2)

    def run(i: int) -> Tensor:
        k, v = (t.transpose(1, 2) for t in inputs.rows(i))
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=case.causal, enable_gqa=case.heads_q != case.heads_kv
            )
        return out.transpose(1, 2)

    return run


@dataclass(frozen=True)
class Peer:
    """A package: the module it needs, and what makes its call."""

    module: str
    make: Callable[[Inputs], Call]
    packed: bool = False  # reads keys where they lie, page table or not


PEERS: dict[str, Peer] = {
    "fa3": Peer("fa3_fwd_interface", fa3_call, packed=True),
    "vllm": Peer("vllm.vllm_flash_attn", vllm_call),
    "fa4": Peer("flash_attn.cute", fa4_call, packed=True),
    "flashinfer": Peer("flashinfer", flashinfer_call),
    "cudnn": Peer("torch", cudnn_call),
}


@functools.cache
def installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def requested_peers(text: str) -> list[str]:
    """The peers named, with commas, or with ``all`` those that are installed."""
    wanted = [name for name in text.split(",") if name]
    if wanted == ["all"]:
        return [name for name, peer in PEERS.items() if installed(peer.module)]
    if unknown := [name for name in wanted if name not in PEERS]:
        raise InvalidInputError("peers", unknown, f"of {', '.join(PEERS)}")
    if absent := [name for name in wanted if not installed(PEERS[name].module)]:
        raise InvalidInputError("peers", absent, "installed packages")
    return wanted


def makers(inputs: Inputs, names: Sequence[str], peers: Sequence[str]) -> dict[str, Any]:
    """What makes the call of each participant, by its name; ``NAME:unplanned`` plans in every call."""
    made: dict[str, Callable[[], Call]] = {}
    for name in names:
        backend, _, option = name.partition(":")
        make = provider_call if option == "unplanned" else planned_call
        made[name] = functools.partial(make, inputs, backend)
    for name in peers:
        made[name] = functools.partial(PEERS[name].make, inputs)
    return made


# --- right or wrong ---------------------------------------------------------------------------------


def error_over_bound(inputs: Inputs, out: Tensor, packed: bool = False, samples: int = 24) -> float:
    """The error of some rows of a result for the first set of keys, as a part of what is allowed.

    ``packed``: the result is of keys where they lie, not of those that the page table names.

    Against float64, relative to the error that plain torch makes on the same rows in the same precision:
    ``max|out - ref| <= 2 * max|torch - ref| + 2 * max|(ref + 0.3 - 0.3) - ref|``. 1 is just allowed.
    """
    case = inputs.case
    out = out.reshape(inputs.q.shape[0], case.heads_q, case.head_dim_v)
    generator = torch.Generator().manual_seed(0)

    def drawn(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    errors, rounding, steps = [], [], []
    for _ in range(samples):
        b, head = drawn(case.batch_size), drawn(case.heads_q)
        row = drawn(case.seqlens_q[b])
        exact, plain = _row(inputs, b, row, head, packed)
        got = out[int(inputs.cu_seqlens_q[b]) + row, head]
        rounded = exact.to(out.dtype)
        errors.append((got.double() - exact).abs().max())
        rounding.append((plain.double() - exact).abs().max())
        steps.append((rounded + 0.3 - 0.3 - rounded).abs().max().double())
    allowed = 2 * torch.stack(rounding).max() + 2 * torch.stack(steps).max()
    return float(torch.stack(errors).max() / allowed)


def _row(inputs: Inputs, b: int, row: int, head: int, packed: bool) -> tuple[Tensor, Tensor]:
    """One row of the result: in float64, and by plain torch in 16 bits."""
    case = inputs.case
    kv_head = head // (case.heads_q // case.heads_kv)
    length = case.seqlens_k[b]
    position = row + length - case.seqlens_q[b]
    last = position + 1 if case.causal else length
    first = max(0, position - case.window_left) if case.window_left >= 0 else 0
    at = torch.arange(first, last, device=inputs.device)
    if inputs.page_table is not None and not packed:
        page = inputs.page_table[b, at // case.page_size].long()
        at = page * case.page_size + at % case.page_size
    else:
        at = at + int(inputs.starts[b])
    q = inputs.q[int(inputs.cu_seqlens_q[b]) + row, head]
    k, v = (t[at, kv_head] for t in inputs.sets[0])
    dtype = DTYPES[case.dtype] if case.dtype != "fp8" else torch.bfloat16

    def attend(dtype: torch.dtype) -> Tensor:
        scores = (k.to(dtype) @ q.to(dtype)) * case.head_dim**-0.5
        return scores.softmax(0) @ v.to(dtype)

    return attend(torch.float64), attend(dtype)
