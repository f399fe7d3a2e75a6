"""Headway as an attention backend of SGLang 0.5.23: ``--attention-backend headway``.

SGLang calls :func:`register` (entry point ``sglang.srt.plugins``). Where one of its own lists refuses a new
name, Headway can answer to names it knows: ``HEADWAY_SGLANG_REPLACE=fa3,fa4``, ``--attention-backend fa3``.

SGLang's contract since May 2026: ``init_forward_metadata`` for eager steps; for captured ones
``init_forward_metadata_out_graph`` before a capture or replay, ``init_forward_metadata_in_graph`` where the
recording begins. The two methods of the contract before it are here as well and do the same work.

Trees of draft tokens are one call over the prefix, which all rows of a request share, and one over the
draft tokens, merged. Layers with a window are one call, since rows of a tree see different windows.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from torch import Tensor

from headway import interface, supported_versions
from headway.errors import UnsupportedError
from headway.integrations._step import Step
from headway.integrations.sglang_layer import Branches, Layer, Metadata, Tree

NAME = "headway"

#: Names of SGLang's own backends that Headway stands in for, separated by commas.
REPLACE_VARIABLE = "HEADWAY_SGLANG_REPLACE"
_REPLACEABLE = ("fa3", "fa4")


def register() -> None:
    """Make the backend known to SGLang in this process. May be repeated."""
    from sglang.srt import server_args
    from sglang.srt.layers.attention.attention_registry import (
        ATTENTION_BACKENDS,
        register_attention_backend,
    )

    for name in _replaced():
        register_attention_backend(name)(HeadwayAttnBackend)
    if NAME in ATTENTION_BACKENDS:
        return
    register_attention_backend(NAME)(HeadwayAttnBackend)
    server_args.add_attention_backend_choices([NAME])
    server_args.add_draft_attention_backend_choices([NAME])
    server_args.add_chunked_prefix_cache_attention_backend(NAME)
    _hook_draft_backends()


def _replaced() -> list[str]:
    names = [name for name in os.environ.get(REPLACE_VARIABLE, "").split(",") if name]
    unknown = sorted(set(names) - set(_REPLACEABLE))
    if unknown:
        raise UnsupportedError(f"{REPLACE_VARIABLE}={','.join(unknown)}: one of fa3, fa4, or both")
    return names


def _hook_draft_backends() -> None:
    """SGLang makes the backends of draft models from a table of names inside of a function."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    target = "sglang.srt.speculative.draft_utils.DraftBackendFactory._create_backend"
    HookRegistry.register(target, _create_draft_backend, HookType.AROUND)


