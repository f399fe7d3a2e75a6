"""The command line: ``headway serve | generate | bench | explain | providers | compile``.

Nothing heavy is imported before a command needs it, so that help and mistakes are answered at once.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

try:
    import typer
    from typer.core import TyperGroup
except ModuleNotFoundError:
    sys.exit(
        "headway: the command line needs more packages: in Headway's clone, pip install '.[serve]'"
    )

import headway
from headway import flags
from headway.bench import evaluate
from headway.engine.config import EngineConfig
from headway.errors import HeadwayError, InvalidInputError

if TYPE_CHECKING:
    import torch

    from headway.engine.introduction import Introduction
    from headway.engine.llm import LLM
    from headway.engine.request import SamplingParams
    from headway.kernels.compile import Case
    from headway.precompile import Precompiled
    from headway.providers.base import Capabilities
    from headway.server.async_engine import Engine

#: How often long work that is not watched on a terminal says how far it is.
SECONDS_BETWEEN_LINES = 10.0

app = typer.Typer(
    name="headway",
    help="Flash attention for LLM serving.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # its tables cut long flags off
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """The entry point: mistakes of the user end in one line and exit code 2, not in a traceback."""
    try:
        app()
    except InvalidInputError as error:
        _fail(flags.as_flag(error, sys.argv[1:]))
    except HeadwayError as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "headway":
            raise
        _fail(f"{error.name} is not installed; in Headway's clone, pip install '.[serve]'")


def _fail(message: str) -> None:
    print(f"headway: {message}", file=sys.stderr)
    sys.exit(2)


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(f"headway {headway.__version__}")
        raise typer.Exit


# --- serve --------------------------------------------------------------------------------------------


@app.command()
@flags.takes(EngineConfig, "config")
def serve(
    config: EngineConfig,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free one.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="HEADWAY_API_KEY", help="Key that clients must send.")
    ] = None,
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="Name of the model for clients; may be repeated.")
    ] = None,
    drain_timeout: Annotated[
        float, typer.Option(min=0, help="Seconds that running requests get after SIGTERM.")
    ] = 60.0,
    access_log: Annotated[bool, typer.Option(help="Log every HTTP request.")] = False,
    engine_process: Annotated[
        bool | None,
        typer.Option(
            help="A process of its own for the engine, whose steps then do not wait while answers are "
            "written. Default: where the model runs on one GPU."
        ),
    ] = None,
) -> None:
    """Serve a model through an OpenAI-compatible HTTP API."""
    from headway.engine.collector import settled
    from headway.server import run
    from headway.server.context import ServerSettings

    names = tuple(served_model_name or (_display_name(config.model),))
    settings = ServerSettings(served_model_names=names, api_key=api_key)
    if config.tensor_parallel_size > 1:
        if engine_process:
            wanted = "False with tensor_parallel_size, whose processes are torchrun's"
            raise InvalidInputError("engine_process", engine_process, wanted)
        _serve_together(config)
    listener = run.bind(host, port)
    port = listener.getsockname()[1]
    shown = host if ":" not in host else f"[{host}]"
    apart = _on_one_gpu(config) if engine_process is None else engine_process
    with _engine(config, apart) as (engine, about):

        def ready() -> None:
            _introduce(about, names, f"http://{shown}:{port}/v1", api_key is not None)

        with settled():
            run.serve(
                engine,
                settings,
                listener,
                drain_timeout=drain_timeout,
                access_log=access_log,
                ready=ready,
            )


def _serve_together(config: EngineConfig) -> None:
    """Returns in the process that clients talk to; the others end here, after it."""
    from headway.engine import early, parallel

    early.launch(config)
    if parallel.launched_rank() == 0:
        return
    from headway.engine.collector import settled
    from headway.engine.lead import follow
    from headway.engine.warm_up import warm_up

    for number in (signal.SIGTERM, signal.SIGINT):  # the leader drains, and says when that was all
        signal.signal(number, signal.SIG_IGN)
    llm = _load(config)
    warm_up(llm)
    with settled():
        follow(llm)
    raise typer.Exit


def _on_one_gpu(config: EngineConfig) -> bool:
    if config.tensor_parallel_size > 1:
        return False
    if config.device != "auto":
        return config.device.startswith("cuda")
    import torch

    return torch.cuda.is_available()


@contextlib.contextmanager
def _engine(config: EngineConfig, apart: bool) -> Iterator[tuple[Engine, Introduction]]:
    """A warm engine, and what to say of it."""
    if apart:
        from headway.server.engine_process import EngineProcess

        _quieten_tokenizers()
        if config.trust_remote_code:  # its tokenizer and configuration are objects of its classes
            from transformers.dynamic_module_utils import init_hf_modules

            init_hf_modules()
        with EngineProcess(
            _warm_engine, config, ask=_introduction, meanwhile=_import_engine
        ) as process:
            yield process, process.answer
        return
    from headway.engine.lead import Leader
    from headway.engine.warm_up import warm_up

    llm = _load(config)
    warm_up(llm)
    with llm if isinstance(llm, Leader) else contextlib.nullcontext():
        yield llm, _introduction(llm)


def _warm_engine(config: EngineConfig) -> LLM:
    from headway.engine.warm_up import warmed_up

    return warmed_up(config)


def _introduction(llm: LLM) -> Introduction:
    from headway.engine.introduction import introduction

    return introduction(llm)


def _import_engine() -> None:
    """Tokenizer and configuration come from the engine's process as objects of classes that it knows."""
    import headway.engine.introduction  # noqa: F401


