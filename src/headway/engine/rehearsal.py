"""The engine's steps on tensors without memory, for compiling ahead of time what they launch.

The engine's own runner packs the steps, its own backend attends, its own graphs are captured: only the
model around an attention layer is left out. So what is compiled here is what a service launches, and
follows when that changes. Where meta tensors stand for a device, nothing is started
(:mod:`headway.kernels.compile`).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from headway.engine.attention import PagedAttention
from headway.engine.config import EngineConfig
from headway.engine.graphs import DecodeGraphs, batch_sizes
from headway.engine.kv_cache import KVCache, KVShape, pages_for
from headway.engine.llm import backend_for
from headway.engine.runner import ModelRunner
from headway.engine.scheduler import Chunk
from headway.engine.scheduler import Sequence as TokenSequence
from headway.kernels.norm_style import NormStyle
from headway.serving.base import AttentionLayer, GraphLimits, TokenRotary
from headway.serving.mla import CHUNK_TOKENS, MLALayer

#: New tokens of the sequences in a step, by the kernels that they may need: few are decode's, one kernel
#: for every power of two of them; the others differ in how tiles are filled and keys are cut.
BANDS: tuple[tuple[int, ...], ...] = (
    (2,),
    (3, 4),
    (5, 6, 7, 8),
    tuple(range(9, 17)),
    (17, 20, 31, 32, 33, 50, 64),
    (65, 96, 100, 128, 200, 300, 512, 640, 1000, 1024, 2048),
    (2049, 2063, 4096, 6000, 16384),
)

#: Tokens that the sequences of a step have in the cache already, beside as many as there is room for.
CONTEXTS = (0, 16, 200, 1024, 2048, 4096, 8192, 16384, 32768, 65536)

#: Tokens in the cache of sequences in a step whose others have one new token.
MIXED = 5000

#: Sequences of a step that share nothing but their lengths.
BATCHES = (1, 4, 32)

#: Cached tokens of a step, in all its sequences.
MOST_CACHED = 1 << 18

#: Decoding sequences beside one that has so many new tokens.
DECODES, PROMPT = (1, 3, 8, 64), 300

#: Pages enough for a cache of more than 2 GiB, which AMD's compiler looks at.
PAGES = 1 << 24

META = torch.device("meta")


@dataclass(frozen=True)
class Rehearsal:
    """An attention layer of a model in an engine.

    Args:
        layer: its tensors on the meta device.
        config: as resolved for a GPU.
        dtype: of the model's activations.
        max_model_len: longest sequence, in tokens.
        rotary_dim: width of the heads' rotated part; 0: queries and keys arrive rotated.
    """

    layer: AttentionLayer
    config: EngineConfig
    dtype: torch.dtype
    max_model_len: int
    rotary_dim: int

    @staticmethod
    def of(
        layer: AttentionLayer,
        config: EngineConfig,
        dtype: torch.dtype,
        max_model_len: int,
        rotary_dim: int,
    ) -> Rehearsal:
        """With the layer's tensors as an engine on a GPU has them."""
        given: dict[str, Any] = {}
        if layer.sinks is not None:
            given["sinks"] = layer.sinks.to(dtype)
        if isinstance(layer, MLALayer):
            given |= {"w_uk": layer.w_uk.to(dtype), "w_uv": layer.w_uv.to(dtype)}
            rotary_dim = 0
        if config.kv_cache_dtype == "fp8_e4m3":
            descale = torch.empty(layer.num_kv_heads, dtype=torch.float32, device=META)
            given |= {"k_descale": descale, "v_descale": descale}
        layer = dataclasses.replace(layer, **given)
        return Rehearsal(layer, config.resolved("cuda"), dtype, max_model_len, rotary_dim)

    def decode(self) -> None:
        """Steps of one new token each, and those that check guesses, as graphs of every size or without;
        and beside sequences that are not decoding."""
        stage = _Stage(self)
        most = _given(self.config.max_running_requests)
        if self.config.cuda_graphs:
            stage.capture(1)
        else:
            for size in batch_sizes(most):
                stage.step([(self.max_model_len - 1, 1)] * size)
        if self.config.speculative == "ngram" and self.config.cuda_graphs:
            stage.capture(1 + self.config.num_draft_tokens)
        for count in DECODES:
            if count < most and self.max_model_len > 1:
                prompt = 0, min(self.max_model_len - 1, PROMPT)
                stage.step([(self.max_model_len - 1, 1)] * count + [prompt])

    def prefill(self, new_tokens: Iterable[int]) -> None:
        """Steps of sequences with so many new tokens each, whatever is in the cache before them."""
        stage = _Stage(self)
        for new in new_tokens:
            for batch_size in BATCHES:
                for context in self._contexts(new, batch_size):
                    stage.step([(context, new)] * batch_size)
            if new < _given(self.config.chunked_prefill_size) and new <= self.max_model_len:
                for context in (0, min(MIXED, self.max_model_len - new)):
                    # Rows behind a decoding sequence's; as long a prompt, of another number of tokens.
                    stage.step([(context, 1), (context, new)])
                    stage.step([(context, new), (context, 1)])

    def passes(self) -> None:
        """Latent layers: prompts that pass over the cache as often as one kernel merges, and once more."""
        from headway.kernels.portable.combine import MOST_STATES

        stage, batch_size = _Stage(self), min(64, _given(self.config.max_running_requests))
        for count in range(1, MOST_STATES + 1):
            context = min(count * (CHUNK_TOKENS // batch_size), self.max_model_len - 2)
            stage.step([(context, 2)] * batch_size)

    def _contexts(self, new: int, batch_size: int) -> Iterator[int]:
        """Cached tokens that there may be before ``new`` ones; none where those are too many."""
        most = self.max_model_len - new
        if most < 0 or new * batch_size > _given(self.config.chunked_prefill_size):
            return
        if batch_size > _given(self.config.max_running_requests):
            return
        for context in sorted({min(one, most) for one in (*CONTEXTS, most)}):
            if context * batch_size <= MOST_CACHED or batch_size == 1:
                yield context

    def writes(self, styles: Iterable[NormStyle]) -> None:
        """The write of new tokens, few and many, rotated and not; also with norms of the heads in some
        styles."""
        from headway.kernels.portable.store import store_tokens

        layer, stage = self.layer, _Stage(self)
        weight = torch.empty(layer.head_dim, dtype=self.dtype, device=META)
        norms: list[tuple[Tensor | None, NormStyle]] = [(None, NormStyle.ROUNDED)]
        norms += [(weight, style) for style in styles]
        widths = sorted({0, self.rotary_dim})
        for tokens, (norm, style), width in itertools.product((8, 4096), norms, widths):
            rotary = _rotary(tokens, width, self.dtype)
            store_tokens(
                *self.projected(tokens),
                *stage.cache.layers[0],
                torch.empty(tokens, dtype=torch.int64, device=META),
                cos=None if rotary is None else rotary.cos,
                sin=None if rotary is None else rotary.sin,
                q_weight=norm,
                k_weight=norm,
                eps=1e-6,
                style=style,
                k_descale=layer.k_descale,
                v_descale=layer.v_descale,
            )

    def projected(self, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v (tokens, heads, width) of new tokens: parts of one product, or latent vectors."""
        layer = self.layer

        def empty(*shape: int) -> Tensor:
            return torch.empty(tokens, *shape, dtype=self.dtype, device=META)

        if isinstance(layer, MLALayer):
            width = layer.nope_dim + layer.head_dim - layer.latent_dim
            # Its parts were joined where heads stand before tokens.
            q = torch.empty(layer.num_q_heads, tokens, width, dtype=self.dtype, device=META)
            k = empty(1, layer.head_dim)
            return q.transpose(0, 1), k, k[..., : layer.latent_dim]
        widths = [
            layer.num_q_heads * layer.head_dim,
            layer.num_kv_heads * layer.head_dim,
            layer.num_kv_heads * layer.head_dim_v,
        ]
        dims = layer.head_dim, layer.head_dim, layer.head_dim_v
        parts = zip(empty(sum(widths)).split(widths, dim=-1), dims, strict=True)
        q, k, v = (part.unflatten(-1, (-1, dim)) for part, dim in parts)
        return q, k, v


def _given(number: int | None) -> int:
    """A setting that is filled in."""
    assert number is not None
    return number


def _rotary(tokens: int, width: int, dtype: torch.dtype) -> TokenRotary | None:
    """The angles of tokens, half of what models compute: each angle is there twice."""
    if width == 0:
        return None
    angles = torch.empty(tokens, width, dtype=dtype, device=META)[:, : width // 2]
    return TokenRotary(angles, angles)


class _Layer(nn.Module):
    """A model of one attention layer, as the runner calls models."""

    layer_idx = 0

    def __init__(self, rehearsal: Rehearsal) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.empty(1, device=META), requires_grad=False)
        self._rehearsal = rehearsal

    def forward(self, input_ids: Tensor, *, headway: Any, **_: Any) -> SimpleNamespace:
        tokens, given = input_ids.shape[1], self._rehearsal
        rotary = _rotary(tokens, given.rotary_dim, given.dtype)
        headway(self, *given.projected(tokens), {"rotary": rotary})
        return SimpleNamespace(logits=input_ids.new_empty(1, tokens, 1))


class _Stage:
    """The engine around a layer, made as :class:`headway.engine.llm.LLM` makes it."""

    def __init__(self, rehearsal: Rehearsal) -> None:
        layer, config = rehearsal.layer, rehearsal.config
        self._rehearsal = rehearsal
        self._pages = pages_for(rehearsal.max_model_len, config.page_size)
        is_latent = isinstance(layer, MLALayer)
        shape = KVShape(layer.num_kv_heads, layer.head_dim, layer.head_dim_v, is_latent)
        dtype = torch.float8_e4m3fn if config.kv_cache_dtype == "fp8_e4m3" else rehearsal.dtype
        self.cache = KVCache([shape], PAGES, config.page_size, dtype, META)
        self._model = _Layer(rehearsal)
        backend = backend_for([layer], config)
        self._runner = ModelRunner(
            self._model,
            PagedAttention(backend, {0: layer}, self.cache),
            backend,
            max_sequences=_given(config.max_running_requests),
            max_pages=self._pages,
        )

    def step(self, sequences: Sequence[tuple[int, int]]) -> None:
        """A step of sequences, each (tokens in the cache, new tokens), without a graph."""
        size = self._rehearsal.config.page_size
        chunks = []
        for context, new in sequences:
            length = context + new
            pages = list(range(pages_for(length, size)))
            tokens = [0] * length
            chunks.append(Chunk(TokenSequence("", tokens, length, context, pages), new))
        self._runner.run(chunks)

    def capture(self, tokens_per_sequence: int) -> None:
        """What is recorded in graphs of every size."""
        config, layer = self._rehearsal.config, self._rehearsal.layer
        sizes = batch_sizes(_given(config.max_running_requests))
        limits = GraphLimits(
            max_batch_size=sizes[-1],
            max_pages=self._pages,
            max_seqlen_k=self._rehearsal.max_model_len,
            padding_page=0,
            device=META,
            tokens_per_sequence=tokens_per_sequence,
        )
        backend = backend_for([layer], config)
        attention = PagedAttention(backend, {0: layer}, self.cache)

        def forward(ids: Tensor, positions: Tensor) -> Tensor:
            logits: Tensor = self._model(ids, headway=attention).logits[0]
            return logits

        DecodeGraphs(forward, backend, limits, sizes, _recorded).capture()


def _recorded(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """In the place of a graph: what it would hold is launched once."""
    function()
    return function
