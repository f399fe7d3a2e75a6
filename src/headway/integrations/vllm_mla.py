"""Multi-head latent attention in vLLM: absorbed decode over the latent cache, prefill of projected keys.

Registered by :mod:`headway.integrations.vllm`, as HEADWAY_MLA and as the prefill backend CUSTOM.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.model_executor.layers.attention.mla_attention import (
    MLACommonBackend,
    MLACommonDecodeMetadata,
    MLACommonImpl,
    MLACommonMetadata,
    MLACommonMetadataBuilder,
    QueryLenSupport,
)
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionCGSupport, MultipleOf
from vllm.v1.attention.backends.mla.prefill.base import MLAPrefillBackend

from headway import interface
from headway.errors import UnsupportedError
from headway.integrations._step import Step
from headway.integrations.vllm import FLOAT8_CACHES, HeadwayBackend, write_rows
from headway.problem import Descales, KVLayout, Mask, Problem, Scores


class HeadwayMLABackend(MLACommonBackend):
    """Absorbed decode over the latent cache, (num_blocks, block_size, kv_lora_rank + rope)."""

    supported_kv_cache_dtypes: ClassVar[list[Any]] = HeadwayBackend.supported_kv_cache_dtypes

    @staticmethod
    def get_name() -> str:
        return "HEADWAY_MLA"

    @staticmethod
    def get_impl_cls() -> type[HeadwayMLAImpl]:
        return HeadwayMLAImpl

    @staticmethod
    def get_builder_cls() -> type[HeadwayMLABuilder]:
        return HeadwayMLABuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [MultipleOf(16)]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return [] if current_platform.is_cpu() else [576]

    supports_dtype = HeadwayBackend.supports_dtype
    supports_compute_capability = HeadwayBackend.supports_compute_capability


@dataclass
class HeadwayMLADecode(MLACommonDecodeMetadata):
    """The step's decoding requests."""

    query_start_loc: Tensor
    max_query_len: int
    max_seq_len: int
    step: Step = field(default_factory=Step)


