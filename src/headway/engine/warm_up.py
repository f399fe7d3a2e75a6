"""Before the first client: what its request would wait for is compiled, and what cannot run is found.

On a GPU that is more than kernels of Headway's: the library of products loads a kernel when a number of
rows first needs it, and memory is asked for when a step first needs it. Both wait until the device is idle,
which costs a service as much as two steps, each time.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from headway.engine.config import EngineConfig
from headway.engine.kv_cache import pages_for
from headway.engine.llm import LLM
from headway.engine.request import SamplingParams
from headway.errors import HeadwayError

#: A prompt and how it goes on.
Asked = tuple[list[int], SamplingParams]

#: What helps where a step does not fit beside the KV cache.
MORE_MEMORY = (
    "\nA step needs more memory than lies beside the KV cache: try a smaller --mem-fraction or "
    "--kv-cache-tokens, or a smaller --chunked-prefill-size"
)

#: Rows of the vocabulary's product: up to here every number is tried, beyond it some.
EACH, COARSE = 512, 64

#: New tokens of a prompt of which the rest is found in the prefix cache.
FEW = 256


def warm_up(llm: LLM) -> None:
    """Run every kind of step once: short prompts, long ones, a few tokens behind a long beginning, decode
    alone and beside a prompt, greedy and drawn tokens; on a GPU, prompts of several lengths and every
    number of rows that are looked at, too. The engine has forgotten it all then. Processes of a
    tensor-parallel engine do it together.

    Raises:
        HeadwayError: the model cannot generate this way, with the reason.
    """
    for number, wave in enumerate(waves(llm)):
        _ask(llm, number, wave)
        _step(llm)
        while llm.stats().waiting:  # for pages; together with the next they would be other steps
            _step(llm)
    _finish(llm)
    for number, wave in enumerate(large_steps(llm)):
        _ask(llm, number, wave)
        _finish(llm)
    llm.forget()
    if llm.device.type != "cpu" and llm.config.tensor_parallel_size == 1:
        look_at_rows(llm)


@torch.inference_mode()
def look_at_rows(llm: LLM) -> None:
    """Multiply by the vocabulary any number of rows that a step has of decoding sequences and new ones."""
    config = llm.config
    model: Any = llm.model
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:  # some that are derived from it hold weights in other forms
        return
    rows = (config.max_running_requests or 1) * (1 + config.most_guesses)
    hidden = torch.zeros(1, rows, head.in_features, dtype=head.weight.dtype, device=llm.device)
    for count in (*range(1, min(rows, EACH) + 1), *range(EACH + COARSE, rows + 1, COARSE)):
        head(hidden[:, :count])


def warmed_up(config: EngineConfig) -> LLM:
    """An engine that has run every kind of step once."""
    llm = LLM(config, progress=True)
    warm_up(llm)
    return llm


def waves(llm: LLM) -> Sequence[Sequence[Asked]]:
    """Requests that begin a step after those before them."""
    room = llm.max_model_len - 1
    greedy = SamplingParams(max_tokens=min(6, room), temperature=0, seed=0, ignore_eos=True)
    short = min(8, llm.max_model_len - greedy.max_tokens)
    first = [([0] * short, greedy)]
    if llm.device.type == "cpu":  # compiles nothing that depends on lengths
        return [first]
    last = SamplingParams(max_tokens=1, temperature=0, seed=0, ignore_eos=True)
    drawn = SamplingParams(
        max_tokens=1, temperature=1, top_p=0.9, top_k=8, logprobs=1, seed=0, ignore_eos=True
    )
    longest = _longest(llm, short + greedy.max_tokens)
    if longest < 1:
        return [first, [([1], drawn)]]
    few = min(FEW, longest // 2)
    long, behind_it = [0] * longest, [0] * (longest - few) + [1] * few
    return [first, [(long, last), ([1], drawn)], [(behind_it, last)]]


def _longest(llm: LLM, beside: int = 0) -> int:
    """Tokens of a prompt that one step computes, where a sequence of so many has its pages, too."""
    pages = llm.stats().pages_total - pages_for(beside, llm.config.page_size)
    pages -= beside > 0  # the spare one that each running sequence is kept
    chunk = llm.config.chunked_prefill_size or 1
    return min(chunk, llm.max_model_len - 1, pages * llm.config.page_size)


def large_steps(llm: LLM) -> Iterator[Sequence[Asked]]:
    """Prompts that fill a step, or most of it, together: none begins like another, so that nothing of it is
    found in the prefix cache."""
    if llm.device.type == "cpu":
        return
    last = SamplingParams(max_tokens=1, temperature=0, seed=0, ignore_eos=True)
    longest, size = _longest(llm), llm.config.page_size
    chunk = llm.config.chunked_prefill_size or 1
    most = min(-(-chunk // longest), llm.config.max_running_requests or 1)
    # Each of several prompts may leave a page half empty, and all but one have one to spare.
    room = (llm.stats().pages_total - 2 * most + 1) * size
    full = max(longest, min(chunk, most * longest, room))
    tokens = itertools.count(2)  # behind those of the waves
    for length in (full, *lengths_below(full)):
        parts = (min(longest, length - at) for at in range(0, length, longest))
        yield [([next(tokens) % llm.model_config.vocab_size] * part, last) for part in parts]


def lengths_below(full: int) -> Iterator[int]:
    """Tokens of prompts in steps that are neither full nor small, which run in captured pieces: most
    tokens first, so that what such a step leaves of memory holds the others."""
    from headway.engine.pieces import FULL, MOST_ROWS

    length = int(full * FULL)
    while length > MOST_ROWS:
        yield length
        length = length * 3 // 4


def _ask(llm: LLM, number: int, wave: Sequence[Asked]) -> None:
    for index, (prompt, params) in enumerate(wave):
        llm.add_request(f"warm-up {number}.{index}", prompt, params)


def _finish(llm: LLM) -> None:
    while llm.has_unfinished():
        _step(llm)


def _step(llm: LLM) -> None:
    for output in llm.step():
        if output.error is not None:
            for name in llm.unfinished():
                llm.abort(name)
            advice = MORE_MEMORY if "out of memory" in output.error else ""
            raise HeadwayError(f"the model cannot generate this way: {output.error}{advice}")
