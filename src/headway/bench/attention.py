"""``headway bench attention``: providers and peers on the same inputs, interleaved, medians of rounds.

A case is data; what runs it is a participant: a provider of Headway, by name, or a peer, a package of
somebody else's. All participants of a case share its tensors and are timed in turns within one process,
so that a clock that drifts drifts for all. Prefill is timed call by call, host launch included;
decode as replays of a CUDA graph of several calls over rotating caches, as engines run it, with the
step's plan made before (``unplanned`` participants make their own in every call).
"""

from __future__ import annotations

import importlib
import importlib.util
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from torch import Tensor

import headway
from headway import providers
from headway.bench import report
from headway.errors import HeadwayError, InvalidInputError

Call = Callable[[int], Any]  # runs the case on its i-th set of tensors

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.float8_e4m3fn}

#: Caches of a decode case are as many sets as read this much, so that none is found in the L2 cache.
ROTATE_BYTES = 256 << 20

#: Calls in one graph of a decode case.
CALLS_PER_GRAPH = 8


@dataclass(frozen=True)
class Case:
    """One shape. ``seqlen_q`` 1 with pages is decode against a paged cache; otherwise dense prefill."""

    name: str
    kind: Literal["prefill", "decode"]
    batch_size: int
    seqlen_q: int
    seqlen_k: int
    heads_q: int
    heads_kv: int
    head_dim: int
    head_dim_v: int
    dtype: str = "bf16"
    kv_dtype: str = "bf16"
    causal: bool = True
    window_left: int = -1
    page_size: int = 0
    latent: bool = False  # v is the first head_dim_v columns of k

    @property
    def flops(self) -> float:
        """Multiply-adds count two; a causal square counts half, a causal window its band."""
        pairs = float(self.seqlen_q * self.seqlen_k)
        if self.causal and self.kind == "prefill":
            pairs -= self.seqlen_q * self.seqlen_q / 2
        if self.window_left >= 0:
            pairs = min(pairs, float(self.seqlen_q * (self.window_left + 1)))
        return 2 * self.batch_size * self.heads_q * pairs * (self.head_dim + self.head_dim_v)

    @property
    def kv_bytes(self) -> int:
        width = self.head_dim if self.latent else self.head_dim + self.head_dim_v
        rows = self.batch_size * self.seqlen_k * self.heads_kv
        return rows * width * _DTYPES[self.kv_dtype].itemsize


def prefill(
    d: int, seqlen: int, batch: int, heads: tuple[int, int], *, dv: int | None = None, **more: Any
) -> Case:
    """A square causal prefill."""
    dv = dv or d
    width = str(d) if d == dv else f"{d}/{dv}"
    kind = "" if more.get("causal", True) else " full"
    kind += f" window {more['window_left'] + 1}" if "window_left" in more else ""
    dtype = more.get("dtype", "bf16")
    name = f"prefill {dtype} d{width} b{batch} s{seqlen} h{heads[0]}/{heads[1]}{kind}"
    more.setdefault("kv_dtype", dtype)
    return Case(name, "prefill", batch, seqlen, seqlen, *heads, d, dv, **more)


def decode(d: int, context: int, batch: int, heads: tuple[int, int], **more: Any) -> Case:
    """One token per sequence against pages of 16 tokens, unless said otherwise."""
    dv = more.pop("dv", d)
    more = {"page_size": 16} | more
    width = str(d) if d == dv else f"{d}/{dv}"
    name = f"decode {more.get('dtype', 'bf16')}/{more.get('kv_dtype', 'bf16')} d{width} b{batch}"
    name += f" ctx{context} h{heads[0]}/{heads[1]} page {more['page_size']}"
    return Case(name, "decode", batch, 1, context, *heads, d, dv, **more)


