"""What an engine holds: the contract of an attention backend.

Once per step the engine calls ``init_forward_metadata``; then each layer of the model calls ``forward``.
What is common to all layers of a step is built in the first call, so that the second does little more
than hand over its tensors.

Steps of a captured CUDA graph go another way: ``init_cuda_graph_state`` once, then for every batch size
``init_forward_metadata_capture`` before its capture and ``init_forward_metadata_replay`` before each
replay. These run outside the graph and leave their results where it reads them;
``init_forward_metadata_in_graph`` and ``forward`` are recorded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from headway.errors import HeadwayError, UnsupportedError
from headway.problem import Mask


@dataclass(frozen=True)
class AttentionLayer:
    """What an attention layer is, the same in every step.

    ``sinks`` (Hq,) joins the softmax's denominator. ``mask`` is over absolute positions of a sequence.
    ``k_descale`` and ``v_descale`` (Hkv,) float32 are what a stored 1 means in a float8 cache.
    """

    layer_id: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    softmax_scale: float
    mask: Mask
    softcap: float = 0.0
    sinks: Tensor | None = None
    k_descale: Tensor | None = None
    v_descale: Tensor | None = None

    @cached_property
    def kind(self) -> tuple[Hashable, ...]:
        """Equal for two layers whose calls differ in nothing but their tensors."""
        heads = self.num_q_heads, self.num_kv_heads, self.head_dim, self.head_dim_v
        scores = self.softmax_scale, self.softcap, self.sinks is None
        return (*heads, *scores, self.k_descale is None, self.v_descale is None, self.mask)


@dataclass(frozen=True)
class ForwardBatch:
    """The sequences of one step: B of them, with ``cu_seqlens_q[-1]`` new tokens altogether.

    Sequence b has ``seqlens_k[b]`` tokens in the cache already; its new ones, rows ``cu_seqlens_q[b]`` to
    ``cu_seqlens_q[b + 1]`` of the flattened tokens, follow them. All tensors are int32 on the device.

    Args:
        cu_seqlens_q: (B + 1,).
        seqlens_k: (B,) lengths before this step.
        page_table: (B, max_pages); covers the new tokens too, entries behind them are not looked at.
        max_seqlen_q: most new tokens of a sequence.
        max_seqlen_k: longest sequence after this step.
        num_decodes: so many sequences from the first on have one new token each, as far as is known.
        host_lengths: cu_seqlens_q and seqlens_k where the host knows them.
    """

    cu_seqlens_q: Tensor
    seqlens_k: Tensor
    page_table: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    num_decodes: int = 0
    host_lengths: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def batch_size(self) -> int:
        return self.seqlens_k.shape[0]

    @property
    def is_decode(self) -> bool:
        """Whether every sequence has one new token."""
        return self.num_decodes == self.batch_size or self.max_seqlen_q == 1

    def lengths_on_host(self) -> tuple[np.ndarray, np.ndarray]:
        """cu_seqlens_q and seqlens_k as int32 arrays; waits for the device unless the host knows them."""
        if self.host_lengths is not None:
            return self.host_lengths
        return self.cu_seqlens_q.cpu().numpy(), self.seqlens_k.cpu().numpy()

    def split(self) -> tuple[ForwardBatch, ForwardBatch]:
        """The decoding sequences, and the others: one of the two may be empty."""
        n = self.num_decodes
        known = self.host_lengths
        decodes = ForwardBatch(
            self.cu_seqlens_q[: n + 1],
            self.seqlens_k[:n],
            self.page_table[:n],
            1,
            self.max_seqlen_k,
            n,
            None if known is None else (known[0][: n + 1], known[1][:n]),
        )
        rest, longest = None, self.max_seqlen_k
        if known is not None:  # the longest sequence may be one that decodes
            rest = known[0][n:] - n, known[1][n:]
            longest = int((rest[1] + np.diff(rest[0])).max(initial=0))
        others = ForwardBatch(
            self.cu_seqlens_q[n:] - n,
            self.seqlens_k[n:],
            self.page_table[n:],
            self.max_seqlen_q,
            longest,
            host_lengths=rest,
        )
        return decodes, others


@dataclass(frozen=True)
class HeadNorms:
    """RMS norms of the heads of queries and keys: weights (D,); ``style`` says where results are rounded
    (:class:`headway.kernels.portable.norm.NormStyle`)."""

    q_weight: Tensor
    k_weight: Tensor
    eps: float
    style: int


@dataclass(frozen=True)
class TokenRotary:
    """What the backend does to new queries and keys: rotary embedding, with cos and sin of each token.

    Args:
        cos, sin: (total_q, rotary_dim / 2); copied unless their last stride is 1.
        interleaved: whether pairs are (0, 1), (2, 3) .. instead of (0, rotary_dim / 2) ..
        norms: applied before the rotation.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool = False
    norms: HeadNorms | None = None

    def __post_init__(self) -> None:
        for name in ("cos", "sin"):
            table: Tensor = getattr(self, name)
            if table.stride(-1) != 1:  # some models transpose angles, and their cosines stay so
                object.__setattr__(self, name, table.contiguous())

    def rows(self, rows: slice) -> TokenRotary:
        return TokenRotary(self.cos[rows], self.sin[rows], self.interleaved, self.norms)


