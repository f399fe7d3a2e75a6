"""Headway inside SGLang: every mode of its contract, through SGLang's own types, against the reference.

Batches, layers, pools and draft inputs are SGLang's; only the model runner is a plain object with the
fields that backends read. Needs the package sglang, of which no CUDA part is used, and is skipped without;
``script/test-plugins`` installs it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip(
    "tests.integrations.sglang_without_torchvision",
    reason="sglang is not installed: script/test-plugins installs it",
    exc_type=ImportError,
)

from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.mem_cache.memory_pool import (
    KVWriteLoc,
    MHATokenToKVPool,
    MLATokenToKVPool,
    ReqToTokenPool,
)
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.model_executor.forward_batch_info import (
    CaptureHiddenMode,
    ForwardBatch,
    ForwardMode,
)
from sglang.srt.runtime_context import get_parallel
from sglang.srt.speculative.eagle_info import EagleDraftInput, EagleVerifyInput

from headway import flash_attn_func
from headway.errors import UnsupportedError
from headway.integrations import sglang as integration
from headway.integrations.sglang import HeadwayAttnBackend, HeadwayMultiStepDraftBackend

HEADS, KV_HEADS, DIM = 4, 2, 16
RANK, ROPE = 32, 16
CONTEXT = 96
PAST = (37, 0, 20, 5)
SCALE = 0.23


@pytest.fixture(scope="module", autouse=True)
def _one_rank() -> Iterator[None]:
    with get_parallel().override(attn_dcp_size=1, attn_dcp_rank=0, attn_tp_size=1, attn_cp_size=1):
        yield


@dataclass
class World:
    """Requests in pools: their slots scattered, their keys and values known here as well."""

    page_size: int = 1
    mla: bool = False
    swa: bool = False
    dtype: torch.dtype = torch.float32
    topk: int = 0
    drafts: int = 0
    window: int | None = None
    past: Sequence[int] = PAST
    runner: Any = None
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.manual_seed(11)
        size = 8 * CONTEXT
        self.requests = torch.tensor([5, 2, 7, 1][: len(self.past)])
        table = ReqToTokenPool(8, CONTEXT, "cpu", enable_memory_saver=False)
        pages = torch.randperm(size // self.page_size - 1) + 1
        pages = pages.view(-1)[: 8 * (CONTEXT // self.page_size - 1)].view(8, -1)
        slots = pages[:, :, None] * self.page_size + torch.arange(self.page_size)
        table.req_to_token[1:, : slots[0].numel()] = slots.flatten(1).to(torch.int32)
        self.table = table
        pool = self._pool(size)
        self.runner = SimpleNamespace(
            device="cpu", page_size=self.page_size, req_to_token_pool=table, token_to_kv_pool=pool,
            kv_cache_dtype=self.dtype, sliding_window_size=self.window, is_draft_worker=False,
            attention_chunk_size=None, kv_index_translator=SimpleNamespace(is_translating=False),
            model_config=SimpleNamespace(
                context_len=CONTEXT,
                attention_arch=SimpleNamespace(name="MLA" if self.mla else "MHA"),
            ),
            server_args=SimpleNamespace(
                speculative_eagle_topk=self.topk or None,
                speculative_num_draft_tokens=self.drafts or None,
            ),
        )  # fmt: skip

    def _pool(self, size: int) -> Any:
        common = {"page_size": self.page_size, "dtype": self.dtype, "device": "cpu"}
        if self.mla:
            return MLATokenToKVPool(
                size=size, kv_lora_rank=RANK, qk_rope_head_dim=ROPE, layer_num=2,
                enable_memory_saver=False, **common,
            )  # fmt: skip
        if self.swa:
            pool = SWAKVPool(
                size=size, size_swa=size, head_num=KV_HEADS, head_dim=DIM,
                swa_attention_layer_ids=[1], full_attention_layer_ids=[0], **common,
            )  # fmt: skip
            elsewhere = torch.arange(size + self.page_size, dtype=torch.int64)
            elsewhere[self.page_size :] = elsewhere[self.page_size :].flip(0).view(
                -1, self.page_size
            ).flip(1).flatten()  # fmt: skip
            pool.register_mapping(elsewhere)
            return pool
        return MHATokenToKVPool(
            size=size,
            head_num=KV_HEADS,
            head_dim=DIM,
            layer_num=2,
            enable_memory_saver=False,
            **common,
        )

    @property
    def pool(self) -> Any:
        return self.runner.token_to_kv_pool

    def slots(self, b: int, start: int, end: int) -> Tensor:
        return self.table.req_to_token[self.requests[b], start:end].long()

    def layer(self, layer_id: int = 0, **options: Any) -> RadixAttention:
        if self.mla:
            return RadixAttention(
                HEADS, RANK + ROPE, SCALE, 1, layer_id, v_head_dim=RANK, **options
            )
        return RadixAttention(HEADS, DIM, SCALE, KV_HEADS, layer_id, **options)

    def fill(self, layer: RadixAttention, new: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Random tokens: the past ones written, the ``new`` ones returned as a model would hand them in."""
        width = RANK + ROPE if self.mla else DIM
        heads = 1 if self.mla else KV_HEADS
        totals = [p + n for p, n in zip(self.past, new, strict=True)]
        self.keys = [torch.randn(n, heads, width) for n in totals]
        self.values = [
            k[..., :RANK] if self.mla else torch.randn(k.shape[0], heads, DIM) for k in self.keys
        ]
        for b, (k, v) in enumerate(zip(self.keys, self.values, strict=True)):
            self.write(layer, self.slots(b, 0, self.past[b]), k[: self.past[b]], v[: self.past[b]])
        rows = [
            torch.cat([x[p:] for x, p in zip(xs, self.past, strict=True)])
            for xs in (self.keys, self.values)
        ]
        return rows[0], rows[1]

    def write(self, layer: RadixAttention, slots: Tensor, k: Tensor, v: Tensor) -> None:
        if slots.numel() == 0:
            return
        where = KVWriteLoc(slots)
        if self.mla:
            self.pool.set_mla_kv_buffer(layer, where, k[..., :RANK].clone(), k[..., RANK:].clone())
            return
        if self.swa:
            where = KVWriteLoc(slots, self.pool.translate_loc_from_full_to_swa(slots))
        self.pool.set_kv_buffer(layer, where, k.clone(), v.clone(), layer.k_scale, layer.v_scale)

    def batch(self, mode: ForwardMode, new: Sequence[int], **options: Any) -> ForwardBatch:
        totals = torch.tensor([p + n for p, n in zip(self.past, new, strict=True)])
        past = torch.tensor(self.past)
        locations = torch.cat(
            [self.slots(b, p, p + n) for b, (p, n) in enumerate(zip(self.past, new, strict=True))]
        )
        verifies = mode.is_target_verify()
        defaults: dict[str, Any] = {
            "forward_mode": mode,
            "batch_size": len(new),
            "input_ids": torch.zeros(sum(new), dtype=torch.int64),
            "req_pool_indices": self.requests,
            "seq_lens": past if verifies else totals,
            "out_cache_loc": locations,
            "seq_lens_sum": int(totals.sum()),
            "positions": torch.cat(
                [torch.arange(p, p + n) for p, n in zip(self.past, new, strict=True)]
            ),
        }
        if mode.is_extend(include_draft_extend_v2=True) and not verifies:
            defaults |= {
                "extend_seq_lens": torch.tensor(new),
                "extend_prefix_lens": past,
                "extend_seq_lens_cpu": list(new),
                "extend_prefix_lens_cpu": list(self.past),
                "extend_num_tokens": sum(new),
            }
        return ForwardBatch(**{**defaults, **options})

    def queries(self, new: Sequence[int]) -> Tensor:
        return torch.randn(sum(new), HEADS * (RANK + ROPE if self.mla else DIM))

    def run(
        self, backend: HeadwayAttnBackend, q: Tensor, rows: tuple[Tensor, Tensor], layer: RadixAttention,
        batch: ForwardBatch, **options: Any,
    ) -> Any:  # fmt: skip
        if not self.mla:
            return backend.forward(q, *rows, layer, batch, **options)
        k = rows[0]
        nope, rope = q.view(-1, HEADS, RANK + ROPE).split([RANK, ROPE], -1)
        parts = {"q_rope": rope, "k_rope": k[..., RANK:].clone()}
        latent = k[..., :RANK].clone()
        return backend.forward(nope.contiguous(), latent, latent, layer, batch, **parts, **options)

    def expected(self, q: Tensor, new: Sequence[int], **call: Any) -> Tensor:
        """Request by request; a value that is a list has one entry for each."""
        width = RANK + ROPE if self.mla else DIM
        outs = []
        for b, rows in enumerate(q.view(-1, HEADS, width).split(list(new))):
            mine = {name: v[b] if isinstance(v, list) else v for name, v in call.items()}
            out = flash_attn_func(
                rows[None], self.keys[b][None], self.values[b][None],
                **{"causal": True, "softmax_scale": SCALE, **mine}, backend="reference",
            )  # fmt: skip
            outs.append(out[0].flatten(1))
        return torch.cat(outs)


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got.view_as(want), want, rtol=1e-4, atol=1e-5)


