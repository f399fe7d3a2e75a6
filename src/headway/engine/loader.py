"""Loading: a folder of safetensors, a GGUF file or a hub name becomes a model and a tokenizer."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PretrainedConfig,
)
from transformers.distributed import DistributedConfig
from transformers.utils import logging as transformers_logging

from headway import devices
from headway.engine import parallel
from headway.engine.attention import ATTENTION_NAME
from headway.engine.config import EngineConfig
from headway.errors import InvalidInputError, UnsupportedError

#: Rotary embeddings whose frequencies depend on the longest position of a call. In a batch they would
#: mix up its sequences, so such models run within the range where the frequencies are constant.
LENGTH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, and what the engine must know about it."""

    model: nn.Module
    config: PretrainedConfig  # of the text model
    tokenizer: Any  # a transformers tokenizer, or None
    name: str
    max_model_len: int
    eos_token_ids: frozenset[int]


@dataclass(frozen=True)
class Source:
    """Where a model comes from, in the words of ``from_pretrained``."""

    name_or_path: str
    gguf_file: str | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        return {} if self.gguf_file is None else {"gguf_file": self.gguf_file}


def load(config: EngineConfig, *, progress: bool = False) -> LoadedModel:
    """Load a model and its tokenizer as the configuration says.

    Raises:
        InvalidInputError: nothing to load there, or not what ``load_format`` says.
        UnsupportedError: a model the engine cannot run.
    """
    source = find(config)
    device = parallel.join(config.tensor_parallel_size, devices.choose(config.device))
    config = dataclasses.replace(config, device=str(device))
    title = f"Loading {Path(config.model).name}"
    with _progress(title, show=progress), _shared_gguf_reader(source):
        model_config = load_config(config, source)
        check_shares(model_config, config.tensor_parallel_size)
        if config.max_model_len is not None:  # what is beyond the model's limit is refused early
            max_model_len(config, model_config.get_text_config())
        tokenizer = _load_tokenizer(config, source)
        model = load_model(config, source, model_config)
    if config.tensor_parallel_size == 1:  # parts are where they belong
        nn.Module.to(model, device)
    model.eval().requires_grad_(False)
    text_config = model.config.get_text_config()
    return LoadedModel(
        model=model,
        config=text_config,
        tokenizer=tokenizer,
        name=config.model,
        max_model_len=max_model_len(config, text_config),
        eos_token_ids=_eos_token_ids(model, tokenizer),
    )


def check_shares(model_config: PretrainedConfig, size: int) -> None:
    """See that every process gets whole heads, where transformers shares attention out at all.

    Raises:
        InvalidInputError: the heads cannot be shared by so many.
    """
    text_config = model_config.get_text_config()
    plan = getattr(text_config, "base_model_tp_plan", None) or {}
    if size == 1 or not any(name.endswith(".k_proj") for name in plan):
        return
    heads = text_config.num_attention_heads
    layers = getattr(text_config, "per_layer_config", None) or [text_config]
    shared = sorted({getattr(one, "num_key_value_heads", None) or heads for one in layers})
    most = math.gcd(heads, *shared)
    if most % size:
        sizes = ", ".join(str(n) for n in range(1, most + 1) if most % n == 0)
        of_keys = " or ".join(map(str, shared))
        wanted = f"{sizes}: {heads} query heads and {of_keys} of keys are shared out whole"
        raise InvalidInputError("tensor_parallel_size", size, wanted)


def find(config: EngineConfig) -> Source:
    """What ``config.model`` names, as far as the file system can tell."""
    path = Path(config.model)
    if (
        path.is_file()
        and path.suffix == ".gguf"
        and config.load_format in ("auto", "gguf", "dummy")
    ):
        return Source(str(path.parent), path.name)
    if config.load_format == "gguf":
        files = sorted(path.glob("*.gguf")) if path.is_dir() else []
        if len(files) != 1:
            raise InvalidInputError(
                "model", config.model, f"a .gguf file, or a folder with one (found {len(files)})"
            )
        return Source(str(path), files[0].name)
    if path.is_file():
        if config.load_format != "dummy":
            raise InvalidInputError(
                "model", config.model, "a folder, a .gguf file, or a config with load_format=dummy"
            )
        return Source(str(path))
    if path.is_dir() and not (path / "config.json").is_file():
        raise InvalidInputError("model", config.model, "a folder that has a config.json")
    local = path.is_absolute() or config.model.startswith((".", "~")) or path.suffix == ".gguf"
    if not path.is_dir() and local:
        raise InvalidInputError("model", config.model, "a path that exists, or a hub name")
    return Source(config.model)


