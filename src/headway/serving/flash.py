"""FlashAttentionBackend: softmax attention over paged keys and values, through Headway's providers.

Covers full, sliding and chunked layers, sinks, softcap, and float8 caches. New keys and values are written
either by the provider that attends, in one call, or by one kernel before a call that only reads. That
kernel also normalises and rotates, for every provider alike, whatever it can do itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from headway import dispatch, reference
from headway.errors import HeadwayError, InvalidInputError
from headway.plan import HostLengths, Plan, Scratch
from headway.problem import Append, Descales, KVLayout, Problem, Rotary, Scores, check
from headway.providers.base import Provider, Repeat
from headway.serving.base import (
    AttentionBackend,
    AttentionLayer,
    ForwardBatch,
    GraphLimits,
    HeadNorms,
    TokenRotary,
)

KVPages = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class _Call:
    """What the layers of one kind share in a step."""

    template: Problem  # without append and plan
    provider: Provider
    plan: Plan
    lengths: Tensor  # what the plan was made from

    def refresh(self, known: HostLengths | None = None) -> None:
        """Plan anew, in place, for lengths that have changed in place."""
        if self.plan.schedule is None:
            self.plan.new_step(known)
        else:
            self.plan.copy_(_planned(self.provider, self.template, self.lengths))
        self.provider.prepare(dataclasses.replace(self.template, plan=self.plan))


@dataclass(frozen=True)
class _Part:
    """Sequences that one call per layer attends to: the decoding ones of a step, or the others.

    ``lengths`` (B,) counts the new tokens too. Decoding sequences are dense, (B, new tokens, ..).
    ``replayed``: it is captured in a CUDA graph.
    """

    batch: ForwardBatch
    lengths: Tensor
    dense: bool
    replayed: bool = False
    calls: dict[tuple[Hashable, ...], _Call] = field(default_factory=dict)

    @staticmethod
    def of(batch: ForwardBatch, dense: bool) -> _Part:
        new = batch.cu_seqlens_q[1:] - batch.cu_seqlens_q[:-1]
        return _Part(batch, batch.seqlens_k + new, dense)

    @property
    def known(self) -> HostLengths | None:
        """The lengths where the host knows them, without waiting for the device."""
        if self.batch.host_lengths is None:
            return None
        ends, before = self.batch.host_lengths
        return HostLengths(ends, before + np.diff(ends))


class FlashAttentionBackend(AttentionBackend):
    """Runs each layer as one append-and-attend call, or as an append and a call that attends.

    The first layer of a kind (heads, dims, window, softcap, ..) in a step has its Problem built, checked
    and given to a provider; the step's other layers of that kind replace the tensors in it.

    Args:
        backend: provider that must run every call; ``auto``: HEADWAY_BACKEND's, or the fastest.
        ver: interface generation asked for.
        fused_append: whether the provider writes new keys and values too; default: on a CPU.
    """

    def __init__(
        self,
        backend: str = "auto",
        ver: Literal[3, 4] | None = None,
        *,
        fused_append: bool | None = None,
    ) -> None:
        self.backend = None if backend == "auto" else backend
        self.ver = ver
        self._fused_append = fused_append
        self._repeats: dict[tuple[Hashable, ...], Repeat] = {}
        self._scratch = Scratch()
        self._decode: _Part | None = None
        self._extend: _Part | None = None
        self._slots: Tensor | None = None
        self._captured: dict[int, _Part] = {}
        self._limits: GraphLimits | None = None

    def init_forward_metadata(self, batch: ForwardBatch) -> None:
        self._batch = batch
        self._repeats = {}
        self._decode = self._extend = self._slots = None
        if self._is_fused(batch):
            return
        if batch.is_decode:
            self._decode = _Part.of(batch, dense=True)
        elif batch.num_decodes == 0:
            self._extend = _Part.of(batch, dense=False)
        else:
            decodes, others = batch.split()
            self._decode, self._extend = _Part.of(decodes, True), _Part.of(others, False)

    @property
    def batch(self) -> ForwardBatch | None:
        """The current step, padding included."""
        return self._batch

    def _is_fused(self, batch: ForwardBatch) -> bool:
        if self._fused_append is None:
            return batch.seqlens_k.device.type == "cpu"
        return self._fused_append

    # --- steps of CUDA graphs ---------------------------------------------------------------------

    def init_cuda_graph_state(self, limits: GraphLimits) -> None:
        self._limits = limits
        size, new = limits.max_batch_size, limits.tokens_per_sequence
        int32 = {"dtype": torch.int32, "device": limits.device}
        self._ends = torch.arange(0, (size + 1) * new, new, **int32)  # type: ignore[call-overload]
        self._seqlens_k = torch.zeros(size, **int32)  # type: ignore[call-overload]
        self._lengths = torch.full((size,), new, **int32)  # type: ignore[call-overload]
        self._table = torch.full(  # type: ignore[call-overload]
            (size, limits.max_pages), limits.padding_page, **int32
        )
        self._captured = {}

    def init_forward_metadata_capture(self, batch_size: int) -> None:
        limits = self._graph_limits()
        if batch_size > limits.max_batch_size:
            raise InvalidInputError("batch_size", batch_size, f"at most {limits.max_batch_size}")
        part = self._captured.get(batch_size)
        if part is None:
            batch = ForwardBatch(
                self._ends[: batch_size + 1],
                self._seqlens_k[:batch_size],
                self._table[:batch_size],
                limits.tokens_per_sequence,
                limits.max_seqlen_k,
                batch_size,
                (_ends(batch_size, limits), np.zeros(batch_size, np.int32)),
            )
            lengths = self._lengths[:batch_size]
            part = self._captured[batch_size] = _Part(batch, lengths, True, replayed=True)
        self._batch, self._decode, self._extend = part.batch, part, None
        self._repeats = {}

    def init_forward_metadata_replay(self, batch: ForwardBatch, batch_size: int) -> None:
        limits = self._graph_limits()
        part = self._captured.get(batch_size)
        used, columns = batch.page_table.shape
        if part is None or used > batch_size:
            given = f"{used} sequences in a graph for {batch_size}"
            raise InvalidInputError("batch_size", given, f"one of {sorted(self._captured)}")
        columns = min(columns, limits.max_pages)  # what is behind them is padding of the table
        self._table[:used, :columns].copy_(batch.page_table[:, :columns])
        self._seqlens_k[:used].copy_(batch.seqlens_k)
        if used < batch_size:
            # Every new token may need a page of its own.
            self._table[used:batch_size, : limits.tokens_per_sequence].fill_(limits.padding_page)
            self._seqlens_k[used:batch_size].fill_(self.get_cuda_graph_seq_len_fill_value())
        on_host = [call for call in part.calls.values() if call.provider.plans_on_host]
        if on_host:
            known = self._padded_lengths(batch, batch_size)
            for call in on_host:
                call.refresh(known)

    def _padded_lengths(self, batch: ForwardBatch, batch_size: int) -> HostLengths:
        """A replayed step's, as its layers find them; waits for the device unless the host knows them."""
        limits = self._graph_limits()
        before = np.full(batch_size, self.get_cuda_graph_seq_len_fill_value(), np.int32)
        before[: batch.batch_size] = batch.lengths_on_host()[1]
        return HostLengths(_ends(batch_size, limits), before + limits.tokens_per_sequence)

    def init_forward_metadata_in_graph(self) -> None:
        part, limits = self._decode, self._graph_limits()
        if part is None:
            raise HeadwayError("init_forward_metadata_capture was not called")
        torch.add(part.batch.seqlens_k, limits.tokens_per_sequence, out=part.lengths)
        for call in part.calls.values():
            if not call.provider.plans_on_host:
                call.refresh()
        # Written by the first layer, which knows the pages' size.
        self._slots = None

    def _graph_limits(self) -> GraphLimits:
        if self._limits is None:
            raise HeadwayError("init_cuda_graph_state has to be called first")
        return self._limits

    # --- layers -----------------------------------------------------------------------------------

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv_cache: KVPages,
        layer: AttentionLayer,
        rotary: TokenRotary | None = None,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        first, rest = self._decode, self._extend
        if first is None and rest is None:
            attended = self._forward_fused(q, k, v, kv_cache, layer, rotary)
            return attended if out is None else out.copy_(attended)
        q = self.write(q, k, v, kv_cache, layer, rotary)
        if first is None or rest is None:
            return self._attend(first or rest, q, kv_cache, layer, out)
        n = first.batch.batch_size
        if out is None:
            out = q.new_empty(*q.shape[:-1], v.shape[-1])
        self._attend(first, q[:n], kv_cache, layer, out[:n])
        self._attend(rest, q[n:], kv_cache, layer, out[n:])
        return out

    def forward_decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv_cache: KVPages,
        layer: AttentionLayer,
        rotary: TokenRotary | None = None,
    ) -> Tensor:
        q = self.write(q, k, v, kv_cache, layer, rotary)
        return self._attend(self._decode, q, kv_cache, layer)

    def forward_extend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv_cache: KVPages,
        layer: AttentionLayer,
        rotary: TokenRotary | None = None,
    ) -> Tensor:
        q = self.write(q, k, v, kv_cache, layer, rotary)
        return self._attend(self._extend, q, kv_cache, layer)

    def _attend(
        self,
        part: _Part | None,
        q: Tensor,
        kv_cache: KVPages,
        layer: AttentionLayer,
        out: Tensor | None = None,
    ) -> Tensor:
        """Attention of a part's queries (rows, Hq, D), its keys in place; (rows, Hq, Dv)."""
        if part is None:
            raise HeadwayError("the step has no such sequences")
        rows = q.shape[0]
        if part.dense:
            sizes = part.batch.batch_size, part.batch.max_seqlen_q
            q = q.unflatten(0, sizes)
            out = None if out is None else out.unflatten(0, sizes)
        call = part.calls.get(layer.kind)
        if call is None:
            problem = self._reading(part, q, kv_cache, layer, out)
            call = part.calls[layer.kind] = _call(check(problem), part, self._scratch)
            problem = dataclasses.replace(problem, plan=call.plan)
        else:
            problem = dataclasses.replace(
                call.template,
                q=q,
                k=kv_cache[0],
                v=kv_cache[1],
                scores=Scores(layer.softmax_scale, layer.softcap, layer.sinks),
                descales=_descales(layer, part.batch.batch_size),
                out=out,
                plan=call.plan,
            )
        attended = call.provider.run(problem)[0]
        return attended.view(rows, *attended.shape[-2:])

    def _reading(
        self,
        part: _Part,
        q: Tensor,
        kv_cache: KVPages,
        layer: AttentionLayer,
        out: Tensor | None,
    ) -> Problem:
        """The layer as a call that only reads."""
        batch = part.batch
        return Problem(
            q=q,
            k=kv_cache[0],
            v=kv_cache[1],
            kv_layout=KVLayout.PAGED,
            batch_size=batch.batch_size,
            max_seqlen_q=batch.max_seqlen_q,
            max_seqlen_k=batch.max_seqlen_k,
            mask=layer.mask,
            scores=Scores(layer.softmax_scale, layer.softcap, layer.sinks),
            cu_seqlens_q=None if part.dense else batch.cu_seqlens_q,
            seqlens_k=part.lengths,
            page_table=batch.page_table,
            descales=_descales(layer, batch.batch_size),
            out=out,
            ver=self.ver,
            backend=self.backend,
        )

    def write(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv_cache: KVPages,
        layer: AttentionLayer,
        rotary: TokenRotary | None = None,
    ) -> Tensor:
        """Write the step's new keys and values; returns the queries, encoded like the keys."""
        if q.device.type == "cpu":
            return self._write_on_cpu(q, k, v, kv_cache, layer, rotary)
        from headway.kernels.portable.norm import NormStyle
        from headway.kernels.portable.store import store_tokens

        norms = None if rotary is None else rotary.norms
        return store_tokens(
            q,
            k,
            v,
            *kv_cache,
            self._slots_for(q.shape[0], kv_cache[0].shape[1]),
            cos=None if rotary is None else rotary.cos,
            sin=None if rotary is None else rotary.sin,
            interleaved=rotary is not None and rotary.interleaved,
            q_weight=None if norms is None else norms.q_weight,
            k_weight=None if norms is None else norms.k_weight,
            eps=0.0 if norms is None else norms.eps,
            style=NormStyle.ROUNDED if norms is None else NormStyle(norms.style),
            k_descale=layer.k_descale,
            v_descale=layer.v_descale,
        )

    def _slots_for(self, num_tokens: int, page_size: int) -> Tensor:
        """Where the step's tokens go, computed by its first layer."""
        if self._slots is None:
            from headway.kernels.portable.store import token_slots

            batch = self._batch
            assert batch is not None
            slots = torch.empty(num_tokens, dtype=torch.int64, device=batch.seqlens_k.device)
            token_slots(
                slots,
                batch.cu_seqlens_q,
                batch.seqlens_k,
                batch.page_table,
                page_size,
                batch.max_seqlen_q,
            )
            self._slots = slots
        return self._slots

    def _write_on_cpu(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv_cache: KVPages,
        layer: AttentionLayer,
        rotary: TokenRotary | None,
    ) -> Tensor:
        batch = self._batch
        assert batch is not None
        if rotary is not None and rotary.norms is not None:
            q, k = normalised(q, k, rotary.norms)
        part = _Part(batch, batch.seqlens_k, dense=False)
        turns = None if rotary is None else _rotary(rotary, batch)
        new = Append(k, v, batch.cu_seqlens_q, turns)
        reading = self._reading(part, q, kv_cache, layer, None)
        return reference.append(dataclasses.replace(reading, append=new), new)

    # --- one call that writes and attends -----------------------------------------------------------

    def _forward_fused(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv_cache: KVPages,
        layer: AttentionLayer,
        rotary: TokenRotary | None,
    ) -> Tensor:
        varies = rotary is not None or layer.k_descale is not None or layer.v_descale is not None
        repeat = None if varies else self._repeats.get(layer.kind)
        if repeat is not None:
            return repeat(q, *kv_cache, k, v, layer.sinks)
        problem = check(self.problem(q, k, v, kv_cache, layer, rotary))
        provider = dispatch.choose(problem)
        if not varies:
            self._repeats[layer.kind] = provider.repeat(problem)
        return provider.run(problem)[0]

    def problem(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv_cache: KVPages,
        layer: AttentionLayer,
        rotary: TokenRotary | None = None,
    ) -> Problem:
        """One layer of the current step as a Problem that appends; nothing is checked or run."""
        batch = self._batch
        if batch is None:
            raise HeadwayError("forward was called before init_forward_metadata")
        if rotary is not None and rotary.norms is not None:
            q, k = normalised(q, k, rotary.norms)
        turns = None if rotary is None else _rotary(rotary, batch)
        return Problem(
            q=q,
            k=kv_cache[0],
            v=kv_cache[1],
            kv_layout=KVLayout.PAGED,
            batch_size=batch.batch_size,
            max_seqlen_q=batch.max_seqlen_q,
            max_seqlen_k=batch.max_seqlen_k,
            mask=layer.mask,
            scores=Scores(layer.softmax_scale, layer.softcap, layer.sinks),
            cu_seqlens_q=batch.cu_seqlens_q,
            seqlens_k=batch.seqlens_k,
            page_table=batch.page_table,
            append=Append(k, v, batch.cu_seqlens_q, turns),
            descales=_descales(layer, batch.batch_size),
            ver=self.ver,
            backend=self.backend,
        )