def attend(
    world: World, mode: ForwardMode, new: Sequence[int], layer: RadixAttention | None = None,
    spec_info: Any = None, options: dict[str, Any] | None = None, **call: Any,
) -> HeadwayAttnBackend:  # fmt: skip
    """One eager step of one layer, compared with the reference."""
    layer = world.layer() if layer is None else layer
    rows, q = world.fill(layer, new), world.queries(new)
    backend = HeadwayAttnBackend(world.runner)
    batch = world.batch(mode, new, spec_info=spec_info)
    backend.init_forward_metadata(batch)
    close(
        world.run(backend, q, rows, layer, batch, **(options or {})), world.expected(q, new, **call)
    )
    return backend


KINDS = {
    "tokens": {}, "pages": {"page_size": 8}, "MLA": {"mla": True},
    "MLA, pages": {"mla": True, "page_size": 8},
}  # fmt: skip
worlds = pytest.mark.parametrize("kind", KINDS)


# --- modes ------------------------------------------------------------------------------------------------


@worlds
def test_decode(kind: str) -> None:
    attend(World(**KINDS[kind]), ForwardMode.DECODE, (1, 1, 1, 1))


@worlds
@pytest.mark.parametrize(
    "mode", [ForwardMode.EXTEND, ForwardMode.MIXED, ForwardMode.DRAFT_EXTEND_V2]
)
def test_extend_with_and_without_a_prefix(kind: str, mode: ForwardMode) -> None:
    attend(World(**KINDS[kind]), mode, (3, 11, 1, 4))