CASES: dict[str, tuple[Case, ...]] = {
    "prefill": (
        prefill(128, 2048, 8, (16, 16)),
        prefill(128, 16384, 1, (16, 16)),
        prefill(128, 16384, 1, (16, 16), causal=False),
        prefill(128, 8192, 1, (64, 8)),
        prefill(64, 16384, 1, (32, 32)),
        prefill(256, 16384, 1, (8, 8)),
        prefill(192, 8192, 1, (16, 16), dv=128),
        prefill(128, 16384, 1, (16, 16), window_left=1023),
        prefill(128, 16384, 1, (16, 16), dtype="fp8"),
    ),
    "decode": (
        decode(128, 8192, 8, (64, 8)),
        decode(128, 8192, 16, (64, 8)),
        decode(128, 8192, 32, (64, 8)),
        decode(128, 4096, 64, (32, 8)),
        decode(128, 1024, 256, (16, 8)),
        decode(128, 131072, 1, (32, 8)),
        decode(128, 8192, 32, (64, 8), page_size=1),
        decode(128, 8192, 32, (64, 8), page_size=64),
        decode(64, 8192, 32, (64, 8)),
        decode(256, 8192, 16, (16, 4)),
    ),
    "decode-fp8": (
        decode(128, 8192, 16, (64, 8), kv_dtype="fp8"),
        decode(128, 8192, 32, (64, 8), kv_dtype="fp8"),
        decode(128, 8192, 32, (64, 8), dtype="fp8", kv_dtype="fp8"),
        decode(128, 8192, 64, (64, 8), kv_dtype="fp8"),
    ),
    "mla": (
        decode(576, 8192, 64, (16, 1), dv=512, page_size=64, latent=True),
        decode(576, 4096, 64, (128, 1), dv=512, page_size=64, latent=True),
    ),
}


# --- inputs ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """Tensors of a case: queries, and sets of keys and values to rotate among."""

    case: Case
    q: Tensor  # (B, Sq, Hq, D)
    sets: tuple[tuple[Tensor, Tensor], ...]  # (k, v): (B, Sk, Hkv, D), or pages
    page_table: Tensor | None
    seqlens: Tensor  # (B,) int32

    def descales(self, names: str) -> dict[str, Any]:
        """Descales of 1 for those of q, k, v that are float8."""
        one = torch.ones((), device=self.q.device)
        made = {}
        for name in names:
            kind = self.case.dtype if name == "q" else self.case.kv_dtype
            if kind == "fp8":
                made[f"{name}_descale"] = one.expand(self.case.batch_size, self.case.heads_kv)
        return made


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Fresh random tensors; pages in random order."""
    dtype, kv_dtype = _DTYPES[case.dtype], _DTYPES[case.kv_dtype]

    def normal(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16).to(dtype)

    rows: tuple[int, ...] = (case.batch_size, case.seqlen_k)
    table = None
    if case.page_size:
        pages = -(-case.seqlen_k // case.page_size)
        rows = (case.batch_size * pages, case.page_size)
        order = torch.randperm(rows[0], device=device).to(torch.int32)
        table = order.view(case.batch_size, pages)
    count = max(1, -(-ROTATE_BYTES // case.kv_bytes)) if case.kind == "decode" else 1
    sets = []
    for _ in range(min(count, CALLS_PER_GRAPH)):
        k = normal(*rows, case.heads_kv, case.head_dim, dtype=kv_dtype)
        if case.latent:
            sets.append((k, k[..., : case.head_dim_v]))
        else:
            sets.append((k, normal(*rows, case.heads_kv, case.head_dim_v, dtype=kv_dtype)))
    q = normal(case.batch_size, case.seqlen_q, case.heads_q, case.head_dim, dtype=dtype)
    seqlens = torch.full((case.batch_size,), case.seqlen_k, dtype=torch.int32, device=device)
    return Inputs(case, q, tuple(sets), table, seqlens)


# --- participants -----------------------------------------------------------------------------------------


def provider_call(inputs: Inputs, name: str, planned: bool = True) -> Call:
    """A provider through Headway's own interface."""
    case = inputs.case
    window = (case.window_left, 0 if case.causal and case.window_left >= 0 else -1)
    common: dict[str, Any] = {"causal": case.causal, "window_size": window, "backend": name}
    if case.kind == "prefill":

        def run_prefill(i: int) -> Any:
            k, v = inputs.sets[i]
            return headway.flash_attn_func(inputs.q, k, v, **common, **inputs.descales("qkv"))

        return run_prefill
    plan = _plan(inputs, name) if planned else None

    def run_decode(i: int) -> Any:
        k, v = inputs.sets[i]
        return headway.flash_attn_with_kvcache(
            inputs.q,
            k,
            v,
            cache_seqlens=inputs.seqlens,
            page_table=inputs.page_table,
            scheduler_metadata=plan,
            **common,
            **inputs.descales("qkv"),
        )

    return run_decode


