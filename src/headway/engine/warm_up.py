"""Before the first client: what its request would wait for is compiled, and what cannot run is found.

On a GPU that is more than kernels of Headway's: the library of products loads a kernel when a number of
rows first needs it, and memory is asked for when a step first needs it. Both wait until the device is idle,
which costs a service as much as two steps, each time.
"""

from __future__ import annotations

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
        for index, (prompt, params) in enumerate(wave):
            llm.add_request(f"warm-up {number}.{index}", prompt, params)
        _step(llm)
        while llm.stats().waiting:  # for pages; together with the next they would be other steps
            _step(llm)
    while llm.has_unfinished():
        _step(llm)
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
    guesses = config.num_draft_tokens if config.speculative == "ngram" else 0
    rows = (config.max_running_requests or 1) * (1 + guesses)
    hidden = torch.zeros(1, rows, head.in_features, dtype=head.weight.dtype, device=llm.device)
    for count in range(1, rows + 1):
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
    # Beside the first wave's, and the spare one that each running sequence is kept.
    pages = llm.stats().pages_total - 1
    pages -= pages_for(short + greedy.max_tokens, llm.config.page_size)
    longest = min(llm.config.chunked_prefill_size or 1, room, pages * llm.config.page_size)
    if longest < 1:
        return [first, [([1], drawn)]]
    few = min(FEW, longest // 2)
    long, behind_it = [0] * longest, [0] * (longest - few) + [1] * few
    vocabulary = llm.model_config.vocab_size
    between = enumerate(lengths_below(longest), 2)
    return [
        first,
        [(long, last), ([1], drawn)],
        [(behind_it, last)],
        *([([number % vocabulary] * length, last)] for number, length in between),
    ]


def lengths_below(longest: int) -> Iterator[int]:
    """Of prompts that are neither full steps nor small ones, which run in captured pieces: the longest
    first, so that what it leaves of memory holds the others."""
    from headway.engine.pieces import FULL, MOST_ROWS

    length = int(longest * FULL)
    while length > MOST_ROWS:
        yield length
        length = length * 3 // 4


def _step(llm: LLM) -> None:
    for output in llm.step():
        if output.error is not None:
            for name in llm.unfinished():
                llm.abort(name)
            advice = MORE_MEMORY if "out of memory" in output.error else ""
            raise HeadwayError(f"the model cannot generate this way: {output.error}{advice}")