def normalised(q: Tensor, k: Tensor, norms: HeadNorms) -> tuple[Tensor, Tensor]:
    """The heads of q and k through their RMS norms, in plain torch."""

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        wide = x.float()
        row = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norms.eps)
        if norms.style == 0:
            return weight * row.to(x.dtype)
        return (row * (weight.float() + (norms.style == 1))).to(x.dtype)

    return norm(q, norms.q_weight), norm(k, norms.k_weight)


def rotated(x: Tensor, rotary: TokenRotary) -> Tensor:
    """x (1, heads, tokens, D) rotated, pairs half a rotary_dim apart, in plain torch."""
    half = rotary.cos.shape[-1]
    cos, sin = (t.float()[None, None] for t in (rotary.cos, rotary.sin))
    first, second = x[..., :half].float(), x[..., half : 2 * half].float()
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return torch.cat((turned.to(x.dtype), x[..., 2 * half :]), dim=-1)


def encoded(q: Tensor, k: Tensor, rotary: TokenRotary) -> tuple[Tensor, Tensor]:
    """q and k (tokens, heads, D) as the backend attends to them, in plain torch."""
    if rotary.norms is not None:
        q, k = normalised(q, k, rotary.norms)
    turned = (rotated(x.transpose(0, 1)[None], rotary)[0].transpose(0, 1) for x in (q, k))
    q, k = turned
    return q, k


