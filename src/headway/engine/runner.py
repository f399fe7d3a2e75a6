"""Runner: one step's tokens through the model, flattened into a single row.

The model sees (1, total_tokens) with each token's own position; which tokens belong together is known to
the attention backend alone. Logits are computed only for the rows that sample.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor, nn

from headway.engine.attention import PagedAttention
from headway.engine.scheduler import Chunk, Sequence
from headway.serving.base import AttentionBackend, ForwardBatch


class PageTable:
    """The step's page table, kept between steps: a row is rewritten only from where it changed."""

    def __init__(self, max_rows: int, max_pages: int) -> None:
        self.table = np.zeros((max_rows, max_pages), dtype=np.int32)
        self._held: list[tuple[Sequence | None, int, int]] = [(None, 0, 0)] * max_rows

    def fill(self, chunks: Seq[Chunk]) -> np.ndarray:
        """(B, pages of the longest) int32, a view of the table."""
        longest = 0
        for row, chunk in enumerate(chunks):
            sequence = chunk.sequence
            pages = sequence.pages
            count = len(pages)
            longest = max(longest, count)
            held, admission, written = self._held[row]
            if held is not sequence or admission != sequence.admissions:
                written = 0
            if written < count:
                self.table[row, written:count] = pages[written:]
                self._held[row] = sequence, sequence.admissions, count
        return self.table[: len(chunks), :longest]


class ModelRunner:
    """Runs chunks of sequences through a model.

    Args:
        model: a transformers causal language model whose attention is ``headway_paged``.
        max_sequences: most sequences in a step; max_pages: most pages of a sequence.
    """

    def __init__(
        self,
        model: nn.Module,
        attention: PagedAttention,
        backend: AttentionBackend,
        *,
        max_sequences: int,
        max_pages: int,
    ) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self._attention = attention
        self._backend = backend
        self._pages = PageTable(max_sequences, max_pages)

    @torch.inference_mode()
    def run(self, chunks: Seq[Chunk]) -> Tensor:
        """Compute the chunks and write their keys and values.

        Returns:
            (rows, vocabulary) logits, one row for each chunk that samples, in order.
        """
        ids: list[int] = []
        positions: list[int] = []
        ends, last_rows, contexts = [0], [], []
        for chunk in chunks:
            start = chunk.sequence.num_computed
            stop = start + chunk.num_tokens
            ids += chunk.sequence.tokens[start:stop]
            positions += range(start, stop)
            contexts.append(start)
            ends.append(len(ids))
            if chunk.samples:
                last_rows.append(len(ids) - 1)
        table = self._pages.fill(chunks)
        batch = ForwardBatch(
            cu_seqlens_q=self._tensor(ends, torch.int32),
            seqlens_k=self._tensor(contexts, torch.int32),
            page_table=torch.from_numpy(table).to(self.device),
            max_seqlen_q=max(chunk.num_tokens for chunk in chunks),
            max_seqlen_k=max(
                start + chunk.num_tokens for start, chunk in zip(contexts, chunks, strict=True)
            ),
        )
        self._backend.init_forward_metadata(batch)
        output = self.model(
            input_ids=self._tensor(ids, torch.int64)[None],
            position_ids=self._tensor(positions, torch.int64)[None],
            use_cache=False,
            # A chunk that ends inside its prompt samples nothing, but models need a row to project.
            logits_to_keep=self._tensor(last_rows or [0], torch.int64),
            headway=self._attention,
        )
        logits: Tensor = output.logits[0]
        return logits[: len(last_rows)]

    def _tensor(self, values: list[int], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)
