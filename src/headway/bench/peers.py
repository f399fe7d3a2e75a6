"""Other engines on the same prompts in the same run, to stand beside what is measured.

A peer generates a batch and says how long it took, as :func:`headway.bench.generate.time_batch` does for
Headway. It gets the model as a plain safetensors folder, whatever Headway loaded.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headway.bench.serving import Sample
from headway.errors import HeadwayError, InvalidInputError


@dataclass(frozen=True)
class Run:
    """One batch, timed: seconds from the start to the first token of each sequence, and to the end.

    ``first_token_s`` is empty where a peer does not tell, and so is ``samples``: each sequence as a client
    of a server would have seen it.
    """

    first_token_s: tuple[float, ...]
    total_s: float
    samples: tuple[Sample, ...] = ()


class Peer(ABC):
    """An engine that can be timed."""

    name: str
    version: str

    @abstractmethod
    def generate(self, prompts: Sequence[Sequence[int]], output_len: int) -> Run:
        """Generate exactly ``output_len`` tokens, greedily, for all prompts together."""

    def close(self) -> None:
        """Give back what the peer holds."""
        return


class TransformersPeer(Peer):
    """transformers' ``generate`` with its sdpa attention, in this process."""

    name = "transformers"

    def __init__(self, model: Path, dtype: str, device: str) -> None:
        import torch
        import transformers

        self.version = transformers.__version__
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        )
        self._model = loaded.to(device).eval()
        self._model.generation_config = transformers.GenerationConfig(do_sample=False)

    def generate(self, prompts: Sequence[Sequence[int]], output_len: int) -> Run:
        import torch

        times: list[float] = []

        def note_time(*_: Any) -> torch.Tensor:
            times.append(time.perf_counter())
            return torch.zeros(len(prompts), dtype=torch.bool, device=ids.device)

        start = time.perf_counter()
        ids = torch.tensor([list(prompt) for prompt in prompts], device=self._model.device)
        with torch.inference_mode():
            out = self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=output_len,
                min_new_tokens=output_len,
                stopping_criteria=[note_time],
            )
        total = time.perf_counter() - start
        if out.shape[1] - ids.shape[1] != output_len:
            raise HeadwayError(f"transformers gave {out.shape[1] - ids.shape[1]} tokens")
        return Run((times[0] - start,) * len(prompts), total)


#: Runs inside vLLM's own environment: a line of JSON in, a line of JSON out, marked to tell it from logs.
_VLLM = """
import json, sys, time
import vllm
settings = json.loads(sys.argv[1])
answers = sys.stdout
sys.stdout = sys.stderr
llm = vllm.LLM(**settings)
def answer(value):
    print("HEADWAY " + json.dumps(value), file=answers, flush=True)
answer({"version": vllm.__version__})
for line in sys.stdin:
    asked = json.loads(line)
    params = vllm.SamplingParams(max_tokens=asked["output_len"], temperature=0.0, ignore_eos=True)
    prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    total = time.perf_counter() - start
    answer({"total_s": total, "tokens": [len(o.outputs[0].token_ids) for o in outputs]})
"""


_LOG_LINES = 20
_VLLM_MEMORY_SHARE = 0.3  # of the device's, CPU included: the other engines live there too


class VllmPeer(Peer):
    """vLLM, in processes of the Python environment where it is installed.

    They are stopped while others have their turn: vLLM's loops would take processor time from them.
    """

    name = "vllm"

    def __init__(self, model: Path, dtype: str, *, python: Path, max_model_len: int) -> None:
        settings = {
            "model": str(model),
            "dtype": dtype,
            "max_model_len": max_model_len,
            "enable_prefix_caching": False,
            "disable_log_stats": True,
            "gpu_memory_utilization": _VLLM_MEMORY_SHARE,
        }
        words = [str(python), "-c", _VLLM, json.dumps(settings)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 -- closed with the peer
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
            env=environment, start_new_session=True,
        )  # fmt: skip
        self.version = str(self._read()["version"])
        self._signal(signal.SIGSTOP)

    def _signal(self, which: signal.Signals) -> None:
        """To vLLM's processes, which are a group of their own."""
        os.killpg(self._process.pid, which)

    def generate(self, prompts: Sequence[Sequence[int]], output_len: int) -> Run:
        asked = {"prompts": [list(prompt) for prompt in prompts], "output_len": output_len}
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        answer = self._read()
        self._signal(signal.SIGSTOP)
        if answer["tokens"] != [output_len] * len(prompts):
            raise HeadwayError(f"vLLM gave {answer['tokens']} tokens; want {output_len} each")
        return Run((), answer["total_s"])

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("HEADWAY "):
                answer: dict[str, Any] = json.loads(line.removeprefix("HEADWAY "))
                return answer
        code = self._process.wait()
        self._log.seek(0)
        said = "".join(self._log.readlines()[-_LOG_LINES:])
        raise HeadwayError(f"vLLM ended with exit code {code}; the last it said:\n{said}")

    def close(self) -> None:
        if self._process.poll() is None:
            self._signal(signal.SIGCONT)
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


def export(model: str, dtype: str, folder: Path) -> Path:
    """The model as a folder of safetensors: itself if it is one, else (a GGUF file) unpacked there."""
    path = Path(model)
    if path.is_dir():
        return path
    if path.suffix != ".gguf" or not path.is_file():
        raise InvalidInputError(
            "model", model, "a local folder or GGUF file, to compare with peers"
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=getattr(torch, dtype),
        quantization_config=GgufConfig(gguf_file=path.name, dequantize=True),
    )
    loaded.config.__dict__.pop("quantization_config", None)  # what is saved is plain tensors
    loaded.save_pretrained(folder)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)
    return folder