class HeadwayMLABuilder(MLACommonMetadataBuilder[MLACommonMetadata[HeadwayMLADecode]]):
    """vLLM's own division into decodes and prefills, with what Headway's decode needs to know."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    query_len_support: ClassVar[QueryLenSupport] = QueryLenSupport.VARLEN

    def _build_decode(
        self,
        block_table_tensor: Tensor,
        seq_lens_device: Tensor,
        max_seq_len: int,
        query_start_loc_cpu: Tensor,
        query_start_loc_device: Tensor,
        num_decode_tokens: int,
        max_query_len: int,
        dcp_tot_seq_lens_device: Tensor | None,
        **rest: Any,
    ) -> HeadwayMLADecode:
        return HeadwayMLADecode(
            block_table=block_table_tensor,
            seq_lens=seq_lens_device,
            dcp_tot_seq_lens=dcp_tot_seq_lens_device,
            query_start_loc=query_start_loc_device,
            max_query_len=max(max_query_len, 1),
            max_seq_len=max_seq_len,
        )


class HeadwayMLAImpl(MLACommonImpl[MLACommonMetadata[HeadwayMLADecode]]):
    """Decode by Headway; vLLM's scaffolding projects and calls the prefill backend."""

    can_return_lse_for_decode = True
    lse_base_on_e = True
    supports_dcp = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        names = ("alibi_slopes", "sliding_window", "logits_soft_cap")
        given = (
            dict(zip(names, (args[4], args[5], args[7]), strict=True)) if len(args) > 7 else kwargs
        )
        for name in names:
            if given.get(name):
                raise UnsupportedError(
                    f"{name}={given[name]}: not with multi-head latent attention"
                )
        self.supports_quant_query_input = False  # queries stay as wide as they are

    def forward_mqa(
        self, q: Any, kv_c_and_k_pe_cache: Tensor, attn_metadata: Any, layer: Any
    ) -> tuple[Tensor, Tensor | None]:
        """q (T, Hq, rank + rope), or its two parts, to (T, Hq, rank) and the LSE (T, Hq) if needed."""
        decode: HeadwayMLADecode = attn_metadata.decode
        batch, rank = decode.seq_lens.shape[0], self.kv_lora_rank
        cache = kv_c_and_k_pe_cache.unsqueeze(-2)
        latent, rope = cache[..., :rank], cache[..., rank:]
        if isinstance(q, tuple):
            query, keys, qv = q[1], rope, q[0]
        else:
            query, keys, qv = q, cache, None
        quantised = cache.dtype.itemsize == 1
        scale = layer._k_scale.expand(batch, 1) if quantised else None
        problem = Problem(
            q=query,
            k=keys,
            v=latent,
            qv=qv,
            kv_layout=KVLayout.PAGED,
            batch_size=batch,
            max_seqlen_q=decode.max_query_len,
            max_seqlen_k=decode.max_seq_len,
            mask=Mask(bool(attn_metadata.causal), None, 0 if attn_metadata.causal else None),
            scores=Scores(self.scale),
            cu_seqlens_q=decode.query_start_loc,
            seqlens_k=decode.seq_lens,
            page_table=decode.block_table,
            descales=Descales(None, scale, scale),
            return_lse=self.need_to_return_lse_for_decode,
        )
        kind = (qv is None, quantised, self.num_heads, self.scale)
        out, lse = decode.step.run(kind, problem)
        return out, None if lse is None else lse.transpose(0, 1)

    def do_kv_cache_update(
        self,
        kv_c_normed: Tensor,
        k_pe: Tensor,
        kv_cache: Tensor,
        slot_mapping: Tensor,
        kv_cache_dtype: str,
        k_scale: Tensor,
        **options: Any,
    ) -> None:
        if kv_cache.device.type != "cpu":
            arguments = (kv_c_normed, k_pe, kv_cache, slot_mapping, kv_cache_dtype, k_scale)
            super().do_kv_cache_update(*arguments, **options)
        elif kv_cache.numel():
            if kv_cache_dtype in FLOAT8_CACHES:
                kv_cache = kv_cache.view(current_platform.fp8_dtype())
            if options.get("skip_scale"):  # since 0.33: the rows have been divided already
                k_scale = torch.ones_like(k_scale)
            rows = torch.cat([kv_c_normed, k_pe.flatten(1)], -1).unsqueeze(1)
            write_rows(rows, kv_cache.unsqueeze(-2), slot_mapping.flatten(), k_scale)


class HeadwayMLAPrefill(MLAPrefillBackend):
    """Prefill after the up-projection: heads 192 and 128 wide, cached context in chunks."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]

    @classmethod
    def supports_dtype(cls, dtype: torch.dtype) -> bool:
        return HeadwayBackend.supports_dtype(dtype)

    @staticmethod
    def get_name() -> str:
        return "HEADWAY"

    def supports_out(self) -> bool:
        return True

    def run_prefill_new_tokens(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        return_softmax_lse: bool,
        out: Tensor | None = None,
        output_scale: Tensor | None = None,
    ) -> Any:
        if output_scale is not None:
            raise UnsupportedError("output_scale: outputs are not quantised")
        step = self._prefill_metadata
        return self._attend(
            q,
            k,
            v,
            (step.query_start_loc,) * 2,
            (step.max_query_len,) * 2,
            True,
            out,
            return_softmax_lse,
        )

    def run_prefill_context_chunk(
        self, chunk: Any, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None = None
    ) -> Any:
        starts = (chunk.query_start_loc, chunk.cu_seq_lens)
        longest = (chunk.max_query_len, chunk.max_seq_len)
        return self._attend(q, k, v, starts, longest, False, out, True)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        starts: tuple[Tensor, Tensor],
        longest: tuple[int, int],
        causal: bool,
        out: Tensor | None,
        return_lse: bool,
    ) -> Any:
        """(T, Hq, Dv), and with ``return_lse`` a natural logarithm (Hq, T)."""
        return interface.flash_attn_varlen_func(
            q,
            k,
            v,
            starts[0],
            starts[1].to(torch.int32),
            *longest,
            softmax_scale=self.scale,
            causal=causal,
            return_lse=return_lse,
            out=out,
        )