def _plan(inputs: Inputs, name: str) -> Any:
    from headway.plan import PlanKey

    case = inputs.case
    key = PlanKey(
        device=inputs.q.device,
        batch_size=case.batch_size,
        max_seqlen_q=1,
        max_seqlen_k=case.seqlen_k,
        num_q_heads=case.heads_q,
        num_kv_heads=case.heads_kv,
        head_dim=case.head_dim,
        head_dim_v=case.head_dim_v,
        page_size=case.page_size or None,
        causal=case.causal,
        window_left=case.window_left if case.window_left >= 0 else None,
        window_right=0 if case.causal else None,
        attention_chunk=0,
    )
    try:
        return providers.get(name).plan(key, inputs.seqlens, kv_dtype=_DTYPES[case.kv_dtype])
    except NotImplementedError:
        return None


def fa3_call(inputs: Inputs) -> Call | None:
    """FlashAttention 3 from the package fa3-fwd; its build has no paged caches, so decode is dense."""
    fa3 = importlib.import_module("fa3_fwd_interface")
    case = inputs.case
    if case.latent or case.window_left >= 0 or case.dtype != case.kv_dtype:
        return None
    if case.kind == "prefill":
        return lambda i: fa3.flash_attn_func(
            inputs.q, *inputs.sets[i], causal=case.causal, **inputs.descales("qkv")
        )
    shape = (case.batch_size, case.seqlen_k, case.heads_kv)
    return lambda i: fa3.flash_attn_with_kvcache(
        inputs.q,
        *(t.view(*shape, t.shape[-1]) for t in inputs.sets[i]),
        cache_seqlens=inputs.seqlens,
        causal=case.causal,
        **inputs.descales("qkv"),
    )


def fa4_call(inputs: Inputs) -> Call | None:
    """FlashAttention 4: dense prefill; decode over the same memory as pages of 128."""
    fa4 = importlib.import_module("flash_attn.cute")
    case = inputs.case
    if "fp8" in (case.dtype, case.kv_dtype) or case.latent:
        return None
    if case.kind == "prefill":
        window = (case.window_left, 0) if case.window_left >= 0 else (None, None)
        return lambda i: fa4.flash_attn_func(
            inputs.q, *inputs.sets[i], causal=case.causal, window_size=window
        )
    device, pages = inputs.q.device, case.batch_size * case.seqlen_k // 128
    table = torch.arange(pages, dtype=torch.int32, device=device).view(case.batch_size, -1)
    cu = torch.arange(case.batch_size + 1, dtype=torch.int32, device=device)
    q = inputs.q.view(case.batch_size, case.heads_q, case.head_dim)
    return lambda i: fa4.flash_attn_varlen_func(
        q,
        *(t.view(pages, 128, case.heads_kv, t.shape[-1]) for t in inputs.sets[i]),
        cu_seqlens_q=cu,
        max_seqlen_q=1,
        max_seqlen_k=case.seqlen_k,
        seqused_k=inputs.seqlens,
        page_table=table,
        causal=case.causal,
    )


