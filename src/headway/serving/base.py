"""What an engine holds: the contract of an attention backend.

Once per step the engine calls ``init_forward_metadata``; then each layer of the model calls ``forward``.
What is common to all layers of a step is built in the first call, so that the second does little more
than hand over its tensors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from headway.problem import Mask


@dataclass(frozen=True)
class AttentionLayer:
    """What an attention layer is, the same in every step.

    ``sinks`` (Hq,) joins the softmax's denominator. ``mask`` is over absolute positions of a sequence.
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

    @cached_property
    def kind(self) -> tuple[Hashable, ...]:
        """Equal for two layers whose calls differ in nothing but their tensors."""
        heads = self.num_q_heads, self.num_kv_heads, self.head_dim, self.head_dim_v
        scores = self.softmax_scale, self.softcap, self.sinks is None
        return (*heads, *scores, self.mask)


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
    """

    cu_seqlens_q: Tensor
    seqlens_k: Tensor
    page_table: Tensor
    max_seqlen_q: int
    max_seqlen_k: int

    @property
    def batch_size(self) -> int:
        return self.seqlens_k.shape[0]


class AttentionBackend(ABC):
    """Attention for the layers of a model, over a paged KV cache.

    A backend serves one stream of steps: ``forward`` belongs to the latest ``init_forward_metadata``.
    """

    @abstractmethod
    def init_forward_metadata(self, batch: ForwardBatch) -> None:
        """Prepare a step. Host work that all layers share is done here."""

    @abstractmethod
    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv_cache: tuple[Tensor, Tensor],
        layer: AttentionLayer,
    ) -> Tensor:
        """Write the new keys and values into the layer's cache, then attend.

        Args:
            q: (total_q, Hq, D), positions already encoded; k: (total_q, Hkv, D); v: (total_q, Hkv, Dv).
            kv_cache: pages of keys (num_pages, page_size, Hkv, D) and values (..., Dv).

        Returns:
            (total_q, Hq, Dv).
        """
