"""Greedy text from vLLM in this process, and who attended: MODEL TARGET PROMPTS [FLAGS...]."""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
)

from vllm import LLM, EngineArgs, SamplingParams
from vllm.utils.argparse_utils import FlexibleArgumentParser


def spy_on(implementation: type, method: str, layers: dict[str, set[str]]) -> None:
    """Note in which layers a class attends to a real batch."""
    original = getattr(implementation, method)

    def attend(self: Any, *args: Any, **kwargs: Any) -> Any:
        # forward(layer, .., metadata, output); forward_mqa(q, cache, metadata, layer)
        layer = args[0] if method == "forward" else args[3]
        metadata = args[5] if method == "forward" else args[2]
        if metadata is not None:
            layers[type(self).__name__].add(layer.layer_name)
        return original(self, *args, **kwargs)

    setattr(implementation, method, attend)


def main() -> None:
    model, target, prompts, *flags = sys.argv[1:]
    layers: dict[str, set[str]] = defaultdict(set)
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    common = [
        "--dtype",
        "float32",
        "--max-model-len",
        "512",
        "--max-num-seqs",
        "8",
        "--enforce-eager",
    ]
    arguments = parser.parse_args(["--model", model, *common, *flags])
    engine = EngineArgs.from_cli_args(arguments)
    llm = LLM(**{name: getattr(engine, name) for name in vars(arguments) if hasattr(engine, name)})
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl
    from vllm.v1.attention.backends.mla.cpu_mla import CPUMLAImpl

    from headway.integrations.vllm import HeadwayImpl
    from headway.integrations.vllm_mla import HeadwayMLAImpl

    for one in (HeadwayImpl, CPUAttentionBackendImpl):
        spy_on(one, "forward", layers)
    for one in (HeadwayMLAImpl, CPUMLAImpl):
        spy_on(one, "forward_mqa", layers)
    outputs = llm.generate(
        json.loads(prompts), SamplingParams(temperature=0, max_tokens=24), use_tqdm=False
    )
    result = {
        "texts": [output.outputs[0].text for output in outputs],
        "layers": {name: len(found) for name, found in layers.items()},
    }
    Path(target).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