def _create_draft_backend(
    original: Callable[..., Any],
    factory: Any,
    backend_name: str,
    backend_map: dict[str, Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    runner = factory.draft_model_runner

    def decode() -> tuple[str, Any]:
        return NAME, HeadwayMultiStepDraftBackend(
            runner, factory.topk, factory.speculative_num_steps
        )

    def extend() -> tuple[str, Any]:
        return NAME, HeadwayAttnBackend(runner, skip_prefill=False)

    make = decode if "decode" in backend_map["fa3"].__name__ else extend
    added = dict.fromkeys((NAME, *_replaced()), make)
    return original(factory, backend_name, {**backend_map, **added}, *args, **kwargs)


# --- the backend --------------------------------------------------------------------------------------


class HeadwayAttnBackend(AttentionBackend):
    """Attention of a model in SGLang, on whichever device its runner has.

    What runs there is settled here, when the backend is made, and not when this module is imported: one
    process may have several devices, and no device's kernels are imported for another.

    Args:
        model_runner: SGLang's.
        skip_prefill: that it serves decodes alone (SGLang says so for drafts); nothing depends on it.
        speculative_step_id, topk, speculative_num_steps: set by :class:`HeadwayMultiStepDraftBackend`.

    Raises:
        UnsupportedError: no provider runs on the device, or the pool is one that Headway cannot read.
    """

    needs_cpu_seq_lens = False

    def __init__(
        self,
        model_runner: Any,
        skip_prefill: bool = False,
        speculative_step_id: int = 0,
        topk: int = 0,
        speculative_num_steps: int = 0,
    ) -> None:
        super().__init__()
        self.device = torch.device(model_runner.device)
        if not supported_versions(self.device):
            raise UnsupportedError(f"{self.device}: no provider of Headway runs here")
        config = model_runner.model_config
        self.max_context_len = int(config.context_len)
        self.page_size = int(model_runner.page_size)
        self.req_to_token_pool = model_runner.req_to_token_pool
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        self.req_to_token = model_runner.req_to_token_pool.req_to_token
        self.kv_cache_dtype = model_runner.kv_cache_dtype
        self.use_mla = config.attention_arch.name == "MLA"
        self.attention_chunk_size = getattr(model_runner, "attention_chunk_size", None)
        window = model_runner.sliding_window_size
        self.has_swa = window is not None and window > -1
        self.use_sliding_window_kv_pool = _is_swa_pool(self.token_to_kv_pool)
        arguments = model_runner.server_args
        self.topk = int(arguments.speculative_eagle_topk or topk or 0)
        self.speculative_num_draft_tokens = int(arguments.speculative_num_draft_tokens or 0)
        self.speculative_num_steps = speculative_num_steps
        self.speculative_step_id = speculative_step_id
        self.forward_metadata: Metadata | None = None
        self._captured: dict[tuple[str, int], Metadata] = {}
        self.kv_index_translator = getattr(model_runner, "kv_index_translator", None)
        if getattr(self.kv_index_translator, "is_translating", False):
            raise UnsupportedError(
                "--enable-unified-memory: not with Headway, whose tables are slots"
            )

    # --- steps ---

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """An eager step."""
        self.forward_metadata = self._build(forward_batch, self._longest(forward_batch))

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Buffers are made by the captures, each of its own size, and kept for their replays."""
        self._captured = {}

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Before a capture: make the buffers that it reads. Before a replay: fill them."""
        key = forward_batch.forward_mode.name, int(forward_batch.batch_size)
        built = self._build(forward_batch, self.max_context_len, in_capture)
        if in_capture:
            self._captured[key] = built
        else:
            if key not in self._captured:
                raise UnsupportedError(f"a replay of {key}: captured are {sorted(self._captured)}")
            self._captured[key].copy_(built)
        self.forward_metadata = self._captured[key]

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        """What warm-up runs have planned is forgotten, so that the capture records the planning."""
        if self.forward_metadata is not None:
            self.forward_metadata.step = Step()

    def on_after_cuda_graph_warmup(self) -> None:
        self.init_forward_metadata_in_graph(None)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

    def init_forward_metadata_capture_cuda_graph(
        self, bs: int, num_tokens: int, req_pool_indices: Tensor, seq_lens: Tensor,
        encoder_lens: Tensor | None, forward_mode: Any, spec_info: Any,
    ) -> None:  # fmt: skip
        """The contract before May 2026."""
        batch = _batch(bs, req_pool_indices, seq_lens, encoder_lens, forward_mode, spec_info)
        batch.positions = torch.zeros(num_tokens, dtype=torch.int64, device=self.device)
        self.init_forward_metadata_out_graph(batch, in_capture=True)

    def init_forward_metadata_replay_cuda_graph(
        self, bs: int, req_pool_indices: Tensor, seq_lens: Tensor, seq_lens_sum: int,
        encoder_lens: Tensor | None, forward_mode: Any, spec_info: Any, seq_lens_cpu: Tensor | None,
        out_cache_loc: Tensor | None = None,
    ) -> None:  # fmt: skip
        """The contract before May 2026."""
        batch = _batch(bs, req_pool_indices, seq_lens, encoder_lens, forward_mode, spec_info)
        batch.out_cache_loc = out_cache_loc
        batch.positions = getattr(spec_info, "positions", None)
        self.init_forward_metadata_out_graph(batch)

    def _longest(self, batch: Any) -> int:
        """A bound of the sequences' lengths: the longest, where the host knows it."""
        known = batch.seq_lens_cpu
        if known is None or known.numel() == 0:
            return self.max_context_len
        return int(known[: batch.batch_size].max())

    def _build(self, batch: Any, longest: int, in_capture: bool = False) -> Metadata:
        mode, bs = batch.forward_mode, int(batch.batch_size)
        lengths = batch.seq_lens[:bs].to(torch.int32)
        if mode.is_decode_or_idle():
            metadata = self._build_decode(batch, lengths, longest, in_capture)
        elif mode.is_target_verify():
            metadata = self._build_verify(batch, lengths, longest, in_capture)
        else:
            metadata = self._build_extend(batch, lengths, longest, in_capture)
        if batch.encoder_lens is not None:
            self._add_encoder(metadata, batch, in_capture)
        locations = batch.out_cache_loc
        if self.use_sliding_window_kv_pool and locations is not None and metadata.branches is None:
            metadata.swa_out_cache_loc = self._to_swa(locations)
        return metadata

    def _build_decode(
        self, batch: Any, lengths: Tensor, longest: int, in_capture: bool
    ) -> Metadata:
        bs = lengths.shape[0]
        drafted = self.speculative_step_id + 1 if batch.spec_info is not None else 0
        if drafted and self.topk > 1 and self.speculative_num_steps > 0:
            return self._build_branches(batch, lengths, longest, drafted, in_capture)
        if self.topk > 1:
            drafted = 0
        keys = longest + drafted
        table, swa_table = self._tables(batch, bs, keys)
        return Metadata(bs, 1, 1, keys, lengths + drafted, table, swa_page_table=swa_table)

    def _build_branches(
        self, batch: Any, lengths: Tensor, longest: int, drafted: int, in_capture: bool
    ) -> Metadata:
        bs, topk, steps = lengths.shape[0], self.topk, self.speculative_num_steps
        locations = batch.out_cache_loc
        if in_capture and locations is None:
            locations = torch.zeros(bs * topk * steps, dtype=torch.int64, device=self.device)
        mine = locations.view(-1, steps)[:, :drafted]
        swa = self._to_swa(mine) if self.use_sliding_window_kv_pool else None
        branches = Branches(mine.to(torch.int32), None if swa is None else swa.to(torch.int32))
        table, swa_table = self._tables(batch, bs, longest)
        metadata = Metadata(bs, topk, topk, longest, lengths, table, swa_page_table=swa_table)
        metadata.branches = branches
        if self.use_sliding_window_kv_pool:
            by_step = locations.view(bs, topk, steps)[:, :, self.speculative_step_id]
            metadata.swa_out_cache_loc = self._to_swa(by_step.reshape(-1))
        if self.has_swa:
            rows = self._slots(batch, bs, longest + drafted).repeat_interleave(topk, 0)
            columns = lengths.repeat_interleave(topk)[:, None] + torch.arange(
                drafted, device=self.device
            )
            rows.scatter_(1, columns.long(), mine.to(rows.dtype))
            metadata.slots = rows
            if self.use_sliding_window_kv_pool:
                metadata.swa_slots = self._to_swa(rows).to(torch.int32)
        return metadata

    def _build_verify(
        self, batch: Any, lengths: Tensor, longest: int, in_capture: bool
    ) -> Metadata:
        # The batch's own width, where it says one: adaptive speculation changes it between steps.
        width = getattr(batch.spec_info, "num_tokens_per_req", -1)
        bs, drafts = lengths.shape[0], width if width > 0 else self.speculative_num_draft_tokens
        keys = longest + drafts
        table, swa_table = self._tables(batch, bs, keys)
        layout = getattr(batch.spec_info, "ragged_verify_layout", None)
        if layout is not None:
            each = layout.verify_lens[:bs].to(torch.int32)
            metadata = Metadata(bs, 0, drafts, keys, lengths + each, table, _cumulative(each))
            metadata.swa_page_table = swa_table
            return metadata
        if self.topk <= 1:
            return Metadata(
                bs, drafts, drafts, keys, lengths + drafts, table, swa_page_table=swa_table
            )
        metadata = Metadata(bs, drafts, drafts, longest, lengths, table, swa_page_table=swa_table)
        columns = batch.seq_lens[:bs, None].long() + torch.arange(drafts, device=self.device)
        requests = batch.req_pool_indices[:bs, None].long()
        slots = self.req_to_token[requests, columns].to(torch.int32)
        swa = self._to_swa(slots).to(torch.int32) if self.use_sliding_window_kv_pool else None
        metadata.tree = Tree(*self._tree(batch, columns, in_capture), slots, swa)
        if self.has_swa:
            metadata.slots = self._slots(batch, bs, keys)
            if self.use_sliding_window_kv_pool:
                metadata.swa_slots = self._to_swa(metadata.slots).to(torch.int32)
        return metadata

    def _tree(self, batch: Any, columns: Tensor, in_capture: bool) -> tuple[Tensor, Tensor]:
        """Visibility among the draft tokens, out of SGLang's mask: per request, T rows over all keys."""
        bs, drafts = columns.shape
        flat = getattr(batch.spec_info, "custom_mask", None)
        if in_capture or flat is None:
            if not in_capture:
                raise UnsupportedError(
                    "target verification with topk > 1 needs spec_info.custom_mask"
                )
            chain = torch.ones(drafts, drafts, dtype=torch.bool, device=self.device).tril()
            return chain.expand(bs, -1, -1).clone(), columns.to(torch.int32)
        widths = batch.seq_lens[:bs].long() + drafts
        starts = (widths * drafts).cumsum(0) - widths * drafts
        rows = starts[:, None] + torch.arange(drafts, device=self.device) * widths[:, None]
        positions = batch.spec_info.positions
        if positions is None or positions.numel() < bs * drafts:
            positions = batch.positions  # a graph's, with requests of padding behind the others
        wanted = rows[:, :, None] + columns[:, None, :]
        visible = flat[wanted.clamp(max=flat.numel() - 1)].bool()  # padding has no mask of its own
        return visible, positions[: bs * drafts].view(bs, drafts).to(torch.int32)

    def _build_extend(
        self, batch: Any, lengths: Tensor, longest: int, in_capture: bool
    ) -> Metadata:
        bs = lengths.shape[0]
        each = batch.extend_seq_lens[:bs].to(torch.int32)
        on_host = getattr(batch, "extend_seq_lens_cpu", None)
        if in_capture:
            most = batch.positions.numel()
        elif on_host is not None:
            most = max(on_host, default=0)
        else:  # draft extension: every request has as many
            most = -(-batch.positions.numel() // max(bs, 1))
        table, swa_table = self._tables(batch, bs, longest)
        return Metadata(
            bs, 0, most, longest, lengths, table, _cumulative(each), swa_page_table=swa_table
        )

    def _add_encoder(self, metadata: Metadata, batch: Any, in_capture: bool) -> None:
        """Cross attention reads an encoder's tokens, which lie before a request's text."""
        bs, before = metadata.batch_size, batch.encoder_lens.to(torch.int32)
        on_host = getattr(batch, "encoder_lens_cpu", None)
        longest = self.max_context_len if in_capture or not on_host else max(on_host)
        metadata.encoder_lengths = before
        metadata.encoder_page_table, _ = self._tables(batch, bs, longest)
        columns = before[:, None].long() + torch.arange(metadata.most_keys, device=self.device)
        rows = batch.req_pool_indices[:bs, None].long()
        slots = self.req_to_token[rows, columns.clamp(max=self.req_to_token.shape[1] - 1)]
        metadata.page_table = (slots[:, :: self.page_size] // self.page_size).to(torch.int32)

    def _slots(self, batch: Any, bs: int, keys: int) -> Tensor:
        """Slots of the requests' first ``keys`` tokens, (B, keys)."""
        return self.req_to_token[batch.req_pool_indices[:bs], :keys].to(torch.int32)

    def _tables(self, batch: Any, bs: int, keys: int) -> tuple[Tensor, Tensor | None]:
        """Page tables of the pool, and of the window's pool where that is another one."""
        pages = self.req_to_token[batch.req_pool_indices[:bs], : keys : self.page_size]
        table = (pages // self.page_size).to(torch.int32)
        if not self.use_sliding_window_kv_pool:
            return table, None
        return table, (self._to_swa(pages) // self.page_size).to(torch.int32)

    def _to_swa(self, slots: Tensor) -> Tensor:
        return self.token_to_kv_pool.translate_loc_from_full_to_swa(slots)

    # --- layers ---

    def forward_extend(
        self, q: Tensor, k: Tensor | None, v: Tensor | None, layer: Any, forward_batch: Any,
        save_kv_cache: bool = True, **options: Any,
    ) -> Any:  # fmt: skip
        """q (T, Hq * D), k and v (T, Hkv, D) or None, to (T, Hq * Dv); with ``return_lse`` also (T, Hq)."""
        _refuse(layer, forward_batch, options)
        if save_kv_cache and k is not None:
            self._save(k, v, layer, forward_batch, options.get("k_rope"))
        projected = getattr(forward_batch, "attn_attend_prefix_cache", None) is not None
        mode = forward_batch.forward_mode
        if (
            self.use_mla
            and projected
            and not (mode.is_target_verify() or mode.is_draft_extend_v2())
        ):
            return self._attend_projected(q, k, v, layer, forward_batch)
        return self._attend(q, layer, forward_batch, options)

    def forward_decode(
        self, q: Tensor, k: Tensor | None, v: Tensor | None, layer: Any, forward_batch: Any,
        save_kv_cache: bool = True, **options: Any,
    ) -> Any:  # fmt: skip
        """As :meth:`forward_extend`, a row for each sequence or branch."""
        _refuse(layer, forward_batch, options)
        if save_kv_cache and k is not None:
            self._save(k, v, layer, forward_batch, options.get("k_rope"))
        return self._attend(q, layer, forward_batch, options)

    def _save(
        self, k: Tensor, v: Tensor | None, layer: Any, batch: Any, k_rope: Tensor | None
    ) -> None:
        metadata, pool = self._metadata(), self.token_to_kv_pool
        swa = metadata.swa_out_cache_loc
        if self.use_sliding_window_kv_pool and swa is None:
            swa = self._to_swa(batch.out_cache_loc)
        where = _write_location(batch, layer, swa)
        if k_rope is not None:
            pool.set_mla_kv_buffer(layer, where, k, k_rope)
        elif self.use_mla:
            pool.set_kv_buffer(layer, where, k, v)
        else:
            pool.set_kv_buffer(layer, where, k, v, layer.k_scale, layer.v_scale)

    def _attend(self, q: Tensor, layer: Any, batch: Any, options: dict[str, Any]) -> Any:
        call = Layer.of(self, layer, q, batch, options)
        metadata = self._metadata()
        if layer.is_cross_attention:
            out, lse = call.cross(metadata)
        elif metadata.tree is not None:
            out, lse = (call.window_over_tree if call.window else call.tree)(
                metadata, metadata.tree
            )
        elif metadata.branches is not None:
            run = call.window_over_branches if call.window else call.branches
            out, lse = run(metadata, metadata.branches)
        else:
            out, lse = call.plain(metadata)
        given = getattr(batch, "_attn_output", None)
        flat = out.reshape(-1, layer.tp_q_head_num * layer.v_head_dim)
        if given is not None:
            flat = given.view(-1, flat.shape[1])[: flat.shape[0]].copy_(flat)
        if not options.get("return_lse"):
            return flat
        assert lse is not None
        return flat, lse.transpose(0, 1).contiguous()

    def _metadata(self) -> Metadata:
        if self.forward_metadata is None:
            raise UnsupportedError("forward was called before init_forward_metadata")
        return self.forward_metadata

    def _attend_projected(self, q: Tensor, k: Any, v: Any, layer: Any, batch: Any) -> Any:
        """Latent attention after the up-projection: the new tokens, or one chunk of a cached prefix."""
        metadata = self._metadata()
        starts = metadata.cu_seqlens_q
        in_prefix = batch.attn_attend_prefix_cache
        if in_prefix:
            chunk = batch.prefix_chunk_idx
            keys, longest = (
                batch.prefix_chunk_cu_seq_lens[chunk],
                batch.prefix_chunk_max_seq_lens[chunk],
            )
        elif batch.mha_one_shot:
            keys, longest = _cumulative(metadata.lengths), metadata.most_keys
        else:
            keys, longest = starts, metadata.most_rows
        wants_lse = bool(in_prefix or batch.mha_return_lse)
        result = interface.flash_attn_varlen_func(
            q.view(-1, layer.tp_q_head_num, layer.head_dim),
            k.view(-1, layer.tp_k_head_num, layer.head_dim).to(q.dtype),
            v.view(-1, layer.tp_k_head_num, layer.v_head_dim).to(q.dtype),
            starts,
            keys.to(torch.int32),
            metadata.most_rows,
            longest,
            softmax_scale=layer.scaling,
            causal=not in_prefix,
            return_lse=wants_lse,
        )
        if not wants_lse:
            return result
        out, lse = result
        return out, lse.transpose(0, 1).contiguous()


class HeadwayMultiStepDraftBackend:
    """What SGLang's draft workers hold: a backend for each draft step but the last, which needs none."""

    needs_cpu_seq_lens = False

    def __init__(self, model_runner: Any, topk: int, speculative_num_steps: int) -> None:
        self.model_runner, self.topk = model_runner, topk
        self.speculative_num_steps = speculative_num_steps
        self.kv_index_translator = getattr(model_runner, "kv_index_translator", None)
        self.attn_backends = [
            HeadwayAttnBackend(model_runner, True, step, topk, speculative_num_steps)
            for step in range(speculative_num_steps - 1)
        ]
        self.attn_backend_list = self.attn_backends
        self.forward_metadata = None

    def init_forward_metadata(self, forward_batch: Any) -> None:
        for backend in self.attn_backends:
            backend.init_forward_metadata(forward_batch)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        for backend in self.attn_backends:
            backend.init_cuda_graph_state(max_bs, max_num_tokens)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        inner = _as_decode(forward_batch)
        for backend in self.attn_backends:
            backend.init_forward_metadata_out_graph(inner, in_capture)

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        for backend in self.attn_backends:
            backend.init_forward_metadata_in_graph(forward_batch)

    def on_after_cuda_graph_warmup(self) -> None:
        self.init_forward_metadata_in_graph(None)

    def init_forward_metadata_capture_cuda_graph(self, forward_batch: Any) -> None:
        """The contract before May 2026."""
        self.init_forward_metadata_out_graph(forward_batch, in_capture=True)

    def init_forward_metadata_replay_cuda_graph(self, forward_batch: Any, bs: int) -> None:
        """The contract before May 2026."""
        self.init_forward_metadata_out_graph(forward_batch)


def _cumulative(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(torch.cumsum(lengths, 0, dtype=torch.int32), (1, 0))


def _is_swa_pool(pool: Any) -> bool:
    return (
        hasattr(pool, "translate_loc_from_full_to_swa") and getattr(pool, "swa_layer_nums", 1) > 0
    )


def _write_location(batch: Any, layer: Any, swa: Tensor | None) -> Any:
    """Where new keys go, in the words of the pool: an object since 2026, slots before."""
    try:
        from sglang.srt.mem_cache.memory_pool import KVWriteLoc
    except ImportError:
        return batch.encoder_out_cache_loc if layer.is_cross_attention else batch.out_cache_loc
    if swa is not None and layer.is_cross_attention:
        swa = None
    return KVWriteLoc.for_layer(batch, layer, swa_loc=swa)


def _batch(
    bs: int, requests: Tensor, lengths: Tensor, encoder_lens: Tensor | None, mode: Any, spec: Any
) -> SimpleNamespace:
    """The arguments of the older contract as a batch of the newer one."""
    return SimpleNamespace(
        batch_size=bs,
        req_pool_indices=requests,
        seq_lens=lengths,
        seq_lens_cpu=None,
        encoder_lens=encoder_lens,
        forward_mode=mode,
        spec_info=spec,
        out_cache_loc=None,
        positions=None,
        extend_seq_lens=getattr(spec, "accept_length", None),
        extend_seq_lens_cpu=None,
    )


def _as_decode(batch: Any) -> Any:
    """A draft batch as its steps see it: decodes."""
    from sglang.srt.model_executor import forward_batch_info as info

    if not hasattr(info, "build_inner_fb_view"):
        return batch
    return info.build_inner_fb_view(
        batch,
        bs=batch.batch_size,
        forward_mode=info.ForwardMode.DECODE,
        encoder_lens=batch.encoder_lens,
    )


def _refuse(layer: Any, batch: Any, options: dict[str, Any]) -> None:
    for name in ("score_mod", "rel_bias", "q_descale", "k_descale", "v_descale"):
        if options.get(name) is not None:
            raise UnsupportedError(
                f"{name}: Headway takes it not in this form; use --attention-backend fa4"
            )
    if getattr(layer, "xai_temperature_len", -1) > 0:
        raise UnsupportedError("xai_temperature_len: use --attention-backend triton")
    if getattr(batch, "dcp_kv_mask", None) is not None:
        raise UnsupportedError("decode-context parallelism: not with Headway in SGLang")
