"""Prints which kernels the engine launches for a model that ``headway compile`` does not compile for it.

The engine itself runs here, on meta tensors that stand for a GPU: requests, scheduler, graphs, sampler.
Nothing is compiled: a kernel is known by the key under which Triton's cache keeps it. A program of its own
because the tests run Triton's interpreter, which a process chooses once.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import multiprocessing
import random
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import triton.compiler
import triton.runtime.jit
from torch import Tensor
from triton.compiler.compiler import get_cache_invalidating_env_vars, make_backend
from triton.runtime.cache import get_cache_key

from headway import precompile
from headway.engine import describe, fusion, llm, loader, pieces, rehearsal, trial
from headway.engine.blocks import style_of
from headway.engine.config import EngineConfig
from headway.engine.fused_layer import Norm
from headway.engine.kv_cache import KVCache
from headway.engine.request import SamplingParams
from headway.engine.transfer import Download
from headway.engine.warm_up import warm_up
from headway.kernels import compile as ahead
from headway.kernels.norm_style import NormStyle

#: New tokens of requests that come one after the other, to an engine that decodes the ones before.
PROMPTS = (8, 1, 300, 17, 40, 5, 70, 1000, 2500, 333, 2, 640, 12)

#: Steps of random lengths.
RANDOM_STEPS = 100


class Known:
    """In the place of a compiled kernel: its key in Triton's cache."""

    def __init__(self, source: Any, target: Any, options: dict[str, Any]) -> None:
        backend = make_backend(target)
        parsed = backend.parse_options(options | source.parse_options())
        key = get_cache_key(source, backend, parsed, env_vars=get_cache_invalidating_env_vars())
        self.hash = hashlib.sha256(key.encode()).hexdigest()
        self.metadata = SimpleNamespace(shared=0)
        self.function, self.packed_metadata = 0, ()
        self.run = ahead._Launcher(None, None)
        self.src = source

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *arguments: None

    def launch_metadata(self, *arguments: object) -> None:
        return None


def compile_nothing(source: Any, target: Any = None, options: Any = None, **_: Any) -> Known:
    return Known(source, target, dict(options or {}))


def kernels(launch: Callable[[], None], target: str) -> dict[str, str]:
    """Key of every kernel that is launched, and what it is."""
    with ahead.stand_in(target) as launches:
        launch()
    failed = [one for one in launches if one.error is not None]
    if failed:
        raise RuntimeError(f"{failed[0].name} cannot be compiled") from failed[0].error
    return {one.kernel.hash: described(one) for one in launches}


def described(launch: ahead.Compiled) -> str:
    source = launch.kernel.src
    numbers = {k: v for k, v in launch.arguments.items() if isinstance(v, int | float | str)}
    return f"{launch.name} {numbers} {list(source.signature.values())} {source.constants}"


# --- what is compiled -------------------------------------------------------------------------------