def flashinfer_call(inputs: Inputs) -> Call | None:
    """FlashInfer's paged decode with tensor cores (fa2 kernels) and its FA3 kernels for prefill."""
    flashinfer = importlib.import_module("flashinfer")
    case, q = inputs.case, inputs.q
    dtypes = {"q_data_type": _DTYPES[case.dtype], "kv_data_type": _DTYPES[case.kv_dtype]}
    workspace = torch.empty(512 << 20, dtype=torch.uint8, device=q.device)
    if case.latent or case.dtype == "fp8":
        return None
    if case.kind == "prefill":
        ends = torch.arange(case.batch_size + 1, dtype=torch.int32, device=q.device) * case.seqlen_q
        ragged = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD", backend="fa3")
        ragged.plan(
            ends,
            ends,
            case.heads_q,
            case.heads_kv,
            case.head_dim,
            head_dim_vo=case.head_dim_v,
            causal=case.causal,
            window_left=case.window_left,
            q_data_type=_DTYPES[case.dtype],
        )
        return lambda i: ragged.run(q.flatten(0, 1), *(t.flatten(0, 1) for t in inputs.sets[i]))
    assert inputs.page_table is not None
    pages = inputs.page_table.shape[1]
    last = (case.seqlen_k - 1) % case.page_size + 1
    paged = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        workspace, "NHD", use_tensor_cores=True, backend="fa2"
    )
    paged.plan(
        torch.arange(case.batch_size + 1, dtype=torch.int32, device=q.device) * pages,
        inputs.page_table.flatten(),
        torch.full((case.batch_size,), last, dtype=torch.int32, device=q.device),
        case.heads_q,
        case.heads_kv,
        case.head_dim,
        case.page_size,
        **dtypes,
    )
    return lambda i: paged.run(q.flatten(0, 1), inputs.sets[i])


def cudnn_call(inputs: Inputs) -> Call | None:
    """cuDNN through torch's scaled_dot_product_attention; prefill only."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    case = inputs.case
    if case.kind != "prefill" or case.dtype == "fp8" or case.window_left >= 0:
        return None
    q = inputs.q.transpose(1, 2)

    def run(i: int) -> Any:
        k, v = (t.transpose(1, 2) for t in inputs.sets[i])
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=case.causal, enable_gqa=case.heads_q != case.heads_kv
            )

    return run


#: Peers by name, and the module each needs.
PEERS: dict[str, tuple[str, Callable[[Inputs], Call | None]]] = {
    "fa3": ("fa3_fwd_interface", fa3_call),
    "fa4": ("flash_attn.cute", fa4_call),
    "flashinfer": ("flashinfer", flashinfer_call),
    "cudnn": ("torch", cudnn_call),
}


def installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


# --- timing -----------------------------------------------------------------------------------------------


@dataclass
class Participant:
    """Something that runs a case, and what was measured of it."""

    name: str
    call: Call
    times_ms: list[float] = field(default_factory=list)
    error: str = ""


def graph_of(call: Call, sets: int) -> torch.cuda.CUDAGraph:
    """CALLS_PER_GRAPH calls over rotating sets, captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(sets):
            call(i)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(CALLS_PER_GRAPH):
            call(i % sets)
    return graph