def _display_name(model: str) -> str:
    """A hub name as it is; a path by its last part."""
    path = Path(model)
    if not path.exists():
        return model
    return path.stem if path.is_file() else path.resolve().name


def _load(config: EngineConfig) -> LLM:
    _quieten_tokenizers()
    if config.tensor_parallel_size > 1:
        from headway.engine import parallel
        from headway.engine.lead import Leader

        if parallel.launched_rank() == 0:
            return Leader(config, progress=True)
    from headway.engine.llm import LLM

    return LLM(config, progress=True)


def _quieten_tokenizers() -> None:
    """Tokenizers warn about forks at every turn otherwise; the engine has threads of its own."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _introduce(about: Introduction, names: tuple[str, ...], url: str, key: bool) -> None:
    """What is being served, and how."""
    lines = (
        ("model", f"{', '.join(names)} ({about.dtype}, {about.device})"),
        ("context", about.context),
        ("KV cache", about.kv_cache),
        ("attention", about.attention),
        ("API", url + (" (with a key)" if key else "")),
    )
    print(f"Headway {headway.__version__} is ready")
    for label, text in lines:
        print(f"  {label:<10} {text}")
    sys.stdout.flush()


# --- generate -----------------------------------------------------------------------------------------


@app.command()
@flags.takes(EngineConfig, "config")
def generate(
    config: EngineConfig,
    prompt: Annotated[str, typer.Argument(help="What to say; - reads standard input.")],
    raw: Annotated[
        bool, typer.Option(help="Continue the text as it is, without the chat template.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="System message of the chat.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="0: no limit.")] = 0,
    min_p: Annotated[float, typer.Option(help="Least share of the likeliest token.")] = 0.0,
    stop: Annotated[list[str] | None, typer.Option(help="Stop string; may be repeated.")] = None,
    ignore_eos: Annotated[bool, typer.Option(help="Run to --max-tokens.")] = False,
) -> None:
    """Answer one prompt, printing the text as it comes."""
    from headway.engine.request import SamplingParams

    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        stop=tuple(stop or ()),
        ignore_eos=ignore_eos,
    )
    if raw and system is not None:
        raise InvalidInputError("system", "a message with --raw", "a chat, without --raw")
    text = sys.stdin.read() if prompt == "-" else prompt
    llm = _load(config)
    chat = not raw and bool(getattr(llm.tokenizer, "chat_template", None))
    if system is not None and not chat:
        raise InvalidInputError("system", "a message", "none: the model has no chat template")
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": text})
    tokens = llm.apply_chat_template(messages) if chat else llm.encode(text)
    _print_answer(llm, tokens, params)


def _print_answer(llm: LLM, tokens: list[int], params: SamplingParams) -> None:
    start = time.perf_counter()
    told: list[tuple[float, int]] = []  # when, and how many tokens there were then
    llm.add_request("generate", tokens, params)
    while llm.has_unfinished():
        for output in llm.step():
            if output.error is not None:
                raise HeadwayError(f"generation failed: {output.error}")
            told.append((time.perf_counter(), output.output_tokens))
            print(output.new_text, end="", flush=True)
    print()
    (first, begun), (last, count) = told[0], told[-1]
    summary = f"{len(tokens)} tokens in, {count} out; first after {first - start:.2f} s"
    if count > begun:
        summary += f", then {(count - begun) / (last - first):.1f} tok/s"
    print(summary, file=sys.stderr)


# --- explain and providers ----------------------------------------------------------------------------

_DTYPES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
    "fp8": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2",
}
DtypeName = Literal["bf16", "fp16", "fp32", "fp8", "fp8_e5m2"]

#: What the engine computes in and caches in, by the names above; None: as the model says.
_MODEL_DTYPES = {None: "auto", "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_CACHE_DTYPES = {None: "auto", "fp8": "fp8_e4m3"}


#: What a model says itself, by the names of the flags that say it where there is none.
_OF_A_CALL = (
    "heads",
    "head_dim",
    "causal",
    "window",
    "attention_chunk",
    "softcap",
    "sinks",
    "lse",
)


@app.command()
def explain(
    ctx: typer.Context,
    model: Annotated[
        str | None,
        typer.Option(
            help="Explain this model's calls: folder, config.json, GGUF file or hub name. Heads, dims "
            "and masks are the model's own; no weights are read."
        ),
    ] = None,
    heads: Annotated[str, typer.Option(help="Query heads / key-value heads.")] = "32/8",
    head_dim: Annotated[str, typer.Option(help="Of q and k, or q and k / v.")] = "128",
    dtype: Annotated[
        DtypeName | None, typer.Option(help="Of q; default: the model's, or bf16.")
    ] = None,
    kv_dtype: Annotated[DtypeName | None, typer.Option(help="Of k and v; default: q's.")] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", "--batch", min=1, help="Sequences.")
    ] = 1,
    seqlen_q: Annotated[int, typer.Option(min=1, help="Query tokens of each.")] = 1,
    seqlen_k: Annotated[int, typer.Option(min=1, help="Key tokens of each.")] = 1024,
    page_size: Annotated[int, typer.Option(min=0, help="Of the KV cache; 0: not paged.")] = 16,
    causal: Annotated[bool, typer.Option(help="Mask the future.")] = True,
    window: Annotated[str, typer.Option(help="LEFT or LEFT,RIGHT tokens; -1: unlimited.")] = "-1",
    attention_chunk: Annotated[int, typer.Option(min=0, help="0: none.")] = 0,
    softcap: Annotated[float, typer.Option(min=0, help="0: none.")] = 0.0,
    sinks: Annotated[bool, typer.Option(help="With attention sinks.")] = False,
    lse: Annotated[bool, typer.Option(help="Return the log-sum-exp too.")] = False,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, ..; auto: a GPU if there is one.")
    ] = "auto",
    backend: Annotated[str, typer.Option(help="Pin a provider by name.")] = "auto",
    ver: Annotated[Literal[3, 4] | None, typer.Option(help="Interface generation.")] = None,
) -> None:
    """Which provider would run an attention call, and why the others would not."""
    if model is not None:
        for name in _OF_A_CALL:
            source = ctx.get_parameter_source(name)
            if source is not None and source.name == "COMMANDLINE":  # typer's own enum, or click's
                given = "a value beside --model"
                raise InvalidInputError(name, given, "one of them: a model's calls are its own")
        config = EngineConfig(
            model=model,
            device=device,
            dtype=_choice("dtype", dtype, _MODEL_DTYPES),
            kv_cache_dtype=_choice("kv_dtype", kv_dtype, _CACHE_DTYPES),
            attention_backend=backend,
            flash_attn_version=ver,
            page_size=page_size or EngineConfig.page_size,
        )
        _explain_model(config, batch_size, seqlen_q, seqlen_k)
        return
    dtype = dtype or "bf16"
    import torch

    from headway import devices

    where = devices.choose(device)
    num_q_heads, num_kv_heads = _pair("heads", heads)
    dim, dim_v = _pair("head_dim", head_dim)
    q = torch.empty(
        batch_size, seqlen_q, num_q_heads, dim, dtype=getattr(torch, _DTYPES[dtype]), device=where
    )
    kv = getattr(torch, _DTYPES[kv_dtype or dtype])
    lengths = torch.full((batch_size,), seqlen_k, dtype=torch.int32, device=where)
    k, v, page_table = _cache(
        batch_size, seqlen_k, page_size, num_kv_heads, (dim, dim_v), kv, where
    )
    headway.explain(
        headway.flash_attn_with_kvcache,
        q,
        k,
        v,
        cache_seqlens=lengths,
        page_table=page_table,
        causal=causal,
        window_size=_window(window),
        attention_chunk=attention_chunk,
        softcap=softcap,
        sinks=torch.zeros(num_q_heads, dtype=torch.float32, device=where) if sinks else None,
        return_softmax_lse=lse,
        ver=ver,
        backend=None if backend == "auto" else backend,
    )


def _cache(
    batch_size: int,
    seqlen_k: int,
    page_size: int,
    num_heads: int,
    dims: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    import torch

    rows, length, table = batch_size, seqlen_k, None
    if page_size:
        per_sequence = -(-seqlen_k // page_size)
        rows, length = batch_size * per_sequence, page_size
        table = torch.arange(rows, dtype=torch.int32, device=device).view(batch_size, per_sequence)
    k, v = (torch.empty(rows, length, num_heads, d, dtype=dtype, device=device) for d in dims)
    return k, v, table


def _pair(name: str, text: str) -> tuple[int, int]:
    words = text.split("/")
    if len(words) <= 2 and all(word.isdigit() and int(word) > 0 for word in words):
        return int(words[0]), int(words[-1])
    raise InvalidInputError(name, repr(text), "a number, or two like 32/8")


def _window(text: str) -> tuple[int, int]:
    try:
        left, right = [int(word) for word in (text if "," in text else f"{text},-1").split(",")]
    except ValueError:
        raise InvalidInputError("window", repr(text), "LEFT or LEFT,RIGHT, like 4095,0") from None
    return left, right


def _choice(argument: str, name: str | None, choices: dict[str | None, str]) -> Any:
    if name in choices:
        return choices[name]
    named = ", ".join(choice for choice in choices if choice is not None)
    raise InvalidInputError(argument, name, f"{named} with --model, or none for the model's own")


def _explain_model(config: EngineConfig, batch_size: int, seqlen_q: int, seqlen_k: int) -> None:
    from headway.engine import describe

    step = describe.Step(batch_size, seqlen_q, seqlen_k)
    probe, dtype = describe.probe_without_weights(config)
    cache = "" if config.kv_cache_dtype == "auto" else " over float8"
    computed = f"{str(dtype).removeprefix('torch.')}{cache}"
    for kind, explanation in describe.explain(config, probe, dtype, step):
        print(f"{_display_name(config.model)}: {kind}, {computed}, {step}")
        print(explanation)


@app.command(name="providers")
def list_providers() -> None:
    """The attention providers: what is installed, what it can do here, and why not."""
    import torch
    from rich.table import Table

    from headway.bench import report
    from headway.providers.table import status

    kinds = ["cpu", *(kind for kind in ("cuda", "musa") if _has(kind))]
    table = Table("provider", "package", "here", "dtypes (q, k/v)", "not supported")
    for kind in kinds:
        for row in status(torch.device(kind)):
            here = f"{kind}: no: {row.reason}" if row.reason else f"{kind}: yes"
            table.add_row(row.provider, row.package or "-", here, *_abilities(row.capabilities))
    report.console().print(table)


def _has(kind: str) -> bool:
    import torch

    namespace = getattr(torch, kind, None)
    return namespace is not None and namespace.is_available()


def _abilities(can: Capabilities | None) -> tuple[str, str]:
    if can is None:
        return "", ""
    from headway.providers.base import ALL_FEATURES

    short = {full: name for name, full in _DTYPES.items()}
    same = sorted({_short(q, short) for q, k in can.dtypes if q == k})
    missing = sorted(feature.value for feature in ALL_FEATURES - can.features)
    return " ".join(same), ", ".join(missing) or "-"


def _short(dtype: torch.dtype, names: dict[str, str]) -> str:
    full = str(dtype).removeprefix("torch.")
    return names.get(full, full)


# --- eval ---------------------------------------------------------------------------------------------

app.command(name="eval")(evaluate.command)


# --- compile ------------------------------------------------------------------------------------------


#: Settings of an engine that decide which kernels it launches.
_OF_KERNELS = (
    "dtype",
    "max_model_len",
    "page_size",
    "kv_cache_dtype",
    "mla_prefill_dtype",
    "chunked_prefill_size",
    "max_running_requests",
    "cuda_graphs",
    "speculative",
    "num_draft_tokens",
    "attention_backend",
    "flash_attn_version",
    "revision",
    "trust_remote_code",
)


@app.command(name="compile")
@flags.takes(EngineConfig, "settings", only=_OF_KERNELS)
def compile_kernels(
    settings: dict[str, Any],
    model: Annotated[
        str | None,
        typer.Option(help="What this model needs: folder, GGUF file or hub name. Default: all."),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="sm80, sm90, sm100, sm120, gfx942, gfx950, gfx1100; may be repeated. Default: the GPU "
            "here, or all of them where there is none."
        ),
    ] = None,
    every: Annotated[
        bool, typer.Option("--every", help="Every width, dtype and mask, not only every tile.")
    ] = False,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes; default: CPUs.")] = None,
    json: Annotated[Path | None, typer.Option(help="Also write the table to this file.")] = None,
) -> None:
    """Compile kernels ahead of time, for any GPU, without one; exits with 1 if one fails.

    With --model what `headway serve` launches for it, given the same settings.
    """
    from headway import precompile
    from headway.bench import report

    targets = precompile.check_targets(target or [])
    if model is None:
        _need_no(settings)
        cases = precompile.default_cases(every=every)
    elif every:
        raise InvalidInputError("every", "with --model", "one of them: a model needs its own alone")
    else:
        cases = precompile.model_cases(EngineConfig(model=model, **settings))
    done = _compile(cases, targets, jobs or os.cpu_count() or 1)
    report.console().print(precompile.table(done))
    if json is not None:
        done.save(json)
    counts = f"{len(done.reports)} kernels in {done.seconds:.0f} s, {len(done.failures)} failed"
    print(f"{counts}; cache: {precompile.cache_folder()}")
    if done.failures:
        print("\n".join(done.failures), file=sys.stderr)
        raise typer.Exit(1)


def _need_no(settings: dict[str, Any]) -> None:
    """Refuse settings of an engine where there is no model."""
    unset = EngineConfig(model="")
    for name, value in settings.items():
        if value != getattr(unset, name):
            raise InvalidInputError(name, value, "--model beside it: it says how a model is served")


def _compile(cases: tuple[Case, ...], targets: tuple[str, ...], jobs: int) -> Precompiled:
    """Compile with a progress bar on terminals, and with a line now and then in logs."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
    )

    from headway import precompile

    console = Console(stderr=True)
    if not console.is_terminal:
        return precompile.compile_all(cases, targets, jobs, _line_now_and_then())
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("compiling")

        def show(done: int, total: int, label: str) -> None:
            bar.update(task, completed=done, total=total, description=label or "compiling")

        return precompile.compile_all(cases, targets, jobs, show)


