"""FlashAttentionBackend: softmax attention over paged keys and values, through Headway's providers."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import Literal

from torch import Tensor

from headway import dispatch
from headway.errors import HeadwayError
from headway.problem import Append, KVLayout, Problem, Scores, check
from headway.providers.base import Provider
from headway.serving.base import AttentionBackend, AttentionLayer, ForwardBatch


class FlashAttentionBackend(AttentionBackend):
    """Runs each layer as one append-and-attend call.

    The first layer of a kind (heads, dims, window, softcap, ..) in a step has its Problem built, checked
    and given to a provider; the step's other layers of that kind replace the tensors in it.

    Args:
        backend: provider that must run every call; ``auto`` (or HEADWAY_BACKEND) chooses.
        ver: interface generation asked for.
    """

    def __init__(self, backend: str = "auto", ver: Literal[3, 4] | None = None) -> None:
        self.backend = backend
        self.ver = ver
        self._batch: ForwardBatch | None = None
        self._calls: dict[tuple[Hashable, ...], tuple[Problem, Provider]] = {}

    def init_forward_metadata(self, batch: ForwardBatch) -> None:
        self._batch = batch
        self._calls = {}

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv_cache: tuple[Tensor, Tensor],
        layer: AttentionLayer,
    ) -> Tensor:
        call = self._calls.get(layer.kind)
        if call is None:
            problem = check(self.problem(q, k, v, kv_cache, layer))
            provider = dispatch.choose(problem)
            self._calls[layer.kind] = problem, provider
        else:
            template, provider = call
            problem = dataclasses.replace(
                template,
                q=q,
                k=kv_cache[0],
                v=kv_cache[1],
                scores=Scores(layer.softmax_scale, layer.softcap, layer.sinks),
                append=Append(k, v, template.cu_seqlens_q, None),
            )
        return provider.run(problem)[0]

    def problem(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv_cache: tuple[Tensor, Tensor],
        layer: AttentionLayer,
    ) -> Problem:
        """One layer of the current step as a Problem; nothing is checked or run."""
        batch = self._batch
        if batch is None:
            raise HeadwayError("forward was called before init_forward_metadata")
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
            append=Append(k, v, batch.cu_seqlens_q, None),
            ver=self.ver,
            backend=self.backend,
        )