def test_idle_ranks_have_no_rows() -> None:
    world = World(past=())
    backend, layer = HeadwayAttnBackend(world.runner), world.layer()
    batch = ForwardBatch(
        ForwardMode.IDLE, 0, *(torch.zeros(0, dtype=torch.int64) for _ in range(4)), seq_lens_sum=0
    )
    backend.init_forward_metadata(batch)
    empty = torch.zeros(0, HEADS * DIM)
    assert backend.forward(empty, empty, empty, layer, batch).shape == (0, HEADS * DIM)


@worlds
@pytest.mark.parametrize("topk", [0, 1])
def test_verify_a_chain(kind: str, topk: int) -> None:
    attend(World(**KINDS[kind], topk=topk, drafts=4), ForwardMode.TARGET_VERIFY, (4,) * 4)


PARENTS = (-1, 0, 0, 1, 1, 2)  # of the draft tokens of a tree


def tree() -> tuple[Tensor, Tensor]:
    """Which draft token sees which, and how deep each is."""
    seen, depth = torch.eye(len(PARENTS), dtype=torch.bool), [0]
    for node, parent in enumerate(PARENTS):
        if parent >= 0:
            seen[node] |= seen[parent]
            depth.append(depth[parent] + 1)
    return seen, torch.tensor(depth)


def verify_input(world: World) -> EagleVerifyInput:
    """A tree for each request, in SGLang's flat mask: rows over all of a request's keys."""
    seen, depth = tree()
    masks = [torch.cat([torch.ones(len(seen), p, dtype=torch.bool), seen], 1) for p in world.past]
    none = torch.zeros(0, dtype=torch.int64)
    return EagleVerifyInput(
        draft_token=none, custom_mask=torch.cat([m.flatten() for m in masks]),
        positions=torch.cat([p + depth for p in world.past]), retrieve_index=none,
        retrieve_next_token=none, retrieve_next_sibling=none, retrieve_cum_len=none, spec_steps=3,
        topk=2, draft_token_num=len(seen), capture_hidden_mode=CaptureHiddenMode.NULL,
        seq_lens_sum=sum(world.past), seq_lens_cpu=None,
    )  # fmt: skip


