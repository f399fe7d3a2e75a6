"""Decode steps as CUDA graphs: captured once per batch size, replayed with other tokens and pages.

A step of some size runs in the graph of the next larger captured one; rows that are too many compute on
padding, whose keys and values go to a page that nobody owns.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from headway.serving.base import AttentionBackend, ForwardBatch, GraphLimits

#: Model call of a step: ids and positions, both (1, tokens) int64, to logits (tokens, vocabulary).
Forward = Callable[[Tensor, Tensor], Tensor]

#: Makes a replay of a function: each call computes it again, from and to the same memory.
Record = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]


def batch_sizes(most: int) -> list[int]:
    """Sizes worth a graph of their own: small ones closely, larger ones within 16 of each other."""
    sizes = [size for size in (1, 2, 4, 8, *range(16, most, 16)) if size < most]
    return [*sizes, most]


class CudaRecorder:
    """Captures functions as CUDA graphs that share one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        # The first call compiles kernels and fills caches, which a capture must not see.
        function()
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            out = function()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


class DecodeGraphs:
    """Captured decode steps of one model.

    Args:
        forward: the model call; its attention goes through ``backend``.
        sizes: batch sizes to capture, ascending; limits.max_batch_size is the last.
        record: how a step is captured.
    """

    def __init__(
        self,
        forward: Forward,
        backend: AttentionBackend,
        limits: GraphLimits,
        sizes: Sequence[int],
        record: Record,
    ) -> None:
        self._forward = forward
        self._backend = backend
        self._limits = limits
        self._sizes = list(sizes)
        self._record = record
        tokens = limits.max_batch_size * limits.tokens_per_sequence
        self._ids = torch.zeros(1, tokens, dtype=torch.int64, device=limits.device)
        self._positions = torch.zeros_like(self._ids)
        self._replays: dict[int, Callable[[], Tensor]] = {}

    @torch.inference_mode()
    def capture(self, advance: Callable[[], None] = lambda: None) -> None:
        """Capture every size, the largest first, so that the others fit into its memory."""
        self._backend.init_cuda_graph_state(self._limits)
        for size in reversed(self._sizes):
            self._backend.init_forward_metadata_capture(size)
            tokens = size * self._limits.tokens_per_sequence
            ids, positions = self._ids[:, :tokens], self._positions[:, :tokens]
            self._replays[size] = self._record(functools.partial(self._step, ids, positions))
            advance()

    def _step(self, ids: Tensor, positions: Tensor) -> Tensor:
        self._backend.init_forward_metadata_in_graph()
        return self._forward(ids, positions)

    def covers(self, new_tokens: Sequence[int]) -> bool:
        """Whether there is a graph for a step of sequences with so many new tokens each."""
        each = self._limits.tokens_per_sequence
        return len(new_tokens) <= self._sizes[-1] and all(new == each for new in new_tokens)

    def run(self, ids: Tensor, positions: Tensor, batch: ForwardBatch) -> Tensor:
        """Logits (tokens, vocabulary) of all tokens of a step that is covered, until the next call.

        Args:
            ids, positions: (tokens,) int32.
        """
        size = self._sizes[bisect.bisect_left(self._sizes, batch.batch_size)]
        tokens = ids.shape[0]
        self._ids[0, :tokens].copy_(ids)
        self._positions[0, :tokens].copy_(positions)
        self._backend.init_forward_metadata_replay(batch, size)
        return self._replays[size]()[:tokens]
