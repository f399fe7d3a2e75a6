"""One process of a tensor-parallel engine that is told what to do, and the others, which it tells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from headway.engine import parallel
from headway.engine.llm import LLM
from headway.engine.request import RequestOutput, SamplingParams


class Leader(LLM):
    """The engine that is told. Before each step the others hear which methods it has been called by."""

    _group: Any = None

    def __enter__(self) -> Leader:
        """Begin to tell the others, which ``follow`` from now on."""
        self._group = parallel.command_group()
        self._said: list[tuple[str, tuple[Any, ...]]] = []
        return self

    def __exit__(self, *_: object) -> None:
        dist.broadcast_object_list([None], 0, group=self._group)
        self._group = None

    def add_request(
        self, request_id: str, prompt_token_ids: Sequence[int], sampling_params: SamplingParams
    ) -> None:
        prompt = list(prompt_token_ids)
        super().add_request(request_id, prompt, sampling_params)
        if self._group is not None:
            self._said.append(("add_request", (request_id, prompt, sampling_params)))

    def abort(self, request_id: str) -> RequestOutput | None:
        output = super().abort(request_id)
        if self._group is not None and output is not None:
            self._said.append(("abort", (request_id,)))
        return output

    def step(self) -> list[RequestOutput]:
        if self._group is not None:
            said, self._said = self._said, []
            dist.broadcast_object_list([said], 0, group=self._group)
        return super().step()


def follow(llm: LLM) -> None:
    """Do what the leader does until it says that was all."""
    group = parallel.command_group()
    while True:
        told: list[Any] = [None]
        dist.broadcast_object_list(told, 0, group=group)
        if told[0] is None:
            return
        for name, arguments in told[0]:
            getattr(llm, name)(*arguments)
        llm.step()