def in_tree(context: int, window: int | None = None) -> Any:
    seen, depth = tree()

    def visible(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        i, j = q_idx - context, torch.clamp(kv_idx - context, min=0)
        shown = (kv_idx < context) | seen[i, j]
        if window is None:
            return shown
        place = torch.where(kv_idx < context, kv_idx, context + depth[j])
        return shown & (context + depth[i] - place <= window)

    return visible


@worlds
@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -1.0, 2.0, 0.0])])
def test_verify_a_tree(kind: str, sinks: Tensor | None) -> None:
    world = World(**KINDS[kind], topk=2, drafts=len(PARENTS))
    masks = [in_tree(p) for p in world.past]
    spec = verify_input(world)
    attend(
        world, ForwardMode.TARGET_VERIFY, (len(PARENTS),) * 4, spec_info=spec,
        options={"sinks": sinks}, causal=False, mask_mod=masks, sinks=sinks,
    )  # fmt: skip


@pytest.mark.parametrize(
    "kind", [{}, {"page_size": 8}, {"swa": True}, {"swa": True, "page_size": 8}]
)
def test_a_window_over_a_tree_follows_positions(kind: dict[str, Any]) -> None:
    world = World(**kind, topk=2, drafts=len(PARENTS), window=6)
    layer = world.layer(1, sliding_window_size=6)
    masks = [in_tree(p, window=6) for p in world.past]
    attend(
        world, ForwardMode.TARGET_VERIFY, (len(PARENTS),) * 4, layer, verify_input(world),
        causal=False, mask_mod=masks,
    )  # fmt: skip


def test_the_batch_says_how_many_drafts_there_are() -> None:
    """Adaptive speculation verifies fewer tokens than the server was started with."""
    world = World(topk=2, drafts=9)
    attend(
        world, ForwardMode.TARGET_VERIFY, (len(PARENTS),) * 4, spec_info=verify_input(world),
        causal=False, mask_mod=[in_tree(p) for p in world.past],
    )  # fmt: skip


@worlds
def test_draft_steps_of_a_chain(kind: str) -> None:
    """The second step: two tokens have been drafted, this one included."""
    world = World(**KINDS[kind], topk=1, drafts=4)
    layer = world.layer()
    rows, q = world.fill(layer, (2,) * 4), world.queries((1,) * 4)
    for b, p in enumerate(world.past):  # the first drafted token lies in the pool already
        world.write(
            layer, world.slots(b, p, p + 1), world.keys[b][p : p + 1], world.values[b][p : p + 1]
        )
    last = (rows[0][1::2], rows[1][1::2])
    draft = HeadwayMultiStepDraftBackend(world.runner, 1, 3)
    locations = torch.cat([world.slots(b, p + 1, p + 2) for b, p in enumerate(world.past)])
    batch = world.batch(
        ForwardMode.DECODE, (0,) * 4, spec_info=EagleDraftInput(), out_cache_loc=locations
    )
    draft.init_forward_metadata(batch)
    assert len(draft.attn_backends) == 2
    close(world.run(draft.attn_backends[1], q, last, layer, batch), world.expected(q, (1,) * 4))