@dataclass(frozen=True)
class GraphLimits:
    """What all captured steps together need.

    Args:
        max_batch_size: most sequences of a step, padding included.
        max_pages: most pages of a sequence.
        max_seqlen_k: longest sequence.
        padding_page: a page that no sequence owns; rows of padding write there.
        tokens_per_sequence: new tokens of every sequence: 1, or more where drafts are verified.
    """

    max_batch_size: int
    max_pages: int
    max_seqlen_k: int
    padding_page: int
    device: torch.device
    tokens_per_sequence: int = 1


class AttentionBackend(ABC):
    """Attention for the layers of a model, over a paged KV cache.

    A backend serves one stream of steps: ``forward`` belongs to the latest ``init_forward_metadata``.
    """

    _batch: ForwardBatch | None = None

    @abstractmethod
    def init_forward_metadata(self, batch: ForwardBatch) -> None:
        """Prepare a step. Host work that all layers share is done here."""

    def init_cuda_graph_state(self, limits: GraphLimits) -> None:
        """Allocate what captured steps read. Called once, before any capture."""
        raise UnsupportedError(f"{type(self).__name__} runs under no CUDA graph")

    def init_forward_metadata_capture(self, batch_size: int) -> None:
        """Prepare the capture of steps of ``batch_size`` sequences: the calls of ``forward`` that follow
        read buffers that stay where they are. All sequences are padding until a replay says otherwise."""
        raise UnsupportedError(f"{type(self).__name__} runs under no CUDA graph")

    def init_forward_metadata_in_graph(self) -> None:  # noqa: B027 - most have nothing to record
        """Called where a captured step begins, before its layers: what is launched here is recorded and
        runs again in every replay. Nothing may wait for the device."""

    def init_forward_metadata_replay(self, batch: ForwardBatch, batch_size: int) -> None:
        """Prepare a replay of the graph captured for ``batch_size`` sequences, of which those behind
        ``batch``'s are padding."""
        raise UnsupportedError(f"{type(self).__name__} runs under no CUDA graph")

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """Tokens that a sequence of padding has in the cache."""
        return 0

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv_cache: tuple[Tensor, Tensor],
        layer: AttentionLayer,
        rotary: TokenRotary | None = None,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        """Write the new keys and values into the layer's cache, then attend.

        Args:
            q: (total_q, Hq, D), k: (total_q, Hkv, D), positions already encoded unless ``rotary`` is
                given; v: (total_q, Hkv, Dv).
            kv_cache: pages of keys (num_pages, page_size, Hkv, D) and values (..., Dv).
            out: (total_q, Hq, Dv), where the results belong.

        Returns:
            (total_q, Hq, Dv): ``out`` where it is given.
        """
        attended = self._forward(q, k, v, kv_cache, layer, rotary)
        return attended if out is None else out.copy_(attended)

    def _forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv_cache: tuple[Tensor, Tensor],
        layer: AttentionLayer,
        rotary: TokenRotary | None,
    ) -> Tensor:
        batch = self._batch
        if batch is None:
            raise HeadwayError("forward was called before init_forward_metadata")
        n = batch.num_decodes
        if batch.is_decode:
            return self.forward_decode(q, k, v, kv_cache, layer, rotary)
        if n == 0:
            return self.forward_extend(q, k, v, kv_cache, layer, rotary)
        first, rest = slice(n), slice(n, None)
        turns = (None, None) if rotary is None else (rotary.rows(first), rotary.rows(rest))
        decoded = self.forward_decode(q[first], k[first], v[first], kv_cache, layer, turns[0])
        extended = self.forward_extend(q[rest], k[rest], v[rest], kv_cache, layer, turns[1])
        return torch.cat((decoded, extended))

    @abstractmethod
    def forward_decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv_cache: tuple[Tensor, Tensor],
        layer: AttentionLayer,
        rotary: TokenRotary | None = None,
    ) -> Tensor:
        """``forward`` of the step's decoding sequences, whose rows alone are given."""

    @abstractmethod
    def forward_extend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv_cache: tuple[Tensor, Tensor],
        layer: AttentionLayer,
        rotary: TokenRotary | None = None,
    ) -> Tensor:
        """``forward`` of the step's other sequences, whose rows alone are given."""
