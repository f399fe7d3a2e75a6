"""Headway as an attention backend of vLLM 0.32 and 0.33: ``--attention-backend CUSTOM``.

vLLM calls :func:`register` (entry point ``vllm.general_plugins``) in each of its processes. It then knows
the backend as CUSTOM and, by name, as HEADWAY; for models with multi-head latent attention as HEADWAY_MLA.
On CPUs vLLM asks its platform instead: see :mod:`headway.integrations.vllm_cpu`.

A layer's cache is (num_blocks, Hkv, block_size, 2 * D), keys and values side by side, in whichever physical
order vLLM has chosen: Headway reads it through strides, so every order is taken.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config_or_none
from vllm.distributed.parallel_state import get_dcp_group
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.mla.prefill.registry import (
    MLAPrefillBackendEnum,
    register_mla_prefill_backend,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.backends.utils import get_dcp_local_seq_lens
from vllm.v1.attention.ops.dcp import cp_lse_ag_out_rs, dcp_a2a_lse_reduce

from headway import interface, quant
from headway.errors import UnsupportedError
from headway.integrations._step import Step
from headway.problem import Descales, KVLayout, Mask, Problem, Scores

#: Where vLLM finds the classes.
BACKEND = f"{__name__}.HeadwayBackend"
MLA_BACKEND = "headway.integrations.vllm_mla.HeadwayMLABackend"
MLA_PREFILL = "headway.integrations.vllm_mla.HeadwayMLAPrefill"

FLOAT8_CACHES = ("fp8", "fp8_e4m3")
_ENCODERS = (AttentionType.ENCODER, AttentionType.ENCODER_ONLY)


def register() -> None:
    """Make the backends known to vLLM in this process. May be repeated."""
    register_backend(AttentionBackendEnum.CUSTOM, BACKEND)
    register_mla_prefill_backend(MLAPrefillBackendEnum.CUSTOM, MLA_PREFILL)
    for name, path in (("HEADWAY", BACKEND), ("HEADWAY_MLA", MLA_BACKEND)):
        if name not in AttentionBackendEnum.__members__:
            register_backend(name, path)


# --- keys and values in pages ---------------------------------------------------------------------------


class HeadwayBackend(AttentionBackend):
    """What vLLM asks before it chooses. What no provider can run is refused there, by a reason."""

    forward_includes_kv_cache_update = False
    supported_kv_cache_dtypes: ClassVar[list[Any]] = [
        "auto",
        "float16",
        "bfloat16",
        *FLOAT8_CACHES,
    ]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[HeadwayImpl]:
        return HeadwayImpl

    @staticmethod
    def get_builder_cls() -> type[HeadwayBuilder]:
        return HeadwayBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [MultipleOf(16)]

    @classmethod
    def supports_dtype(cls, dtype: torch.dtype) -> bool:
        if dtype == torch.float32:
            return bool(current_platform.is_cpu())
        return dtype in (torch.float16, torch.bfloat16)

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return current_platform.is_cpu() or (head_size % 8 == 0 and head_size <= 256)

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        return not current_platform.is_cuda() or capability.major >= 8

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type in (AttentionType.DECODER, *_ENCODERS)

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_non_causal(cls) -> bool:
        return True

    @classmethod
    def supports_per_head_quant_scales(cls) -> bool:
        return True


@dataclass
class HeadwayMetadata(AttentionMetadata):
    """One step. Tensors are vLLM's own, int32 on the device, and under CUDA graphs they stay in place."""

    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    query_start_loc: Tensor  # (num_reqs + 1,)
    seq_lens: Tensor  # (num_reqs,), new tokens included
    block_table: Tensor
    slot_mapping: Tensor
    causal: bool | Tensor
    context: _Context | None = None
    step: Step = field(default_factory=Step)


@dataclass
class _Context:
    """Decode-context parallelism: this rank's share of the keys before the step's own."""

    lengths: Tensor  # (num_reqs,)
    longest: int  # 0: no request has any
    step: Step = field(default_factory=Step)


