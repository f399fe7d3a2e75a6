"""What a service says of its engine when it is ready."""

from __future__ import annotations

from dataclasses import dataclass

from headway.engine import describe
from headway.engine.llm import LLM


@dataclass(frozen=True)
class Introduction:
    """In words."""

    dtype: str
    device: str
    context: str
    kv_cache: str
    attention: str


def introduction(llm: LLM) -> Introduction:
    tokens = llm.stats().pages_total * llm.config.page_size
    return Introduction(
        dtype=str(llm.dtype).removeprefix("torch."),
        device=str(llm.device),
        context=f"{llm.max_model_len} tokens",
        kv_cache=f"{tokens} tokens in pages of {llm.config.page_size}",
        attention=describe.chosen(describe.explain(llm.config, llm.probe, llm.dtype)),
    )
