"""What the runner hands to the model and keeps between steps."""

from __future__ import annotations

import torch

from headway.engine.runner import ModelRunner, PageTable
from headway.engine.scheduler import Chunk, Sequence
from headway.serving.base import ForwardBatch
from tests.engine.conftest import TinyModel


def chunk(pages: list[int], *, computed: int = 0, tokens: int = 1, length: int = 40) -> Chunk:
    sequence = Sequence("x", list(range(length)), length, num_computed=computed, pages=pages)
    return Chunk(sequence, tokens)


def test_page_table_follows_growth() -> None:
    table = PageTable(4, 8)
    one, two = chunk([5, 6]), chunk([1])
    assert table.fill([one, two])[:, :1].tolist() == [[5], [1]]
    two.sequence.pages += [7, 9]
    filled = table.fill([one, two])
    assert filled[0, :2].tolist() == [5, 6]
    assert filled[1].tolist() == [1, 7, 9]


def test_page_table_follows_sequences_that_move_and_come_back() -> None:
    table = PageTable(4, 8)
    one, two = chunk([5, 6]), chunk([1, 2])
    table.fill([one, two])
    assert table.fill([two]).tolist() == [[1, 2]]
    assert table.fill([one]).tolist() == [[5, 6]]
    one.sequence.pages = [3, 4]  # preempted, then admitted again with other pages
    one.sequence.admissions += 1
    assert table.fill([one]).tolist() == [[3, 4]]


class Recorder:
    """Stands for a backend; keeps what a step is described as."""

    def init_forward_metadata(self, batch: ForwardBatch) -> None:
        self.batch = batch


class LastTokens(torch.nn.Module):
    """Stands for a model: logits of a row are its token and its position."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        logits_to_keep: torch.Tensor,
        **_: object,
    ) -> object:
        rows = torch.stack((input_ids, position_ids), dim=-1)[:, logits_to_keep]
        return type("Output", (), {"logits": rows})


def test_steps_are_flattened_and_sampled_rows_picked() -> None:
    recorder = Recorder()
    runner = ModelRunner(LastTokens(), None, recorder, max_sequences=4, max_pages=8)  # type: ignore[arg-type]
    decode = chunk([3, 4], computed=39)
    middle = chunk([8], computed=4, tokens=5)  # ends inside its prompt
    final = chunk([9, 2], computed=30, tokens=10)
    assert runner.run([decode, middle, final]).tolist() == [[39, 39], [39, 39]]
    batch = recorder.batch
    assert batch.cu_seqlens_q.tolist() == [0, 1, 6, 16]
    assert batch.seqlens_k.tolist() == [39, 4, 30]
    assert (batch.max_seqlen_q, batch.max_seqlen_k) == (10, 40)
    assert batch.page_table[0].tolist() == [3, 4]
    assert runner.run([middle]).shape == (0, 2)


def test_models_see_one_row_of_tokens(llama: TinyModel) -> None:
    """Logits come for the rows that sample alone, whatever else is in the step."""
    from tests.engine.conftest import engine

    llm = engine(llama, chunked_prefill_size=8)
    seen: list[tuple[int, ...]] = []
    llm.model.register_forward_hook(lambda _, __, out: seen.append(tuple(out.logits.shape)))
    llm.generate([list(range(20))])
    assert seen[:3] == [(1, 1, 256)] * 3
    assert len(seen) == 3 + 15
