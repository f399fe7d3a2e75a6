"""Does the engine say what transformers says? Greedy answers of both, on one device, token by token.

``python -m headway.bench.agreement --output reading.json`` builds small models with random weights (or
loads the one given), lets transformers generate with its own attention, and the engine under each setting.
In 16 bits two right computations may part where two tokens are nearly as likely. Where they do,
transformers itself tells how near: the difference of its logits for the two tokens, beside what its own
rounding is worth there, the largest difference between its logits in 16 bits and in float32.
"""

from __future__ import annotations

import gc
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import typer
from torch import Tensor

from headway import devices
from headway.bench import report
from headway.engine import parallel
from headway.engine.config import EngineConfig
from headway.engine.request import SamplingParams
from headway.errors import HeadwayError, InvalidInputError

if TYPE_CHECKING:
    import transformers

VOCABULARY = 1024

#: A token may be this many times the rounding of a logit behind the best: both of them are rounded.
NEAR = 2.0

_COMMON: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 2048,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
    # Larger, and attention looks at one token alone: what is then rounded differently is another token.
    "initializer_range": 0.04,
}


def _config(kind: str, **fields: Any) -> Callable[[], transformers.PretrainedConfig]:
    def make() -> transformers.PretrainedConfig:
        import transformers

        made: transformers.PretrainedConfig = getattr(transformers, kind)(**{**_COMMON, **fields})
        return made

    return make


#: Small models with the head dims of the real ones. Every token goes to every expert: which ones it goes to
#: has near-ties of its own, whose outcome is no rounding.
MODELS: Mapping[str, Callable[[], transformers.PretrainedConfig]] = {
    "smollm2": _config(
        "LlamaConfig", hidden_size=576, num_attention_heads=9, num_key_value_heads=3, head_dim=64
    ),
    "qwen3": _config("Qwen3Config", head_dim=128),
    "gemma3": _config(
        "Gemma3TextConfig",
        head_dim=256,
        num_attention_heads=4,
        sliding_window=40,
        layer_types=["sliding_attention", "full_attention"] * 2,
        query_pre_attn_scalar=256,
    ),
    "gpt_oss": _config(
        "GptOssConfig",
        head_dim=64,
        sliding_window=40,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_local_experts=4,
        num_experts_per_tok=4,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "deepseek_v3": _config(
        "DeepseekV3Config",
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=64,
        q_lora_rank=128,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        n_routed_experts=4,
        num_experts_per_tok=4,
        moe_intermediate_size=128,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=2,
    ),
}

#: Ways to run the engine that must not change what it says.
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "chunks of 16": {"chunked_prefill_size": 16},
    "plain": {
        "cuda_graphs": False,
        "overlap": False,
        "disable_prefix_cache": True,
    },
    "speculative": {"speculative": "ngram"},
    "model's own modules": {"acceleration": "off"},
    "portable": {"attention_backend": "portable"},
}


@dataclass(frozen=True)
class Verdict:
    """One prompt's answer beside transformers'.

    Args:
        tokens: how many were compared; same: how many from the first on are the same.
        gap: how far transformers' own choice is ahead of the engine's where they part, in its logits.
        rounding: the largest error of its logits there.
        worst: the largest of such gaps over roundings, over all of the engine's tokens, each after the
            engine's own tokens before it.
    """

    tokens: int
    same: int
    gap: float
    rounding: float
    worst: float

    @property
    def verdict(self) -> Literal["equal", "near-tie", "different"]:
        if self.same == self.tokens:
            return "equal"
        return "near-tie" if self.gap <= NEAR * self.rounding else "different"


