"""Another engine, timed beside Headway: a process that generates batches on request.

Runs alone, under the interpreter of the peer's own environment, and imports nothing of Headway:

    python generation_peer.py transformers|vllm MODEL_FOLDER DTYPE THREADS

Each line of standard input asks for one batch, ``{"prompts": [[ids..], ..], "output_len": n}``; each is
answered by a line ``{"seconds": s, "tokens": t}`` on the stream that was standard output at the start
(whatever the peer prints goes to standard error). The first line says ``{"ready": true, "version": v}``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

#: Takes prompts and a length, returns how many tokens were generated.
Generate = Callable[[list[list[int]], int], int]


def transformers_engine(model: str, dtype: str, threads: int) -> tuple[Generate, str]:
    import torch
    import transformers

    torch.set_num_threads(threads)
    network = transformers.AutoModelForCausalLM.from_pretrained(
        model, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    ).eval()

    def generate(prompts: list[list[int]], output_len: int) -> int:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            whole = network.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=output_len,
                min_new_tokens=output_len,
                do_sample=False,
                pad_token_id=0,
            )
        return int(whole[:, ids.shape[1] :].numel())

    return generate, transformers.__version__


def vllm_engine(model: str, dtype: str, threads: int) -> tuple[Generate, str]:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{threads - 1}")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    import vllm

    engine = vllm.LLM(
        model,
        dtype=dtype,
        skip_tokenizer_init=True,
        max_model_len=1024,
        max_num_seqs=64,
        enable_prefix_caching=False,
    )

    def generate(prompts: list[list[int]], output_len: int) -> int:
        params = vllm.SamplingParams(
            temperature=0,
            max_tokens=output_len,
            min_tokens=output_len,
            ignore_eos=True,
            detokenize=False,
        )
        inputs = [{"prompt_token_ids": ids} for ids in prompts]
        return sum(
            len(one.outputs[0].token_ids) for one in engine.generate(inputs, params, use_tqdm=False)
        )

    return generate, vllm.__version__


ENGINES: dict[str, Callable[[str, str, int], tuple[Generate, str]]] = {
    "transformers": transformers_engine,
    "vllm": vllm_engine,
}


def main() -> None:
    name, model, dtype, threads = sys.argv[1:5]
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print where they like; only answers may reach the parent
    generate, version = ENGINES[name](model, dtype, int(threads))

    def answer(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")

    answer({"ready": True, "version": version})
    for line in sys.stdin:
        batch = json.loads(line)
        start = time.perf_counter()
        tokens = generate(batch["prompts"], batch["output_len"])
        answer({"seconds": time.perf_counter() - start, "tokens": tokens})


if __name__ == "__main__":
    main()