class HeadwayBuilder(AttentionMetadataBuilder[HeadwayMetadata]):
    """Turns vLLM's description of a step into Headway's.

    Replays of captured graphs need batches of one query length: kernels are launched for the longest query
    and the longest sequence that the capture names, and read all other lengths on the device.
    """

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    supports_update_block_table = True

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        parallel = vllm_config.parallel_config
        self._dcp = int(parallel.decode_context_parallel_size)
        self._interleave = int(parallel.cp_kv_cache_interleave_size)
        if self._dcp > 1:
            most = vllm_config.scheduler_config.max_num_seqs
            self._context_lengths = torch.zeros(most, dtype=torch.int32, device=device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> HeadwayMetadata:
        common = common_attn_metadata
        return HeadwayMetadata(
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            max_seq_len=common.max_seq_len,
            query_start_loc=common.query_start_loc,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            causal=common.causal,
            context=self._context(common) if self._dcp > 1 else None,
        )

    def update_block_table(
        self, metadata: HeadwayMetadata, blk_table: Tensor, slot_mapping: Tensor
    ) -> HeadwayMetadata:
        other = copy.copy(metadata)
        other.block_table, other.slot_mapping, other.step = blk_table, slot_mapping, Step()
        if other.context is not None:
            other.context = _Context(other.context.lengths, other.context.longest)
        return other

    def _context(self, common: CommonAttentionMetadata) -> _Context:
        num_reqs, group = common.num_reqs, get_dcp_group()
        new = common.query_start_loc[1:] - common.query_start_loc[:-1]
        before = (common.seq_lens - new).clamp_(min=0)
        mine = get_dcp_local_seq_lens(before, self._dcp, group.rank_in_group, self._interleave)
        lengths = self._context_lengths[:num_reqs]
        lengths.copy_(mine[:num_reqs])
        turn = self._interleave * self._dcp  # tokens that the ranks share before it starts again
        longest = -(-common.max_seq_len // turn) * self._interleave
        upper = common.seq_lens_cpu_upper_bound
        if upper is not None:
            starts = common.query_start_loc_cpu[: num_reqs + 1]
            if not bool((upper[:num_reqs] > starts[1:] - starts[:-1]).any()):
                longest = 0
        return _Context(lengths, longest)


class HeadwayImpl(AttentionImpl[HeadwayMetadata]):
    """One layer: Headway's append and its attention, in vLLM's words."""

    can_return_lse_for_decode = True
    lse_base_on_e = True
    supports_dcp = True

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.kv_cache_dtype, self.attn_type = kv_cache_dtype, attn_type
        self.sliding_window = sliding_window
        self.logits_soft_cap = float(logits_soft_cap or 0.0)
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.sinks = sinks
        self.alibi_slopes = None
        if alibi_slopes is not None:  # models are built while torch's default dtype is theirs
            self.alibi_slopes = torch.tensor(alibi_slopes, dtype=torch.float32)
        config = get_current_vllm_config_or_none()
        all_to_all = config is not None and config.parallel_config.dcp_comm_backend == "a2a"
        self._combine = dcp_a2a_lse_reduce if all_to_all else cp_lse_ag_out_rs

    # --- the cache ---

    def _pages(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, each (num_blocks, block_size, Hkv, D), where they lie."""
        if self.kv_cache_dtype in FLOAT8_CACHES:
            kv_cache = kv_cache.view(current_platform.fp8_dtype())
        keys, values = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        return keys, values

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Write new keys and values; ``slot_mapping`` says how many rows of them are real."""
        if self.attn_type in _ENCODERS:
            return
        keys, values = self._pages(kv_cache)
        if key.device.type == "cpu":
            write_rows(key, keys, slot_mapping, layer._k_scale)
            write_rows(value, values, slot_mapping, layer._v_scale)
            return
        from vllm.v1.attention.backends.fa_utils import reshape_and_cache_flash

        pages = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        scales = layer._k_scale, layer._v_scale
        reshape_and_cache_flash(key, value, *pages, slot_mapping, self.kv_cache_dtype, *scales)

    # --- attention ---

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: HeadwayMetadata,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """query (T, Hq, D), key and value (T, Hkv, D), output (T, Hq, D), which is filled and returned."""
        if output_scale is not None or output_block_scale is not None:
            raise UnsupportedError("output_scale: outputs are not quantised; they stay as query is")
        if attn_metadata is None:  # profiling of memory
            return output.zero_()
        tokens = attn_metadata.num_actual_tokens
        q, out = query[:tokens], output[:tokens]
        if self.attn_type in _ENCODERS:
            self._encode(q, key[:tokens], value[:tokens], out, attn_metadata)
        elif attn_metadata.context is not None:
            new = (key[:tokens], value[:tokens])
            self._share_context(layer, q, new, kv_cache, attn_metadata, attn_metadata.context, out)
        else:
            self._decode(layer, q, kv_cache, attn_metadata, out)
        return output

    def _decode(
        self, layer: Any, q: Tensor, kv_cache: Tensor, metadata: HeadwayMetadata, out: Tensor
    ) -> None:
        batch = metadata.seq_lens.shape[0]
        cu_seqlens: Tensor | None = metadata.query_start_loc
        if metadata.max_query_len == 1 and q.shape[0] == batch:  # a row for each request
            q, out, cu_seqlens = q.unsqueeze(1), out.unsqueeze(1), None
        causal = metadata.causal
        mask, score_mod, aux = self._mods(causal)
        keys, values = self._pages(kv_cache)
        problem = Problem(
            q=q,
            k=keys,
            v=values,
            kv_layout=KVLayout.PAGED,
            batch_size=batch,
            max_seqlen_q=metadata.max_query_len,
            max_seqlen_k=metadata.max_seq_len,
            mask=mask,
            scores=Scores(self.scale, self.logits_soft_cap, self.sinks, score_mod),
            cu_seqlens_q=cu_seqlens,
            seqlens_k=metadata.seq_lens,
            page_table=metadata.block_table,
            descales=self._descales(layer, batch),
            aux_tensors=aux,
            out=out,
        )
        metadata.step.run(self._kind(mask), problem)

    def _kind(self, mask: Mask) -> tuple[Any, ...]:
        shape = self.num_heads, self.num_kv_heads, self.head_size, self.kv_cache_dtype
        return (*shape, self.scale, self.logits_soft_cap, self.sinks is None, mask)

    def _mods(self, causal: bool | Tensor) -> tuple[Mask, Any, tuple[Tensor, ...]]:
        """What is not causal sees as far ahead as back; ``causal`` per request is a mask of its own."""
        left = None if self.sliding_window is None else self.sliding_window - 1
        aux: list[Tensor] = []
        mask = Mask(True, left, 0) if causal is True else Mask(False, left, left)
        if isinstance(causal, Tensor):
            if left is not None:
                raise UnsupportedError(
                    "causal as a tensor (by request) in a layer with a sliding window: one or the other"
                )
            mask = Mask(mask_mod=_causal_where)
            aux.append(causal)
        if self.alibi_slopes is None:
            return mask, None, tuple(aux)
        return mask, _alibi, (*aux, self.alibi_slopes)

    def _descales(self, layer: Any, batch: int) -> Descales:
        if self.kv_cache_dtype not in FLOAT8_CACHES:
            return Descales()
        shape = batch, self.num_kv_heads
        return Descales(None, layer._k_scale.expand(shape), layer._v_scale.expand(shape))

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        if self.alibi_slopes is not None:
            self.alibi_slopes = self.alibi_slopes.to(current_platform.device_type)

    def _encode(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, metadata: HeadwayMetadata
    ) -> None:
        """Tokens of an encoder see each other, and no cache."""
        mask, score_mod, aux = self._mods(False)
        side = -1 if mask.window_left is None else mask.window_left
        interface.flash_attn_varlen_func(
            q,
            k,
            v,
            metadata.query_start_loc,
            metadata.query_start_loc,
            metadata.max_query_len,
            metadata.max_query_len,
            softmax_scale=self.scale,
            window_size=(side, side),
            softcap=self.logits_soft_cap,
            sinks=self.sinks,
            score_mod=score_mod,
            aux_tensors=aux,
            out=out,
        )

    # --- decode-context parallelism ---

    def _share_context(
        self,
        layer: Any,
        q: Tensor,
        new: tuple[Tensor, Tensor],
        kv_cache: Tensor,
        metadata: HeadwayMetadata,
        context: _Context,
        out: Tensor,
    ) -> None:
        """Every rank's queries meet this rank's keys; then each rank's own meet the step's new keys.

        Sinks count once, in the second part: they are no keys of the shards.
        """
        if self.sliding_window is not None or self.alibi_slopes is not None:
            raise UnsupportedError(
                "decode-context parallelism takes no sliding window and no ALiBi: a rank does not know "
                "the positions of its keys"
            )
        if isinstance(metadata.causal, Tensor):
            raise UnsupportedError("causal as a tensor (by request) in decode-context parallelism")
        attended, lse = interface.flash_attn_varlen_func(
            q,
            *new,
            metadata.query_start_loc,
            metadata.query_start_loc,
            metadata.max_query_len,
            metadata.max_query_len,
            softmax_scale=self.scale,
            causal=metadata.causal is True,
            softcap=self.logits_soft_cap,
            sinks=self.sinks,
            return_lse=True,
        )
        if context.longest == 0:
            out.copy_(attended)
            return
        before, lse_before = self._attend_shard(layer, q, kv_cache, metadata, context)
        merged, _ = interface.merge_states([before, attended], [lse_before, lse])
        out.copy_(merged)

    def _attend_shard(
        self, layer: Any, q: Tensor, kv_cache: Tensor, metadata: HeadwayMetadata, context: _Context
    ) -> tuple[Tensor, Tensor]:
        """(T, Hq, D) and (Hq, T) of this rank's heads over the keys of all ranks."""
        group = get_dcp_group()
        gathered = group.all_gather(q.contiguous(), dim=1)
        keys, values = self._pages(kv_cache)
        mask = Mask()
        problem = Problem(
            q=gathered,
            k=keys,
            v=values,
            kv_layout=KVLayout.PAGED,
            batch_size=context.lengths.shape[0],
            max_seqlen_q=metadata.max_query_len,
            max_seqlen_k=context.longest,
            mask=mask,
            scores=Scores(self.scale, self.logits_soft_cap),
            cu_seqlens_q=metadata.query_start_loc,
            seqlens_k=context.lengths,
            page_table=metadata.block_table,
            descales=self._descales(layer, context.lengths.shape[0]),
            return_lse=True,
        )
        part, lse = context.step.run(self._kind(mask), problem)
        assert lse is not None
        # Headway's LSE is a natural logarithm, (heads, tokens); the combination wants (tokens, heads).
        by_token = lse.transpose(0, 1).contiguous()
        combined, lse = self._combine(part, by_token, group, return_lse=True)
        return combined, lse.transpose(0, 1).contiguous()


def write_rows(rows: Tensor, pages: Tensor, slots: Tensor, scale: Tensor) -> None:
    """Rows (T or more, Hkv, D) into pages (num_blocks, block_size, Hkv, D); slots (T,), -1 is nowhere."""
    rows, kept = rows[: slots.shape[0]], slots >= 0
    rows, slots = rows[kept], slots[kept]
    if pages.dtype.itemsize == 1:
        rows = quant.quantise(rows, pages.dtype, scale=scale).values
        rows, pages = rows.view(torch.uint8), pages.view(torch.uint8)
    size = pages.shape[1]
    pages[slots // size, slots % size] = rows.to(pages.dtype)


def _causal_where(b: Any, h: Any, q_idx: Any, kv_idx: Any, aux: tuple[Any, ...]) -> Any:
    return (kv_idx <= q_idx) | (aux[0][b] == 0)


def _alibi(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any, aux: tuple[Any, ...]) -> Any:
    return score + aux[-1][h] * (kv_idx - q_idx)