def load_config(config: EngineConfig, source: Source) -> PretrainedConfig:
    """The configuration of a checkpoint; nothing else of it is read."""
    with hub_errors(config.model):
        return AutoConfig.from_pretrained(
            source.name_or_path,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            **source.arguments,
        )


def load_model(
    config: EngineConfig, source: Source, model_config: PretrainedConfig
) -> transformers.PreTrainedModel:
    """The model with Headway's attention in it; UnsupportedError where it cannot be exchanged."""
    try:
        model = _build_model(config, source, model_config)
    except KeyError as error:
        if error.args != (ATTENTION_NAME,):
            raise
        model = None  # older models look their attention up in a table of their own
    if model is None or not model.is_backend_compatible():
        raise UnsupportedError(
            f"{model_config.model_type} models do not let their attention be exchanged "
            "(transformers: _supports_attention_backend)"
        )
    return model


def _build_model(
    config: EngineConfig, source: Source, model_config: PretrainedConfig
) -> transformers.PreTrainedModel:
    arguments = {
        "dtype": checkpoint_dtype(config, source, model_config),
        "attn_implementation": ATTENTION_NAME,
        "trust_remote_code": config.trust_remote_code,
    }
    if config.load_format == "dummy":
        # Drawn where they are wanted, unless someone (a probe without weights) has a place of their own.
        place = devices.choose(config.device) if torch.get_default_device().type == "cpu" else None
        with torch.random.fork_rng(), place or contextlib.nullcontext(), hub_errors(config.model):
            torch.manual_seed(config.seed)
            model = AutoModelForCausalLM.from_config(model_config, **arguments)
        return _distributed(model, config.tensor_parallel_size)
    if config.tensor_parallel_size > 1:
        layout = DistributedConfig(tp_size=config.tensor_parallel_size)
        arguments |= {"distributed_config": layout}
    with hub_errors(config.model):
        return AutoModelForCausalLM.from_pretrained(
            source.name_or_path,
            config=model_config,
            revision=config.revision,
            **source.arguments,
            **arguments,
            **_unpacked(source),
        )


def _distributed(model: transformers.PreTrainedModel, size: int) -> transformers.PreTrainedModel:
    """This process's part of a model that every one of them has drawn alike."""
    if size == 1:
        return model
    layout, _, mesh = model.prepare_distribute_model(DistributedConfig(tp_size=size))
    head: Any = model.get_output_embeddings()
    tied = head is not None and head.weight is model.get_input_embeddings().weight
    if tied:  # the plan names both; their parts are the same rows, so they are one again then
        head.weight = nn.Parameter(head.weight.detach().clone())
    model = model.maybe_distribute_model(model, layout, mesh)
    if tied:
        model.tie_weights()
    return model


def _unpacked(source: Source) -> dict[str, Any]:
    """GGUF weights become plain tensors: modules that keep them packed compute in float32 only."""
    if source.gguf_file is None:
        return {}
    return {"quantization_config": GgufConfig(gguf_file=source.gguf_file, dequantize=True)}


def checkpoint_dtype(
    config: EngineConfig, source: Source, model_config: PretrainedConfig
) -> torch.dtype:
    """The checkpoint's dtype; bfloat16 for GGUF, whose tensors are quantised and unpacked on loading."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    if source.gguf_file is not None:
        return torch.bfloat16
    stored = getattr(model_config.get_text_config(), "dtype", None) or model_config.dtype
    return stored if isinstance(stored, torch.dtype) else torch.float32


def _load_tokenizer(config: EngineConfig, source: Source) -> Any:
    """The model's own tokenizer or the one asked for; None for a bare config, which has none."""
    arguments: dict[str, Any] = {
        "revision": config.revision,
        "trust_remote_code": config.trust_remote_code,
    }
    if config.tokenizer is not None:
        named = find(EngineConfig(model=config.tokenizer)) if _is_gguf(config.tokenizer) else None
        place = Source(config.tokenizer) if named is None else named
        with hub_errors(config.tokenizer, "tokenizer"):
            return AutoTokenizer.from_pretrained(place.name_or_path, **place.arguments, **arguments)
    path = Path(source.name_or_path)
    bare = path.is_file() or (
        path.is_dir() and source.gguf_file is None and not any(path.glob("tokenizer*"))
    )
    if bare:
        return None
    with hub_errors(config.model):
        return AutoTokenizer.from_pretrained(source.name_or_path, **source.arguments, **arguments)


def _is_gguf(name: str) -> bool:
    return name.endswith(".gguf")


