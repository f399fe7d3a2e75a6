"""What each of two processes runs for test_parallel.py: engines together, a leader and a follower."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from headway.engine import parallel
from headway.engine.config import EngineConfig
from headway.engine.lead import Leader, follow
from headway.engine.llm import LLM
from headway.engine.request import SamplingParams

PROMPTS = [[(5 * i + n) % 256 for i in range(n)] for n in (1, 9, 33, 33)]
GREEDY = SamplingParams(max_tokens=12, temperature=0)
SAMPLED = SamplingParams(max_tokens=12, temperature=1.0, seed=5)


def answers(llm: LLM, params: SamplingParams = GREEDY) -> list[list[int]]:
    return [list(one.token_ids) for one in llm.generate(PROMPTS, params)]


def config(path: str, **settings: object) -> EngineConfig:
    return EngineConfig(
        model=path,
        dtype="float32",
        device="cpu",
        kv_cache_tokens=1024,
        tensor_parallel_size=2,
        **settings,  # type: ignore[arg-type]
    )


def lead(llm: Leader) -> list[list[int]]:
    """Requests that come and go at their own times, and one that is taken back."""
    said: dict[str, list[int]] = {}
    with llm:
        llm.add_request("0", PROMPTS[0], GREEDY)
        llm.add_request("gone", PROMPTS[2], GREEDY)
        for step in range(200):
            if step < len(PROMPTS) - 1:
                llm.add_request(str(step + 1), PROMPTS[step + 1], GREEDY)
            if step == 4:
                llm.abort("gone")
            for output in llm.step():
                said.setdefault(output.request_id, []).extend(output.new_token_ids)
            if not llm.has_unfinished():
                break
    return [said[str(i)] for i in range(len(PROMPTS))]


def main(folder: str, output: str) -> None:
    found: dict[str, object] = {}
    for name in ("llama", "deepseek_v3"):
        llm = LLM(config(f"{folder}/{name}", chunked_prefill_size=16))
        found[name] = answers(llm)
        found[f"{name} heads"] = [one.num_q_heads for one in llm.probe.layers.values()]
    found["sampled"] = answers(llm, SAMPLED)
    dummy = LLM(config(f"{folder}/llama", load_format="dummy"))
    found["dummy"] = answers(dummy)
    found["tied"] = answers(LLM(config(f"{folder}/tied", load_format="dummy")))
    if parallel.rank() == 0:
        found["lead"] = lead(Leader(config(f"{folder}/llama")))
    else:
        mirror = LLM(config(f"{folder}/llama"))
        follow(mirror)
        found["left"] = mirror.stats().pages_used
    Path(f"{output}.{parallel.rank()}").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