def branches(
    world: World, layer: RadixAttention, topk: int, steps: int
) -> tuple[Tensor, list[list[Tensor]], list[list[Tensor]]]:
    """Slots (B, topk, steps) for drafts, and each branch's keys and values, those two steps written."""
    drafts = torch.stack(
        [world.slots(b, p + 8, p + 8 + topk * steps) for b, p in enumerate(world.past)]
    ).view(-1, topk, steps)
    world.fill(layer, (0,) * len(world.past))
    keys: list[list[Tensor]] = []
    values: list[list[Tensor]] = []
    for b in range(len(world.past)):
        keys.append([])
        values.append([])
        for branch in range(topk):
            k = torch.randn(2, *world.keys[b].shape[1:])
            v = k[..., :RANK] if world.mla else torch.randn_like(k)
            world.write(layer, drafts[b, branch, :1], k[:1], v[:1])
            keys[b].append(k)
            values[b].append(v)
    return drafts, keys, values


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("kind", [*KINDS, "SWA pool"])
def test_draft_steps_of_branches(kind: str, window: int | None) -> None:
    if window and kind.startswith("MLA"):
        pytest.skip("latent attention has no windows")
    options = {"swa": True, "page_size": 8} if kind == "SWA pool" else KINDS[kind]
    topk, steps = 2, 3
    world = World(**options, topk=topk, drafts=6, window=window)
    layer = world.layer(1 if window else 0, sliding_window_size=window or -1)
    slots, keys, values = branches(world, layer, topk, steps)
    backend = HeadwayMultiStepDraftBackend(world.runner, topk, steps).attn_backends[1]
    batch = world.batch(
        ForwardMode.DECODE, (0,) * 4, spec_info=EagleDraftInput(), out_cache_loc=slots.flatten()
    )
    backend.init_forward_metadata(batch)
    batch.out_cache_loc = slots[:, :, 1].flatten()  # as the draft worker slices it for each step
    q = world.queries((topk,) * 4)
    rows = tuple(torch.cat([x[1:] for xs in per for x in xs]) for per in (keys, values))
    out = world.run(backend, q, rows, layer, batch).view(len(world.past), topk, -1)
    for b in range(len(world.past)):
        for branch in range(topk):
            k, v = (
                torch.cat([mine[b], drafted[b][branch]])
                for mine, drafted in ((world.keys, keys), (world.values, values))
            )
            row = q.view(len(world.past), topk, HEADS, -1)[b, branch]
            want = flash_attn_func(
                row[None, None], k[None], v[None], softmax_scale=SCALE, causal=True,
                window_size=(-1 if window is None else window, 0), backend="reference",
            )  # fmt: skip
            close(out[b, branch], want.flatten())


# --- layers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [1, 8])
@pytest.mark.parametrize("swa", [False, True], ids=["one pool", "a pool for windows"])
@pytest.mark.parametrize(
    ("mode", "new"), [(ForwardMode.DECODE, (1,) * 4), (ForwardMode.EXTEND, (3, 11, 1, 4))]
)
def test_windows(mode: ForwardMode, new: tuple[int, ...], swa: bool, page_size: int) -> None:
    world = World(page_size=page_size, swa=swa, window=6)
    layer = world.layer(1, sliding_window_size=6)  # SGLang has taken one off already
    attend(world, mode, new, layer, window_size=(6, 0))
    attend(world, mode, new, world.layer(0))  # a layer without, in the same model


def test_chunks() -> None:
    world = World(page_size=8)
    world.runner.attention_chunk_size = 16
    layer = world.layer(use_irope=True)
    attend(world, ForwardMode.EXTEND, (3, 11, 1, 4), layer, attention_chunk=16)
    attend(world, ForwardMode.DECODE, (1,) * 4, layer, attention_chunk=16)


def test_softcap_and_sinks_and_the_lse() -> None:
    world, new = World(page_size=8), (3, 11, 1, 4)
    layer, sinks = world.layer(logit_cap=2.0), torch.tensor([0.5, -1.0, 2.0, 0.0])
    rows, q = world.fill(layer, new), world.queries(new)
    backend, batch = HeadwayAttnBackend(world.runner), world.batch(ForwardMode.EXTEND, new)
    backend.init_forward_metadata(batch)
    out, lse = backend.forward(q, *rows, layer, batch, sinks=sinks, return_lse=True)
    close(out, world.expected(q, new, softcap=2.0, sinks=sinks))
    k, v = world.keys[1], world.values[1]
    _, want = flash_attn_func(
        q.view(-1, HEADS, DIM)[None, 3:14], k[None], v[None], softmax_scale=SCALE, causal=True,
        softcap=2.0, sinks=sinks, return_lse=True, backend="reference",
    )  # fmt: skip
    torch.testing.assert_close(lse[3:14], want[0].T)  # (tokens, heads), as SGLang merges them