def compiled(config: EngineConfig, target: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for case in precompile.model_cases(config):
        if target in case.targets:
            found |= kernels(case.launch, target)
    return found


# --- what is launched -------------------------------------------------------------------------------


class MetaLLM(llm.LLM):
    """The engine as on a GPU, but for what a GPU alone can say."""

    def _accelerate(self, longest: int) -> Any:
        return fusion.fuse(self.model, longest)


def launched(config: EngineConfig, target: str) -> dict[str, str]:
    model, _ = describe.model_without_weights(config)
    text_config = model.config.get_text_config()
    limit = loader.max_model_len(config, text_config)
    model.eval().requires_grad_(False)
    loaded = loader.LoadedModel(model, text_config, None, "meta", limit, frozenset())
    resolved = EngineConfig.resolved
    replace(loader, "load", lambda config, progress: loaded)
    replace(EngineConfig, "resolved", lambda self, kind: resolved(self, "cuda"))
    replace(llm, "CudaRecorder", lambda device: record)
    # As large as servers have it: AMD's compiler looks at that.
    replace(llm, "KVCache", lambda shapes, pages, *rest: KVCache(shapes, rehearsal.PAGES, *rest))
    replace(
        Download, "wait", lambda self: [torch.ones(t.shape, dtype=t.dtype) for t in self._tensors]
    )
    replace(fusion, "_norm_of", norm_of)
    for module in (fusion, trial):  # what is tried agrees: meta tensors have no content to look at
        replace(module, "agree", lambda mine, theirs: mine.shape == theirs.shape)
    for module in (fusion, pieces):
        replace(module, "grown_alike", lambda before, after: True)
    return kernels(lambda: serve(MetaLLM(config)), target)


def norm_of(module: Any) -> Norm | None:
    """As fusion finds it, with its trials, whose outcome is that on a CPU."""
    style = style_of(module)
    if style is None:
        return None
    eps: Any = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    *others, norm = (Norm(module.weight, eps, one) for one in NormStyle if one <= style)
    for tried in (*others, norm):
        tried(module.weight.new_empty(1, trial.TRIAL_ROWS, module.weight.shape[0]))
    return norm


def replace(holder: object, name: str, value: object) -> None:
    setattr(holder, name, value)


def record(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A graph that is launched when it is captured, and then no more."""
    out = function()
    return lambda: out


def serve(engine: llm.LLM) -> None:
    """The first steps of a service: what ``headway serve`` warms up with, then requests one by one, of
    which some go on from others' prompts."""
    warm_up(engine)
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    for name, prompt in enumerate(prompts(engine.max_model_len - params.max_tokens - 1)):
        engine.add_request(str(name), prompt, params)
        for _ in range(3):
            failed = [one.error for one in engine.step() if one.error]
            if failed:
                raise RuntimeError(failed[0])
    while engine.has_unfinished():
        engine.step()


def prompts(longest: int) -> Iterator[list[int]]:
    for number, length in enumerate(PROMPTS):
        yield [number % 50 + 1] * min(length, longest)
    yield [3] * min(longest - longest // 4, 300) + [4] * min(
        longest // 4, 23
    )  # begins as the third


# --- what else could be launched --------------------------------------------------------------------


def at_random(config: EngineConfig, target: str) -> dict[str, str]:
    """What steps of random lengths launch in every kind of layer."""
    cases = precompile.model_cases(config)
    layers = {id(one): one for case in cases if (one := rehearsal_of(case)) is not None}
    found: dict[str, str] = {}
    for one in layers.values():
        stage, draws = rehearsal._Stage(one), random.Random(0)
        steps = [random_step(draws, one.max_model_len) for _ in range(RANDOM_STEPS)]
        found |= kernels(functools.partial(run, stage, steps), target)
    return found


def run(stage: rehearsal._Stage, steps: list[list[tuple[int, int]]]) -> None:
    for step in steps:
        if step:
            stage.step(step)


def rehearsal_of(case: ahead.Case) -> rehearsal.Rehearsal | None:
    owner = getattr(getattr(case.launch, "func", case.launch), "__self__", None)
    return owner if isinstance(owner, rehearsal.Rehearsal) else None


def random_step(draws: random.Random, longest: int) -> list[tuple[int, int]]:
    """Sequences, each (tokens in the cache, new tokens), decoding ones first."""
    most_new, most_cached = (2 ** draws.uniform(0, math.log2(longest)) for _ in range(2))
    step = [(draws.randint(16, longest - 1), 1) for _ in range(draws.choice((0, 0, 1, 3, 9)))]
    for _ in range(int(2 ** draws.uniform(0, 3))):
        new = math.ceil(draws.uniform(0.5, 1) * most_new)
        cached = min(int(draws.uniform(0.3, 1) * most_cached), longest - new)
        if sum(new for _, new in step) + new <= 16384:
            step.append((cached, new))
    return step


def in_fresh_process(function: Callable[[EngineConfig, str], dict[str, str]], *given: Any) -> Any:
    """What launchers keep from call to call must not hide what a process of its own compiles."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, given)


def compared(config: EngineConfig, target: str) -> dict[str, Any]:
    """What is launched, and what of it ``headway compile`` leaves out; nothing is compiled for it."""
    triton.compiler.compile = compile_nothing
    there, wanted = (in_fresh_process(one, config, target) for one in (compiled, launched))
    wanted |= in_fresh_process(at_random, config, target)
    missing = [what for key, what in wanted.items() if key not in there]
    return {"names": sorted({what.split()[0] for what in wanted.values()}), "missing": missing}


def looked_up(config: EngineConfig, target: str) -> dict[str, Any]:
    """What is launched, and what of it is not in Triton's cache on this machine."""
    missing: list[str] = []

    def listen(*, src: Any, cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            missing.append(src.name)

    triton.knobs.compilation.listener = listen
    names = {what.split()[0] for what in launched(config, target).values()}
    return {"names": sorted(names), "missing": missing}


if __name__ == "__main__":
    ahead._forget_kernels()  # imports them: processes that are forked all have the same
    how = {"compared": compared, "looked-up": looked_up}[sys.argv[1]]
    for words in sys.argv[2:]:
        target, settings = json.loads(words)
        print(json.dumps(how(EngineConfig(**settings), target)), flush=True)