def _line_now_and_then() -> Callable[[int, int, str], None]:
    """Says how far it is, at most every SECONDS_BETWEEN_LINES."""
    said = time.monotonic()

    def show(done: int, total: int, label: str) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= SECONDS_BETWEEN_LINES:
            said = now
            print(f"compiling: {done} of {total} kernels", file=sys.stderr, flush=True)

    return show


# --- bench --------------------------------------------------------------------------------------------


#: Each module's function ``command`` becomes a subcommand, imported when it is named.
_BENCHES = {
    "attention": "headway.bench.attention",
    "cpu": "headway.bench.cpu",
    "first-call": "headway.bench.first_call",
    "generate": "headway.bench.generate",
    "mla": "headway.bench.mla",
    "overhead": "headway.bench.overhead",
    "quant": "headway.bench.quant",
    "serve": "headway.bench.serving",
}


class BenchGroup(TyperGroup):
    """``headway bench``: one subcommand per benchmark there is."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [name for name, module in _BENCHES.items() if importlib.util.find_spec(module)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in self.list_commands(ctx):
            return None
        module = importlib.import_module(_BENCHES[cmd_name])
        single = typer.Typer(add_completion=False, rich_markup_mode=None)
        single.command(name=cmd_name)(module.command)
        return typer.main.get_command(single)


app.add_typer(
    typer.Typer(cls=BenchGroup, no_args_is_help=True, rich_markup_mode=None),
    name="bench",
    help="Measure attention, generation and serving.",
)