@pytest.mark.parametrize("kind", [AttentionType.ENCODER_ONLY, AttentionType.DECODER_BIDIRECTIONAL])
def test_attention_in_both_directions(kind: AttentionType) -> None:
    world = World()
    layer = world.layer(attn_type=kind)
    attend(world, ForwardMode.EXTEND, (3, 11, 1, 4), layer, causal=False)
    layer = world.layer(attn_type=kind, sliding_window_size=4)
    attend(world, ForwardMode.EXTEND, (3, 11, 1, 4), layer, causal=False, window_size=(4, 4))


def test_cross_attention_and_the_text_behind_it() -> None:
    """An encoder's tokens come first in a request's row of slots, its text behind them."""
    encoder, past = [9, 4], (5, 0)
    world, layer, new = World(past=past), None, (1, 1)
    layer, cross = world.layer(0), world.layer(1, is_cross_attention=True)
    texts = [torch.randn(2, p + 1, KV_HEADS, DIM) for p in past]
    images = [torch.randn(2, n, KV_HEADS, DIM) for n in encoder]
    for b, (e, p) in enumerate(zip(encoder, past, strict=True)):
        world.write(layer, world.slots(b, e, e + p), *texts[b][:, :p])
        world.write(cross, world.slots(b, 0, e), *images[b])
    q = world.queries(new)
    locations = torch.stack(
        [
            world.slots(b, e + p, e + p + 1)[0]
            for b, (e, p) in enumerate(zip(encoder, past, strict=True))
        ]
    )
    batch = world.batch(
        ForwardMode.DECODE, new, encoder_lens=torch.tensor(encoder), encoder_lens_cpu=encoder,
        out_cache_loc=locations,
    )  # fmt: skip
    backend = HeadwayAttnBackend(world.runner)
    backend.init_forward_metadata(batch)
    last = [torch.cat([t[i, -1:] for t in texts]) for i in range(2)]
    world.keys, world.values = [t[0] for t in texts], [t[1] for t in texts]
    close(backend.forward(q, *last, layer, batch), world.expected(q, new))
    world.keys, world.values = [t[0] for t in images], [t[1] for t in images]
    close(backend.forward(q, None, None, cross, batch), world.expected(q, new, causal=False))


@pytest.mark.parametrize("mla", [False, True])
def test_float8_pools(mla: bool) -> None:
    world = World(page_size=8, mla=mla, dtype=torch.float8_e4m3fn)
    layer, new = world.layer(), (1, 1, 1, 1)
    if not mla:
        layer.k_scale, layer.v_scale = torch.tensor(0.05), torch.tensor(0.5)
    rows, q = world.fill(layer, new), world.queries(new)
    backend, batch = HeadwayAttnBackend(world.runner), world.batch(ForwardMode.DECODE, new)
    backend.init_forward_metadata(batch)
    out = world.run(backend, q, tuple(x.clone() for x in rows), layer, batch)
    scales = (1.0, 1.0) if mla else (0.05, 0.5)
    world.keys, world.values = (
        [(x / scale).to(torch.float8_e4m3fn).float() * scale for x in xs]
        for xs, scale in ((world.keys, scales[0]), (world.values, scales[1]))
    )
    torch.testing.assert_close(out, world.expected(q, new), rtol=1e-3, atol=1e-3)


def test_projected_latent_attention() -> None:
    """New tokens in one call, chunks of the cached prefix in others, each with its LSE."""
    world, new = World(mla=True), (3, 11, 1, 4)
    layer = RadixAttention(HEADS, 24, SCALE, HEADS, 0, v_head_dim=16)
    backend, batch = HeadwayAttnBackend(world.runner), world.batch(ForwardMode.EXTEND, new)
    backend.init_forward_metadata(batch)
    q, k, v = torch.randn(19, HEADS, 24), torch.randn(19, HEADS, 24), torch.randn(19, HEADS, 16)
    starts = [0, 3, 14, 15, 19]
    batch.set_attn_attend_prefix_cache(False)
    batch.mha_return_lse, batch.mha_one_shot = True, False
    out, lse = backend.forward(q, k, v, layer, batch, save_kv_cache=False)
    batch.set_attn_attend_prefix_cache(True)
    batch.prefix_chunk_idx, batch.prefix_chunk_max_seq_lens = 0, [5]
    batch.prefix_chunk_cu_seq_lens = torch.tensor([[0, 5, 5, 9, 11]], dtype=torch.int32)
    before, before_lse = backend.forward(q, k[:11], v[:11], layer, batch, save_kv_cache=False)
    prefix = [0, 5, 5, 9, 11]
    for b in range(4):
        rows = slice(starts[b], starts[b + 1])
        for got, got_lse, keys, causal in (
            (out, lse, rows, True),
            (before, before_lse, slice(prefix[b], prefix[b + 1]), False),
        ):
            want, want_lse = flash_attn_func(
                q[None, rows], k[None, keys], v[None, keys], softmax_scale=SCALE, causal=causal,
                return_lse=True, backend="reference",
            )  # fmt: skip
            close(got[rows], want[0])
            torch.testing.assert_close(got_lse[rows], want_lse[0].T, rtol=1e-4, atol=1e-5)


