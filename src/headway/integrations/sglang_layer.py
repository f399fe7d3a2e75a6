"""One layer in one step of SGLang: what the layers of a step share, and the calls that a layer takes."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from headway import interface
from headway.errors import UnsupportedError
from headway.integrations._step import Step
from headway.problem import FLOAT8_DTYPES, Descales, KVLayout, Mask, Problem, Scores


@dataclass
class Tree:
    """Draft tokens of a verification with branches: T per request."""

    visible: Tensor  # (B, T, T) bool: which draft tokens a draft token sees
    positions: Tensor  # (B, T) int32, in the sequence; branches share some
    slots: Tensor  # (B, T) int32, where their keys lie
    swa_slots: Tensor | None


@dataclass
class Branches:
    """Draft decoding with ``topk`` branches per request: each row has drafted some tokens of its own."""

    slots: Tensor  # (B * topk, steps so far) int32
    swa_slots: Tensor | None


@dataclass
class Metadata:
    """One step. All lengths are int32 on the device; ``most_*`` are upper bounds."""

    batch_size: int
    rows: int  # query rows per request where all have as many, else 0
    most_rows: int
    most_keys: int
    lengths: Tensor  # (B,): keys of each request, new ones included; of a tree, its prefix
    page_table: Tensor  # (B, pages)
    cu_seqlens_q: Tensor | None = None  # where requests have different numbers of rows
    swa_page_table: Tensor | None = None
    swa_out_cache_loc: Tensor | None = None
    #: (B, keys): every token's slot, for windows over trees and branches
    slots: Tensor | None = None
    swa_slots: Tensor | None = None
    encoder_lengths: Tensor | None = None
    encoder_page_table: Tensor | None = None
    tree: Tree | None = None
    branches: Branches | None = None
    step: Step = field(default_factory=Step)

    def copy_(self, other: Metadata) -> None:
        """Take over another step in place. Tables may be narrower: what is behind them is not read."""
        _copy_tensors(self, other)


def _copy_tensors(mine: Any, theirs: Any) -> None:
    for part in fields(mine):
        target, source = getattr(mine, part.name), getattr(theirs, part.name)
        if isinstance(target, Tensor):
            target[tuple(slice(n) for n in source.shape)].copy_(source)
        elif isinstance(target, Tree | Branches):
            _copy_tensors(target, source)


class Backend(Protocol):
    """What a layer asks of the backend that runs it."""

    page_size: int
    attention_chunk_size: int | None
    use_mla: bool
    use_sliding_window_kv_pool: bool
    token_to_kv_pool: Any


@dataclass
class Layer:
    """A layer's part of a step, and the calls it takes. ``rows`` are queries (T, Hq, D)."""

    backend: Backend
    layer: Any
    rows: Tensor
    latent: Tensor | None  # (T, Hq, rank), beside rows of the rotary part
    sinks: Tensor | None
    window: int | None  # keys before a token that it sees
    causal: bool
    want_lse: bool

    @staticmethod
    def of(backend: Backend, layer: Any, q: Tensor, batch: Any, options: dict[str, Any]) -> Layer:
        heads, rope = layer.tp_q_head_num, options.get("q_rope")
        if rope is None:
            rows, latent = q.reshape(-1, heads, layer.head_dim), None
        else:
            rows = rope.reshape(-1, heads, layer.head_dim - layer.v_head_dim)
            latent = q.reshape(-1, heads, layer.v_head_dim)
        size = layer.sliding_window_size
        window = size if size is not None and size > -1 else None
        kind = getattr(layer.attn_type, "value", layer.attn_type)
        causal = not layer.is_cross_attention and kind == "decoder"
        sinks, want_lse = options.get("sinks"), bool(options.get("return_lse"))
        return Layer(backend, layer, rows, latent, sinks, window, causal, want_lse)

    @property
    def _in_swa_pool(self) -> bool:
        local = self.window is not None or self._chunk > 0
        return self.backend.use_sliding_window_kv_pool and local

    @property
    def _chunk(self) -> int:
        return int(self.backend.attention_chunk_size or 0) if self.layer.use_irope else 0

    def plain(self, metadata: Metadata) -> tuple[Tensor, Tensor | None]:
        """One call over the page table."""
        table = metadata.swa_page_table if self._in_swa_pool else metadata.page_table
        right = 0 if self.causal else self.window
        mask = Mask(self.causal, self.window, right, self._chunk)
        return self._solve("plain", metadata, metadata.lengths, table, mask, want_lse=self.want_lse)

    def cross(self, metadata: Metadata) -> tuple[Tensor, Tensor | None]:
        lengths, table = metadata.encoder_lengths, metadata.encoder_page_table
        return self._solve("cross", metadata, lengths, table, Mask(), want_lse=self.want_lse)

    def tree(self, metadata: Metadata, tree: Tree) -> tuple[Tensor, Tensor | None]:
        """The prefix, which all draft tokens see, and the draft tokens among themselves."""
        count = torch.full_like(metadata.lengths, tree.slots.shape[1])
        prefix = self._solve("prefix", metadata, metadata.lengths, metadata.page_table, Mask())
        drafts = self._solve(
            "tree", metadata, count, tree.slots, Mask(mask_mod=_descends), (tree.visible,),
            most_keys=tree.slots.shape[1], by_slot=True, sinks=False,
        )  # fmt: skip
        return self._merge(prefix, drafts)

    def window_over_tree(self, metadata: Metadata, tree: Tree) -> tuple[Tensor, Tensor | None]:
        """One call: a draft token's window begins where its position says, not its row."""
        assert self.window is not None
        size = torch.full((), self.window, dtype=torch.int32, device=self.rows.device)
        aux = (metadata.lengths, tree.positions, tree.visible, size)
        slots, drafts = metadata.slots, tree.slots.shape[1]
        slots = metadata.swa_slots if self._in_swa_pool else slots
        return self._solve(
            "window over tree", metadata, metadata.lengths + drafts, slots,
            Mask(mask_mod=_descends_in_window), aux, most_keys=metadata.most_keys + drafts,
            by_slot=True, want_lse=self.want_lse,
        )  # fmt: skip

    def branches(self, metadata: Metadata, branches: Branches) -> tuple[Tensor, Tensor | None]:
        """The prefix, which all branches share, and what each has drafted."""
        prefix = self._solve("prefix", metadata, metadata.lengths, metadata.page_table, Mask())
        own = self._solve_rows("branches", metadata, branches.slots, None, None, sinks=False)
        return self._merge(prefix, own)

    def window_over_branches(
        self, metadata: Metadata, branches: Branches
    ) -> tuple[Tensor, Tensor | None]:
        """One call with a row of slots for each branch."""
        slots = metadata.swa_slots if self._in_swa_pool else metadata.slots
        drafted = branches.slots.shape[1]
        lengths = metadata.lengths.repeat_interleave(metadata.rows) + drafted
        return self._solve_rows("window over branches", metadata, slots, lengths, self.window)

    def _merge(
        self, one: tuple[Tensor, Tensor | None], other: tuple[Tensor, Tensor | None]
    ) -> tuple[Tensor, Tensor]:
        shape = (-1, self.rows.shape[1], self.layer.v_head_dim)
        outs = [part[0].reshape(shape) for part in (one, other)]
        lses = [_by_row(part[1], self.rows.shape[1]) for part in (one, other)]
        out, lse = interface.merge_states(outs, lses)
        return out.to(self.rows.dtype), lse

    def _solve_rows(
        self, part: str, metadata: Metadata, slots: Tensor | None, lengths: Tensor | None,
        window: int | None, sinks: bool = True,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Each row a sequence of its own."""
        assert slots is not None
        if lengths is None:
            lengths = torch.full(
                slots.shape[:1], slots.shape[1], dtype=torch.int32, device=slots.device
            )
        rows = Metadata(slots.shape[0], 1, 1, slots.shape[1], lengths, slots, step=metadata.step)
        mask = Mask(True, window, 0)
        want_lse = self.want_lse or not sinks
        return self._solve(
            part, rows, lengths, slots, mask, by_slot=True, sinks=sinks, want_lse=want_lse
        )

    def _solve(
        self,
        part: str,
        metadata: Metadata,
        lengths: Tensor | None,
        table: Tensor | None,
        mask: Mask,
        aux: tuple[Tensor, ...] = (),
        *,
        most_keys: int | None = None,
        by_slot: bool = False,
        sinks: bool = True,
        want_lse: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """One call. Where requests have as many rows each, queries are (B, rows, Hq, D), else ragged."""
        assert table is not None
        page_size = 1 if by_slot else self.backend.page_size
        keys, values = self._pages(page_size)
        rows, latent = self.rows, self.latent
        if metadata.rows:
            sizes = metadata.batch_size, metadata.rows
            rows = rows.unflatten(0, sizes)
            latent = None if latent is None else latent.unflatten(0, sizes)
        layer = self.layer
        problem = Problem(
            q=rows,
            k=keys,
            v=values,
            qv=latent,
            kv_layout=KVLayout.PAGED,
            batch_size=metadata.batch_size,
            max_seqlen_q=metadata.most_rows,
            max_seqlen_k=metadata.most_keys if most_keys is None else most_keys,
            mask=mask,
            scores=Scores(
                layer.scaling, float(layer.logit_cap or 0.0), self.sinks if sinks else None
            ),
            cu_seqlens_q=None if metadata.rows else metadata.cu_seqlens_q,
            seqlens_k=lengths,
            page_table=table,
            descales=self._descales(keys.dtype, metadata.batch_size),
            aux_tensors=aux,
            return_lse=want_lse,
        )
        shape = layer.tp_q_head_num, keys.shape[2:], values.shape[3], keys.dtype, page_size
        scores = layer.scaling, layer.logit_cap, self.sinks is None, latent is None
        return metadata.step.run((part, *shape, *scores, mask, want_lse), problem)

    def _pages(self, page_size: int) -> tuple[Tensor, Tensor]:
        """The layer's pool as pages: (pages, page_size, Hkv, D) of keys and of values."""
        layer, pool = self.layer, self.backend.token_to_kv_pool
        if self.backend.use_mla:
            cache = _paged(pool.get_key_buffer(layer.layer_id), 1, page_size)
            latent = cache[..., : layer.v_head_dim]
            return (cache if self.latent is None else cache[..., layer.v_head_dim :]), latent
        keys, values = pool.get_kv_buffer(layer.layer_id)
        return (
            _paged(keys, layer.tp_k_head_num, page_size),
            _paged(values, layer.tp_v_head_num, page_size),
        )

    def _descales(self, dtype: torch.dtype, batch_size: int) -> Descales:
        layer = self.layer
        if dtype not in FLOAT8_DTYPES or layer.k_scale is None:
            return Descales()
        scales = (layer.k_scale, layer.k_scale if self.backend.use_mla else layer.v_scale)
        heads = 1 if self.backend.use_mla else layer.tp_k_head_num
        return Descales(None, *(scale.float().expand(batch_size, heads) for scale in scales))


def _descends(b: Any, h: Any, q_idx: Any, kv_idx: Any, aux: tuple[Any, ...]) -> Any:
    return aux[0][b, q_idx, kv_idx]


def _descends_in_window(b: Any, h: Any, q_idx: Any, kv_idx: Any, aux: tuple[Any, ...]) -> Any:
    context, positions, visible, window = aux
    row, column = q_idx - context[b], torch.clamp(kv_idx - context[b], min=0)
    in_prefix = kv_idx < context[b]
    place = torch.where(in_prefix, kv_idx, positions[b, column])
    return (in_prefix | visible[b, row, column]) & (positions[b, row] - place <= window)


def _by_row(lse: Tensor | None, heads: int) -> Tensor:
    """(B, Hq, rows) or (Hq, T) to (Hq, T)."""
    assert lse is not None
    return lse if lse.dim() == 2 else lse.transpose(0, 1).reshape(heads, -1)


def _paged(buffer: Tensor, heads: int, page_size: int) -> Tensor:
    """(slots, H, D), or (pages, H, page, D) as SGLang stores it by option, to (pages, page, H, D)."""
    if buffer.dim() == 4:
        if buffer.shape[2] != page_size:
            raise UnsupportedError("SGLANG_USE_HND_KVCACHE with branching drafts: unset it")
        return buffer.transpose(1, 2)
    slots, (stride, *inner) = buffer.shape[0], buffer.stride()
    shape = (slots // page_size, page_size, heads, buffer.shape[-1])
    return buffer.as_strided(shape, (stride * page_size, stride, *inner))