@contextlib.contextmanager
def hub_errors(name: str, argument: str = "model") -> Iterator[None]:
    """transformers says OSError for all that is missing, and ValueError for kinds it does not know."""
    try:
        yield
    except (OSError, ValueError) as error:
        first_line = (
            str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        )
        wanted = "a folder, a .gguf file, or a reachable hub name"
        if first_line.startswith("Unrecognized configuration class"):
            wanted = "a model that transformers has as a causal language model"
        raise InvalidInputError(argument, f"{name} ({first_line})", wanted) from error


def max_model_len(config: EngineConfig, text_config: PretrainedConfig) -> int:
    """The model's own limit, or the smaller one asked for."""
    limit = getattr(text_config, "max_position_embeddings", None)
    reason = "the model's max_position_embeddings"
    for rope in _rope_parameters(text_config):
        if rope.get("rope_type") in LENGTH_DEPENDENT_ROPE:
            limit = rope.get("original_max_position_embeddings") or getattr(
                text_config, "original_max_position_embeddings", limit
            )
            reason = f"where its {rope['rope_type']} rotary embedding is the same for all lengths"
    if limit is None:
        if config.max_model_len is None:
            raise InvalidInputError("max_model_len", None, "a length: the model states no limit")
        return config.max_model_len
    if config.max_model_len is not None and config.max_model_len > limit:
        raise InvalidInputError("max_model_len", config.max_model_len, f"at most {limit}, {reason}")
    return config.max_model_len or int(limit)


def _rope_parameters(text_config: PretrainedConfig) -> list[dict[str, Any]]:
    """One set of parameters, or one per layer type."""
    parameters = getattr(text_config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or [parameters]


def _eos_token_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Everything that ends an answer: the generation config's tokens and the tokenizer's."""
    ids: set[int] = set()
    for owner in (model.generation_config, tokenizer):
        stated = getattr(owner, "eos_token_id", None)
        ids.update([stated] if isinstance(stated, int) else stated or ())
    return frozenset(ids)


def _gguf() -> Any:
    """The package that reads GGUF files, which nothing else needs."""
    try:
        import gguf
    except ModuleNotFoundError:
        wanted = "the package gguf for GGUF files: pip install gguf"
        raise InvalidInputError("model", "a GGUF file", wanted) from None
    return gguf


@contextlib.contextmanager
def _shared_gguf_reader(source: Source) -> Iterator[None]:
    """Let transformers read a GGUF header once.

    It does so for the configuration, for the tokenizer and for the weights, and each time takes seconds
    (2.8 s for a vocabulary of 49,152 tokens).
    """
    if source.gguf_file is None:
        yield
        return
    gguf = _gguf()
    original = gguf.GGUFReader
    gguf.GGUFReader = functools.cache(original)
    try:
        yield
    finally:
        gguf.GGUFReader = original


# --- progress ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def _progress(title: str, *, show: bool) -> Iterator[None]:
    """Draw transformers' progress with rich, or not at all, and give its hooks back afterwards."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from transformers import modeling_gguf_pytorch_utils as gguf_loading

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, disable=not show) as bars:
        total = bars.add_task(title, total=None)

        def draw(
            factory: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]
        ) -> Any:
            return _Bar(bars, *arguments, **options)

        previous_hook = transformers_logging.set_tqdm_hook(draw)
        # The GGUF reader alone imports tqdm by itself.
        previous_tqdm, gguf_loading.tqdm = gguf_loading.tqdm, transformers_logging.tqdm
        try:
            yield
        finally:
            gguf_loading.tqdm = previous_tqdm
            transformers_logging.set_tqdm_hook(previous_hook)
            bars.update(total, total=1, completed=1)


class _Bar:
    """The part of tqdm that transformers uses while loading, drawn as a task of a rich display."""

    def __init__(
        self, bars: Any, iterable: Iterable[Any] | None = None, *_: Any, **options: Any
    ) -> None:
        self._bars = bars
        self._iterable = iterable
        total = options.get("total")
        if total is None and hasattr(iterable, "__len__"):
            total = len(iterable)  # type: ignore[arg-type]
        self._task = bars.add_task(f"  {options.get('desc') or 'working'}", total=total)

    def __iter__(self) -> Iterator[Any]:
        for item in self._iterable or ():
            yield item
            self._bars.advance(self._task)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, n: float = 1) -> None:
        self._bars.advance(self._task, n)

    def set_description(self, text: str, *_: object, **__: object) -> None:
        self._bars.update(self._task, description=f"  {text}")

    def set_postfix(self, *_: object, **__: object) -> None:
        """Details behind the bar are not shown."""

    def close(self) -> None:
        """The display closes all its bars together."""