# --- captured steps -------------------------------------------------------------------------------------


def captured(world: World, mode: ForwardMode, new: Sequence[int], spec: Any) -> HeadwayAttnBackend:
    """A backend after the capture of such a step, as SGLang's runners go about it."""
    backend = HeadwayAttnBackend(world.runner)
    backend.init_cuda_graph_state(8, 64)
    dummy = world.batch(mode, new, spec_info=spec)
    dummy.seq_lens = torch.full_like(dummy.seq_lens, backend.get_cuda_graph_seq_len_fill_value())
    if mode.is_target_verify() and spec is not None:
        dummy.spec_info.custom_mask = None  # not there yet when graphs are captured
    backend.init_forward_metadata_out_graph(dummy, in_capture=True)
    backend.on_after_cuda_graph_warmup()
    backend.init_forward_metadata_in_graph(dummy)
    return backend


@worlds
@pytest.mark.parametrize("mode", ["decode", "chain", "tree", "extend"])
def test_replays_find_their_batch_where_the_capture_reads(kind: str, mode: str) -> None:
    options: dict[str, Any] = {"tree": {"topk": 2, "drafts": 6}, "chain": {"topk": 1, "drafts": 4}}
    world = World(**KINDS[kind], **options.get(mode, {}))
    steps = {
        "decode": (ForwardMode.DECODE, (1,) * 4), "chain": (ForwardMode.TARGET_VERIFY, (4,) * 4),
        "tree": (ForwardMode.TARGET_VERIFY, (6,) * 4), "extend": (ForwardMode.EXTEND, (3, 11, 1, 4)),
    }  # fmt: skip
    step, new = steps[mode]
    layer = world.layer()
    backend = captured(world, step, new, verify_input(world) if mode == "tree" else None)
    addresses = (
        backend.forward_metadata.lengths.data_ptr(),
        backend.forward_metadata.page_table.data_ptr(),
    )
    rows, q = world.fill(layer, new), world.queries(new)
    batch = world.batch(step, new, spec_info=verify_input(world) if mode == "tree" else None)
    backend.init_forward_metadata_out_graph(batch)
    metadata = backend.forward_metadata
    assert (metadata.lengths.data_ptr(), metadata.page_table.data_ptr()) == addresses
    call: dict[str, Any] = {}
    if mode == "tree":
        call = {"causal": False, "mask_mod": [in_tree(p) for p in world.past]}
    close(world.run(backend, q, rows, layer, batch), world.expected(q, new, **call))


def test_a_capture_forgets_what_the_warm_up_planned() -> None:
    world, new = World(), (1,) * 4
    backend = captured(world, ForwardMode.DECODE, new, None)
    layer, batch = world.layer(), world.batch(ForwardMode.DECODE, new)
    backend.forward(world.queries(new), *world.fill(layer, new), layer, batch)
    assert backend.forward_metadata.step._calls
    backend.on_after_cuda_graph_warmup()
    assert not backend.forward_metadata.step._calls


def test_the_contract_before_may_2026() -> None:
    world, new = World(page_size=8), (1,) * 4
    layer, backend = world.layer(), HeadwayAttnBackend(world.runner)
    rows, q = world.fill(layer, new), world.queries(new)
    batch = world.batch(ForwardMode.DECODE, new)
    ones = torch.ones_like(batch.seq_lens)
    backend.init_forward_metadata_capture_cuda_graph(
        4, 4, batch.req_pool_indices, ones, None, ForwardMode.DECODE, None
    )
    backend.init_forward_metadata_replay_cuda_graph(
        4, batch.req_pool_indices, batch.seq_lens, 66, None, ForwardMode.DECODE, None, None
    )
    close(backend.forward(q, *rows, layer, batch), world.expected(q, new))
    with pytest.raises(UnsupportedError, match="captured are"):
        backend.init_forward_metadata_replay_cuda_graph(
            3, batch.req_pool_indices, batch.seq_lens, 66, None, ForwardMode.DECODE, None, None
        )


