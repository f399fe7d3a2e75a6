"""Runner: one step's tokens through the model, flattened into a single row.

The model sees (1, total_tokens) with each token's own position; which tokens belong together is known to
the attention backend alone. Logits are computed only for the rows that are looked at.

Nothing here waits for the device: what a step needs travels in one copy, and a token that the step before
has drawn is taken over on the device, before the host knows it.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor, nn

from headway.engine.attention import PagedAttention
from headway.engine.graphs import DecodeGraphs
from headway.engine.scheduler import Chunk, Sequence
from headway.engine.transfer import upload
from headway.serving.base import AttentionBackend, ForwardBatch

#: Kernels are compiled for addresses and strides that are multiples of 16 bytes, and for others: rows of
#: what is sent begin at such addresses, so that one kernel serves every step.
ALIGNMENT, COLUMNS = 4, 16


class PageTable:
    """The step's page table, kept between steps: a row is rewritten only from where it changed."""

    def __init__(self, max_rows: int, max_pages: int) -> None:
        columns = -(-max_pages // COLUMNS) * COLUMNS
        self.table = np.zeros((max_rows, columns), dtype=np.int32)
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

    def padded(self, table: np.ndarray) -> np.ndarray:
        """The same view with columns up to the next multiple of COLUMNS, of undefined content."""
        rows, columns = table.shape
        return self.table[:rows, : -(-columns // COLUMNS) * COLUMNS]


class ModelRunner:
    """Runs chunks of sequences through a model.

    Args:
        model: a transformers causal language model whose attention is ``headway_paged``.
        max_sequences: most sequences in a step; max_pages: most pages of a sequence.
        graphs: captured steps; those that none of them covers are launched kernel by kernel.
    """

    def __init__(
        self,
        model: nn.Module,
        attention: PagedAttention,
        backend: AttentionBackend,
        *,
        max_sequences: int,
        max_pages: int,
        graphs: Seq[DecodeGraphs] = (),
    ) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.graphs = list(graphs)
        self._attention = attention
        self._backend = backend
        self._pages = PageTable(max_sequences, max_pages)
        self._drawn: tuple[dict[Sequence, int], Tensor] | None = None

    def drew(self, sequences: Seq[Sequence], tokens: Tensor) -> None:
        """What the latest step has drawn, (n,) int64 on the device: the next one goes on from there."""
        self._drawn = {sequence: row for row, sequence in enumerate(sequences)}, tokens

    @torch.inference_mode()
    def run(self, chunks: Seq[Chunk]) -> Tensor:
        """Compute the chunks and write their keys and values.

        Returns:
            (rows, vocabulary) logits, ``chunk.num_rows`` rows for each chunk, in order. They are valid
            until the next call.
        """
        ids: list[int] = []
        sources: list[int] = []
        positions: list[int] = []
        ends: list[int] = [0]
        rows: list[int] = []
        contexts: list[int] = []
        for chunk in chunks:
            start = chunk.sequence.num_computed
            stop = start + chunk.num_tokens
            ids += chunk.tokens
            sources += [-1] * chunk.num_tokens
            if chunk.takes_pending:
                sources[-1] = self._source(chunk.sequence)
            positions += range(start, stop)
            contexts.append(start)
            ends.append(len(ids))
            rows += range(len(ids) - chunk.num_rows, len(ids))
        table = self._pages.fill(chunks)
        if self.device.type != "cpu":
            table = self._pages.padded(table)
        pending = any(source >= 0 for source in sources)
        sent = self._send(ids, sources if pending else [], positions, contexts, ends, rows, table)
        ids_there, sources_there, positions_there, contexts_there, ends_there, rows_there = sent[:6]
        batch = ForwardBatch(
            cu_seqlens_q=ends_there,
            seqlens_k=contexts_there,
            page_table=sent[6].view(table.shape),
            max_seqlen_q=max(chunk.num_tokens for chunk in chunks),
            max_seqlen_k=max(
                start + chunk.num_tokens for start, chunk in zip(contexts, chunks, strict=True)
            ),
            num_decodes=_leading_decodes(chunks),
            host_lengths=(np.array(ends, np.int32), np.array(contexts, np.int32)),
        )
        if pending:
            assert self._drawn is not None
            drawn = self._drawn[1][sources_there.clamp(min=0)]
            ids_there = torch.where(sources_there >= 0, drawn, ids_there)
        if len(rows) == len(ids):
            for graphs in self.graphs:
                if graphs.covers(batch, len(ids)):
                    return graphs.run(ids_there, positions_there, batch)
        return self._run_eagerly(ids_there, positions_there, batch, rows_there, len(rows))

    def _run_eagerly(
        self, ids: Tensor, positions: Tensor, batch: ForwardBatch, rows: Tensor, num_rows: int
    ) -> Tensor:
        self._backend.init_forward_metadata(batch)
        output = self.model(
            input_ids=ids[None].long(),
            position_ids=positions[None].long(),
            use_cache=False,
            # A chunk that ends inside its prompt is not looked at, but models need a row to project.
            logits_to_keep=rows.long(),
            headway=self._attention,
        )
        logits: Tensor = output.logits[0]
        return logits[:num_rows]

    def _source(self, sequence: Sequence) -> int:
        assert self._drawn is not None
        return self._drawn[0][sequence]

    def _send(
        self,
        ids: list[int],
        sources: list[int],
        positions: list[int],
        contexts: list[int],
        ends: list[int],
        rows: list[int],
        table: np.ndarray,
    ) -> tuple[Tensor, ...]:
        """All of a step's numbers as int32 tensors on the device, in one copy."""
        parts = [ids, sources, positions, contexts, ends, rows or [0]]
        flat: list[int] = []
        for part in parts:
            flat += part
            flat += [0] * (-len(part) % ALIGNMENT)
        packed = np.concatenate((np.array(flat, dtype=np.int32), table.reshape(-1)))
        there = upload(packed, torch.int32, self.device)
        sizes = [len(part) + -len(part) % ALIGNMENT for part in parts]
        *padded, table_there = there.split([*sizes, table.size])
        sent = (one[: len(part)] for one, part in zip(padded, parts, strict=True))
        return (*sent, table_there)


def _leading_decodes(chunks: Seq[Chunk]) -> int:
    """How many chunks from the first on are a single token."""
    for count, chunk in enumerate(chunks):
        if chunk.num_tokens != 1:
            return count
    return len(chunks)
