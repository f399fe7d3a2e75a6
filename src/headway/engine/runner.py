"""Runner: one step's tokens through the model, flattened into a single row.

The model sees (1, total_tokens) with each token's own position; which tokens belong together is known to
the attention backend alone. Logits are computed only for the rows that are looked at.

Nothing here waits for the device: what a step needs travels in one copy, and a token that the step before
has drawn is taken over on the device, before the host knows it.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from headway.engine.attention import PagedAttention
from headway.engine.graphs import DecodeGraphs
from headway.engine.scheduler import Chunk, Sequence
from headway.engine.transfer import upload
from headway.serving.base import AttentionBackend, ForwardBatch

if TYPE_CHECKING:
    from headway.engine.pieces import Pieces

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


@dataclass
class _Flat:
    """A step's tokens in a row: which they are, where those come from that the host does not know yet (-1:
    from ``ids``), their positions; each sequence's tokens in the cache and the ends of its new ones; the
    rows that are looked at."""

    ids: list[int] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    contexts: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=lambda: [0])
    rows: list[int] = field(default_factory=list)

    def pad(self, count: int) -> None:
        """So many tokens more, which belong to no sequence."""
        self.ids += [0] * count
        self.sources += [-1] * count
        self.positions += [0] * count


class ModelRunner:
    """Runs chunks of sequences through a model.

    Args:
        model: a transformers causal language model whose attention is ``headway_paged``.
        max_sequences: most sequences in a step; max_pages: most pages of a sequence.
        graphs: captured steps.
        pieces: of the other steps that are small enough, what is captured of them; the rest, and all of
            larger ones, is launched kernel by kernel.
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
        pieces: Pieces | None = None,
    ) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.graphs = list(graphs)
        self.pieces = pieces
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
        flat = self._flattened(chunks)
        table = self._pages.fill(chunks)
        if self.device.type != "cpu":
            table = self._pages.padded(table)
        num_tokens, num_rows = len(flat.ids), len(flat.rows)
        graphs = self._graphs_for(chunks) if num_rows == num_tokens else None
        rows = (
            None if graphs is not None or self.pieces is None else self.pieces.rows_for(num_tokens)
        )
        if rows is not None:
            flat.pad(rows - num_tokens)
        pending = any(source >= 0 for source in flat.sources)
        sent = self._send(flat, table, pending)
        ids, sources, positions, contexts, ends, rows_there = sent[:6]
        batch = ForwardBatch(
            cu_seqlens_q=ends,
            seqlens_k=contexts,
            page_table=sent[6].view(table.shape),
            max_seqlen_q=max(chunk.num_tokens for chunk in chunks),
            max_seqlen_k=max(
                start + chunk.num_tokens for start, chunk in zip(flat.contexts, chunks, strict=True)
            ),
            num_decodes=_leading_decodes(chunks),
            host_lengths=(np.array(flat.ends, np.int32), np.array(flat.contexts, np.int32)),
        )
        if pending:
            assert self._drawn is not None
            drawn = self._drawn[1][sources.clamp(min=0)]
            ids = torch.where(sources >= 0, drawn, ids)
        if graphs is not None:
            return graphs.run(ids, positions, batch)
        if rows is None:
            return self._run_eagerly(ids, positions, batch, rows_there, num_rows)
        with self._in_pieces(num_tokens):
            return self._run_eagerly(ids, positions, batch, rows_there, num_rows)

    def _flattened(self, chunks: Seq[Chunk]) -> _Flat:
        flat = _Flat()
        for chunk in chunks:
            start = chunk.sequence.num_computed
            flat.ids += chunk.tokens
            flat.sources += [-1] * chunk.num_tokens
            if chunk.takes_pending:
                flat.sources[-1] = self._source(chunk.sequence)
            flat.positions += range(start, start + chunk.num_tokens)
            flat.contexts.append(start)
            end = len(flat.ids)
            flat.ends.append(end)
            flat.rows += range(end - chunk.num_rows, end)
        return flat

    def _graphs_for(self, chunks: Seq[Chunk]) -> DecodeGraphs | None:
        new_tokens = [chunk.num_tokens for chunk in chunks]
        return next((one for one in self.graphs if one.covers(new_tokens)), None)

    @contextmanager
    def _in_pieces(self, num_tokens: int) -> Iterator[None]:
        """The model runs in captured pieces here."""
        assert self.pieces is not None
        self.pieces.begin(num_tokens)
        self._attention.pieces = self.pieces
        try:
            yield
        finally:
            self._attention.pieces = None

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

    def _send(self, flat: _Flat, table: np.ndarray, pending: bool) -> tuple[Tensor, ...]:
        """All of a step's numbers as int32 tensors on the device, in one copy."""
        sources = flat.sources if pending else []
        parts = [flat.ids, sources, flat.positions, flat.contexts, flat.ends, flat.rows or [0]]
        numbers: list[int] = []
        for part in parts:
            numbers += part
            numbers += [0] * (-len(part) % ALIGNMENT)
        packed = np.concatenate((np.array(numbers, dtype=np.int32), table.reshape(-1)))
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