def _descales(layer: AttentionLayer, batch_size: int) -> Descales:
    k, v = layer.k_descale, layer.v_descale
    if k is None and v is None:
        return Descales()
    # Not expanded, which gives one sequence another stride than several, and so another kernel.
    wide = (
        None if t is None else t.as_strided((batch_size, t.shape[0]), (0, t.stride(0)))
        for t in (k, v)
    )
    return Descales(None, *wide)


def _rotary(rotary: TokenRotary, batch: ForwardBatch) -> Rotary:
    """Row i of the tables belongs to new token i, so a sequence's first row is its "position"."""
    return Rotary(rotary.cos, rotary.sin, rotary.interleaved, batch.cu_seqlens_q[:-1])


def _ends(batch_size: int, limits: GraphLimits) -> np.ndarray:
    """cu_seqlens_q of a captured step."""
    new = limits.tokens_per_sequence
    return np.arange(0, (batch_size + 1) * new, new, dtype=np.int32)


def _call(problem: Problem, part: _Part, scratch: Scratch) -> _Call:
    provider, lengths = dispatch.choose(problem), part.lengths
    plan = None
    if problem.is_decode and type(provider).plan is not Provider.plan:
        plan = _planned(provider, problem, lengths)
    if plan is None:  # keeps what the provider itself plans
        plan = Plan(problem.plan_key, lengths, replayed=part.replayed, scratch=scratch)
        if provider.plans_on_host:
            plan.new_step(part.known)
    return _Call(dataclasses.replace(problem, out=None), provider, plan, lengths)


def _planned(provider: Provider, problem: Problem, lengths: Tensor) -> Plan:
    """A schedule for keys that the queries can see: no more than the window where there is one."""
    mask = problem.mask
    if mask.window_left is not None:
        lengths = lengths.clamp(max=mask.window_left + problem.max_seqlen_q)
    return provider.plan(problem.plan_key, lengths, kv_dtype=problem.k.dtype)