def replay_ms(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    """Milliseconds per call, the median of replays."""
    times = []
    for _ in range(replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / CALLS_PER_GRAPH)
    return statistics.median(times)


def measure(case: Case, participants: list[Participant], sets: int, rounds: int) -> None:
    """Time all participants in turns; one that fails keeps its error and drops out."""
    from triton.testing import do_bench

    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    for round_ in range(-1, rounds):  # the first round compiles and warms up
        for one in participants:
            if one.error:
                continue
            try:
                if round_ < 0:
                    one.call(0)
                    if case.kind == "decode":
                        graphs[one.name] = graph_of(one.call, sets)
                        replay_ms(graphs[one.name], 3)
                elif case.kind == "decode":
                    one.times_ms.append(replay_ms(graphs[one.name], 7))
                else:
                    ms = do_bench(lambda: one.call(0), 10, 50, return_mode="median")  # noqa: B023
                    one.times_ms.append(ms)
            except Exception as error:
                one.error = f"{type(error).__name__}: {error}"[:300]


def row_of(case: Case, participant: Participant) -> dict[str, Any]:
    """A reading's row: medians over rounds, and the rates they mean."""
    row: dict[str, Any] = {"case": case.name, "runner": participant.name, "shape": asdict(case)}
    if participant.error or not participant.times_ms:
        return row | {"error": participant.error}
    ms = statistics.median(participant.times_ms)
    row |= {"ms": ms, "rounds_ms": participant.times_ms}
    row["tflops"] = case.flops / ms * 1e-9
    if case.kind == "decode":
        row |= {"tbps": case.kv_bytes / ms * 1e-9, "tokens_per_s": case.batch_size / ms * 1e3}
    return row


def measure_case(
    case: Case, names: list[str], peers: list[str], device: torch.device, rounds: int
) -> list[dict[str, Any]]:
    """All participants on one case."""
    inputs = make_inputs(case, device)
    participants, rows = [], []
    for name in names:
        backend, _, option = name.partition(":")
        try:
            call = provider_call(inputs, backend, planned=option != "unplanned")
            call(0)
        except HeadwayError as error:
            rows.append({"case": case.name, "runner": name, "error": str(error)})
            continue
        participants.append(Participant(name, call))
    for name in peers:
        peer = PEERS[name][1](inputs)
        if peer is not None:
            participants.append(Participant(name, peer))
    measure(case, participants, len(inputs.sets), rounds)
    return [*(row_of(case, one) for one in participants), *rows]


def read_bandwidth(device: torch.device) -> float:
    """TB/s of the fastest plain read there is here: the sum of 4 GiB."""
    from triton.testing import do_bench

    x = torch.empty(1 << 32, dtype=torch.uint8, device=device).random_().view(torch.float32)
    ms = do_bench(lambda: x.sum(), 20, 100, return_mode="median")
    return float(x.nbytes / ms * 1e-9)


COLUMNS = (
    report.Column("case", "case"),
    report.Column("runner", "runner"),
    report.Column("ms", "ms", ".4f"),
    report.Column("tflops", "TFLOPS", ".0f"),
    report.Column("tbps", "TB/s", ".2f"),
    report.Column("error", "error"),
)


def command(
    provider: Annotated[
        str, typer.Option(help="Providers, with commas; NAME:unplanned plans in every call.")
    ] = "portable",
    peers: Annotated[
        str, typer.Option(help="fa3, fa4, flashinfer, cudnn with commas, or 'all' installed ones.")
    ] = "",
    cases: Annotated[str, typer.Option(help=f"Of {', '.join(CASES)}.")] = ",".join(CASES),
    match: Annotated[str, typer.Option(help="Only cases whose name contains this.")] = "",
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each participant.")] = 5,
    output: Annotated[Path | None, typer.Option(help="Write the reading to this file.")] = None,
) -> None:
    """Measure attention kernels on a GPU: TFLOPS of prefill, TB/s of decode."""
    if not torch.cuda.is_available():
        raise InvalidInputError("device", "no GPU", "a machine with one")
    device = torch.device("cuda", torch.cuda.current_device())
    wanted = [name for name in peers.split(",") if name]
    if wanted == ["all"]:
        wanted = [name for name, (module, _) in PEERS.items() if installed(module)]
    if unknown := [name for name in wanted if name not in PEERS]:
        raise InvalidInputError("peers", unknown, f"of {', '.join(PEERS)}")
    if unknown := [name for name in cases.split(",") if name not in CASES]:
        raise InvalidInputError("cases", unknown, f"of {', '.join(CASES)}")
    results: list[dict[str, Any]] = []
    bandwidth = read_bandwidth(device)
    print(f"read bandwidth {bandwidth:.3f} TB/s", flush=True)
    for case in (case for name in cases.split(",") for case in CASES[name] if match in case.name):
        rows = measure_case(case, provider.split(","), wanted, device, rounds)
        torch.cuda.empty_cache()
        for row in rows:
            print("  ".join(column.text(row) for column in COLUMNS), flush=True)
        results += rows
    settings = {"providers": provider, "peers": peers, "rounds": rounds}
    settings["read_bandwidth_tbps"] = bandwidth
    if output is not None:
        report.Reading("attention", settings, results).save(output)