# --- registration -----------------------------------------------------------------------------------------


def test_registration_may_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt import server_args
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    monkeypatch.delenv(integration.REPLACE_VARIABLE, raising=False)
    fa3 = ATTENTION_BACKENDS["fa3"]
    integration.register()
    integration.register()
    assert server_args.ATTENTION_BACKEND_CHOICES.count("headway") == 1
    assert ATTENTION_BACKENDS["headway"] is HeadwayAttnBackend
    assert ATTENTION_BACKENDS["fa3"] is fa3
    monkeypatch.setenv(integration.REPLACE_VARIABLE, "fa3,fa4")
    monkeypatch.setitem(ATTENTION_BACKENDS, "fa3", fa3)
    monkeypatch.setitem(ATTENTION_BACKENDS, "fa4", ATTENTION_BACKENDS["fa4"])
    integration.register()
    assert ATTENTION_BACKENDS["fa3"] is HeadwayAttnBackend
    assert ATTENTION_BACKENDS["fa4"] is HeadwayAttnBackend
    monkeypatch.setenv(integration.REPLACE_VARIABLE, "triton")
    with pytest.raises(UnsupportedError, match="triton"):
        integration.register()


def test_sglang_loads_the_plugin_and_makes_draft_backends_by_its_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sglang.srt import plugins
    from sglang.srt.speculative import draft_utils

    monkeypatch.delenv(integration.REPLACE_VARIABLE, raising=False)
    (found,) = entry_points(group=plugins.GENERAL_PLUGINS_GROUP, name="headway")
    assert found.load() is integration.register
    plugins.load_plugins()  # calls it, and applies its hook
    monkeypatch.setattr(draft_utils, "attention_backends", lambda: ("headway", "headway"))
    monkeypatch.setattr(draft_utils, "_assert_draft_needs_no_conv_sidecar", lambda runner: None)
    registry = "sglang.srt.layers.attention.attention_registry"
    for wrapper in (
        "attn_backend_wrapper_for_draft_decode",
        "attn_backend_wrapper_for_draft_extend",
    ):
        monkeypatch.setattr(f"{registry}.{wrapper}", lambda runner, backend: backend)
    monkeypatch.setattr(
        draft_utils, "get_spec", lambda: SimpleNamespace(speculative_attention_mode="prefill")
    )
    world = World(topk=2, drafts=4)
    world.runner.draft_attention_backend = None
    factory = draft_utils.DraftBackendFactory(world.runner, 2, 3)
    decode = factory.create_decode_backend()
    assert isinstance(decode, HeadwayMultiStepDraftBackend)
    assert [backend.speculative_step_id for backend in decode.attn_backends] == [0, 1]
    assert decode.decode_attention_backend_str == "headway"
    assert isinstance(factory.create_draft_extend_backend(), HeadwayAttnBackend)


def test_what_would_be_dropped_is_refused() -> None:
    world, new = World(), (1,) * 4
    layer, backend = world.layer(), HeadwayAttnBackend(world.runner)
    rows, batch = world.fill(layer, new), world.batch(ForwardMode.DECODE, new)
    backend.init_forward_metadata(batch)
    with pytest.raises(UnsupportedError, match="score_mod"):
        backend.forward(world.queries(new), *rows, layer, batch, score_mod=lambda *a: a[0])
    layer.xai_temperature_len = 8
    with pytest.raises(UnsupportedError, match="xai_temperature_len"):
        backend.forward(world.queries(new), *rows, layer, batch)
    world.runner.kv_index_translator.is_translating = True
    with pytest.raises(UnsupportedError, match="unified"):
        HeadwayAttnBackend(world.runner)
    world.runner.device = "meta"
    with pytest.raises(UnsupportedError, match="no provider"):
        HeadwayAttnBackend(world.runner)