@dataclass(frozen=True)
class Judge:
    """transformers' model in its dtype and in float32."""

    model: Any
    exact: Any

    def greedy(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        ids = torch.tensor([list(prompt)], device=self.model.device)
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        answer: list[int] = out[0, len(prompt) :].tolist()
        return answer

    def judge(self, prompt: Sequence[int], wanted: Sequence[int], got: Sequence[int]) -> Verdict:
        """``got`` beside ``wanted``, which :meth:`greedy` said."""
        same = next(
            (i for i, (a, b) in enumerate(zip(wanted, got, strict=True)) if a != b), len(wanted)
        )
        logits, rounding = self._logits(prompt, got)
        mine = logits.gather(-1, torch.tensor(got, device=logits.device)[:, None])[:, 0]
        behind = (logits.amax(-1) - mine) / rounding.clamp(min=1e-12)
        gap = error = 0.0
        if same < len(got):
            gap = float((logits[same, wanted[same]] - logits[same, got[same]]).abs())
            error = float(rounding[same])
        return Verdict(len(got), same, gap, error, float(behind.max()))

    def _logits(self, prompt: Sequence[int], answer: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(tokens, vocabulary) logits that each token of the answer was chosen by, and their errors."""
        ids = torch.tensor([[*prompt, *answer[:-1]]], device=self.model.device)
        with torch.inference_mode():
            rounded, exact = (
                model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :].float()
                for model in (self.model, self.exact)
            )
        return rounded, (rounded - exact).abs().amax(-1)


def prompts(vocabulary: int, seed: int = 0) -> list[list[int]]:
    """Ragged ones: some share a beginning of pages, some repeat themselves, one is another's twin."""
    draw = random.Random(seed)

    def text(length: int) -> list[int]:
        return [draw.randrange(vocabulary) for _ in range(length)]

    shared, loop = text(80), text(6)
    own = [text(n) for n in (1, 15, 16, 17, 70, 200)]
    return [*own, [*shared, 1], [*shared, 2, 3], shared, shared, loop * 8, [*loop * 5, 7]]


#: What a model that knows language is asked.
QUESTIONS = (
    "What is the capital of France?",
    "Name three primary colours.",
    "Why is the sky blue?",
    "Write a haiku about the sea.",
    "What is 12 times 12?",
    "Who wrote Hamlet?",
    "Explain gravity to a child.",
    "What does a compiler do?",
    "How many days are in a leap year?",
    "Tell me a short joke.",
    "Repeat after me: one two three, one two three, one two three.",
    "What is the boiling point of water?",
)


def questions(path: Path) -> list[list[int]] | None:
    """The questions as a model's own chats; None where it has no template for them."""
    from transformers import AutoTokenizer

    more = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    tokenizer: Any = AutoTokenizer.from_pretrained(path.parent if more else path, **more)
    if not getattr(tokenizer, "chat_template", None):
        return None
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    asked = []
    for chat in chats:
        encoded: Any = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_dict=True
        )
        asked.append(list(encoded["input_ids"]))
    return asked


def random_model(name: str, folder: Path, dtype: torch.dtype, device: torch.device) -> Judge:
    """Save a small model, every parameter random; returns it as transformers runs it."""
    import transformers

    # transformers has sinks in eager attention alone.
    attention = "eager" if name == "gpt_oss" else "sdpa"
    torch.manual_seed(sum(name.encode()))
    with device:
        model = transformers.AutoModelForCausalLM.from_config(
            MODELS[name](), attn_implementation=attention, dtype=dtype
        ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms, biases and sinks are constants as initialised
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    parallel.same(None)  # one process writes for all
    return loaded_model(folder, dtype, device, attention)


def loaded_model(
    path: Path, dtype: torch.dtype, device: torch.device, attention: str = "sdpa"
) -> Judge:
    """A saved model, or a GGUF file, as transformers runs it."""
    from transformers import AutoModelForCausalLM, GgufConfig

    more: dict[str, Any] = {"attn_implementation": attention}
    if path.suffix == ".gguf":
        more |= {"gguf_file": path.name}
        more |= {"quantization_config": GgufConfig(gguf_file=path.name, dequantize=True)}
        path = path.parent
    both = [AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **more) for _ in range(2)]
    model, exact = (torch.nn.Module.to(one, device).eval() for one in both)
    return Judge(model, exact.float())


def compare(
    name: str,
    config: EngineConfig,
    judge: Judge,
    asked: Sequence[Sequence[int]],
    wanted: Sequence[Sequence[int]],
    settings: Mapping[str, Mapping[str, Any]],
) -> Iterator[dict[str, Any]]:
    """A row per setting, with the verdicts of all prompts."""
    from dataclasses import replace

    from headway.engine.llm import LLM

    max_tokens = len(wanted[0])
    params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
    for label, changes in settings.items():
        start = time.perf_counter()
        row: dict[str, Any] = {"model": name, "setting": label}
        try:
            llm = LLM(replace(config, **changes))
            answers = llm.generate(asked, params)
            failed = next((one.error for one in answers if one.error is not None), None)
            if failed is not None:
                raise HeadwayError(failed)
        except Exception as error:  # the other settings are still worth a row
            yield row | {"error": f"{type(error).__name__}: {error}"}
            continue
        found = [
            judge.judge(prompt, want, one.token_ids)
            for prompt, want, one in zip(asked, wanted, answers, strict=True)
        ]
        counts = [one.verdict for one in found]
        yield row | {
            "prompts": len(found),
            **{word: counts.count(word) for word in ("equal", "near-tie", "different")},
            "worst": max(one.worst for one in found),
            "attention": type(llm.backend).__name__,
            "graphs": llm.has_graphs,
            "cached_tokens": sum(one.cached_tokens for one in answers),
            "pages_held": llm.stats().pages_used,
            "seconds": time.perf_counter() - start,
            "verdicts": [asdict(one) | {"verdict": one.verdict} for one in found],
        }
        del llm
        gc.collect()  # captured graphs and their engine refer to each other


COLUMNS = (
    report.Column("model", "model"),
    report.Column("setting", "setting"),
    report.Column("prompts", "prompts", "d"),
    report.Column("equal", "equal", "d"),
    report.Column("near-tie", "near-ties", "d"),
    report.Column("different", "different", "d"),
    report.Column("worst", "worst gap / rounding", ".2f"),
    report.Column("graphs", "graphs"),
    report.Column("cached_tokens", "cached", "d"),
    report.Column("error", "error"),
)


def run(
    models: Sequence[str],
    settings: Sequence[str],
    *,
    dtype: torch.dtype,
    device: torch.device,
    max_tokens: int,
    model_path: Path | None = None,
    tensor_parallel_size: int = 1,
    told: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """The rows of small models, or of the one at ``model_path`` under the first name."""
    rows = []
    ways = {label: SETTINGS[label] for label in settings}
    for name in models:
        with tempfile.TemporaryDirectory() as own:
            folder = parallel.same(own)
            if model_path is None:
                judge = random_model(name, Path(folder), dtype, device)
            else:
                judge = loaded_model(model_path, dtype, device)
            asked = None if model_path is None else questions(model_path)
            if asked is None:
                asked = prompts(judge.model.config.get_text_config().vocab_size)
            wanted = [judge.greedy(prompt, max_tokens) for prompt in asked]
            config = EngineConfig(
                model=str(model_path or folder),
                dtype=str(dtype).removeprefix("torch."),  # type: ignore[arg-type]
                device=str(device),
                kv_cache_tokens=4096,
                max_model_len=512,
                max_running_requests=16,
                tensor_parallel_size=tensor_parallel_size,
            )
            for row in compare(name, config, judge, asked, wanted, ways):
                rows.append(row)
                told(row)
            parallel.same(None)  # nobody reads the folder any more
    return rows


def command(
    models: Annotated[str, typer.Option(help="Small models, a list.")] = ",".join(MODELS),
    model_path: Annotated[
        Path | None, typer.Option(help="Instead: a folder of safetensors, or a GGUF file.")
    ] = None,
    settings: Annotated[str, typer.Option(help="Settings of the engine.")] = ",".join(SETTINGS),
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="Where both run.")] = "auto",
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 24,
    tensor_parallel_size: Annotated[
        int, typer.Option(help="Processes of torchrun that this is one of.")
    ] = 1,
    output: Annotated[Path | None, typer.Option(help="Write the reading here.")] = None,
) -> None:
    """Compare the engine's greedy answers with transformers' own."""
    names = [model_path.stem] if model_path is not None else models.split(",")
    asked = settings.split(",")
    if not set(asked) <= set(SETTINGS):
        raise InvalidInputError("settings", settings, ", ".join(SETTINGS))
    if model_path is None and not set(names) <= set(MODELS):
        raise InvalidInputError("models", models, ", ".join(MODELS))

    place = parallel.join(tensor_parallel_size, devices.choose(device))

    held = {"dtype": dtype, "max_tokens": max_tokens, "near": NEAR}
    held["tensor_parallel_size"] = tensor_parallel_size
    so_far: list[dict[str, Any]] = []

    def told(row: dict[str, Any]) -> None:
        shown = {key: value for key, value in row.items() if key != "verdicts"}
        print(shown, flush=True)
        so_far.append(row)
        if output is not None and parallel.rank() == 0:  # a run that is stopped has these
            report.Reading("agreement", held, so_far).save(output)

    rows = run(
        names,
        asked,
        dtype=getattr(torch, dtype),
        device=place,
        max_tokens=max_tokens,
        model_path=model_path,
        tensor_parallel_size=tensor_parallel_size,
        told=told,
    )
    if parallel.rank() > 0:
        return
    report.console().print(report.table(rows, COLUMNS, "greedy answers beside transformers'"))


if __name__ == "__main__":
    typer.run(command)
