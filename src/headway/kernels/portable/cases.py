"""The calls that ahead-of-time compilation covers: by default, or every width and kind of mask."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headway.kernels.compile import Case
from headway.kernels.norm_style import NormStyle
from headway.mla import TILE
from headway.persistent import DeviceWork, plan_on_device
from headway.problem import Mask
from headway.serving.base import AttentionLayer

if TYPE_CHECKING:
    from headway.kernels.portable.gated import Activation

#: Caches of more than 2 GiB, as servers have them: AMD's compiler looks at that.
_PAGES = 1 << 24

#: Rows of which a program of the norm kernel takes 1, 2, 4, 8 and 16, as far as rows are narrow enough.
NORM_ROWS = (3, 512, 1024, 2048, 4096)

_BF16, _FLOAT8 = torch.bfloat16, torch.float8_e4m3fn


def _meta(*shape: int, dtype: torch.dtype = _BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _int32(*shape: int) -> Tensor:
    return _meta(*shape, dtype=torch.int32)


def _run(function: str, arguments: dict[str, Any]) -> None:
    """The call on meta tensors, to the point where kernels would start."""
    import headway

    getattr(headway, function)(**arguments, backend="portable", return_lse=True)


def prefill_arguments(
    d: int, dv: int | None = None, dtype: torch.dtype = _BF16, **more: Any
) -> dict[str, Any]:
    """Ragged prefill of a batch, 8 query heads on 2 KV heads."""
    q, k, v = (_meta(4096, h, w, dtype=dtype) for h, w in ((8, d), (2, d), (2, dv or d)))
    cu = _int32(5)
    arguments: dict[str, Any] = {"q": q, "k": k, "v": v, "cu_seqlens_q": cu, "cu_seqlens_k": cu}
    arguments |= {"max_seqlen_q": 2048, "max_seqlen_k": 2048, "causal": True}
    return arguments | more


def prefill(*args: Any, **kwargs: Any) -> None:
    """A call with :func:`prefill_arguments`."""
    _run("flash_attn_varlen_func", prefill_arguments(*args, **kwargs))


def decode_arguments(
    d: int,
    dv: int | None = None,
    dtype: torch.dtype = _BF16,
    kv_dtype: torch.dtype | None = None,
    heads: tuple[int, int] = (32, 8),
    page_size: int = 16,
    seqlen_q: int = 1,
    latent: bool = False,
    batch_size: int = 64,
    pages: int = 512,
    **more: Any,
) -> dict[str, Any]:
    """A step against paged caches; ``latent``: v is the first columns of k."""
    k = _meta(_PAGES, page_size, heads[1], d, dtype=kv_dtype or dtype)
    v = k[..., :dv] if latent else _meta(_PAGES, page_size, heads[1], dv or d, dtype=k.dtype)
    q = _meta(batch_size, seqlen_q, heads[0], d, dtype=dtype)
    table, lengths = _int32(batch_size, pages), _int32(batch_size)
    arguments: dict[str, Any] = {"q": q, "k_cache": k, "v_cache": v}
    arguments |= {"page_table": table, "cache_seqlens": lengths, "causal": True}
    return arguments | more


def decode(*args: Any, **kwargs: Any) -> None:
    """A call with :func:`decode_arguments`."""
    _run("flash_attn_with_kvcache", decode_arguments(*args, **kwargs))


def append(dtype: torch.dtype, kv_dtype: torch.dtype, interleaved: bool) -> None:
    """A decode step that rotates and writes its new tokens."""
    angle = _meta(4096, 64, dtype=dtype)
    new: dict[str, Any] = {
        "k": _meta(64, 1, 8, 128, dtype=dtype),
        "v": _meta(64, 1, 8, 128, dtype=dtype),
    }
    rotary: dict[str, Any] = {
        "rotary_cos": angle,
        "rotary_sin": angle,
        "rotary_interleaved": interleaved,
    }
    if kv_dtype != dtype:
        new |= {name: _meta(64, 8, dtype=torch.float32) for name in ("k_descale", "v_descale")}
    decode(128, dtype=dtype, kv_dtype=kv_dtype, **new, **rotary)


def persistent_prefill(dtype: torch.dtype, v_transposed: bool) -> None:
    """The work-list kernel at MLA's widths, and the merge of what it splits."""
    from headway.kernels.portable.mla_prefill import Scales, mla_prefill

    work = _work(16)
    q, k = _meta(3000, 16, 192, dtype=dtype), _meta(5000, 16, 192, dtype=dtype)
    v = _meta(5000, 16, 128, dtype=dtype)
    if v_transposed:
        v = _meta(16, 128, work.padded_keys, dtype=dtype)
    scale = _meta(1, dtype=torch.float32) if v_transposed else None
    mla_prefill(
        work,
        q,
        k,
        v,
        _meta(3000, 16, 128),
        _meta(3000, 16, dtype=torch.float32),
        softmax_scale=0.07,
        scales=Scales(scale, scale, scale),
        v_transposed=v_transposed,
    )


def quantised_prefill(backend: str = "portable") -> None:
    """All kernels of ``headway.mla.prefill`` from bfloat16 inputs."""
    from headway import mla

    q, k, v = (_meta(n, 16, w) for n, w in ((3000, 192), (5000, 192), (5000, 128)))
    cu = _int32(3)
    mla.prefill(q, k, v, cu, cu, fp8=True, plan=_work(16), return_lse=True, backend=backend)


def merged(dv: int, dtype: torch.dtype) -> None:
    """The merge of partial results that the caller made."""
    from headway.kernels.portable.combine import combine, merge_states

    lse = _meta(4, 512, 8, dtype=torch.float32)
    combine(_meta(4, 512, 8, dv, dtype=dtype), lse, _BF16)
    merge_states([_meta(512, 8, dv, dtype=dtype)] * 2, [_meta(8, 512, dtype=torch.float32)] * 2)


def step(
    layer: AttentionLayer,
    *,
    batch_size: int,
    new_tokens: int,
    page_size: int = 16,
    dtype: torch.dtype = _BF16,
    rotary_dim: int = 0,
    max_seqlen_k: int = 8192,
) -> None:
    """A layer in a step of the engine: slots, the write of new tokens, and attention."""
    from headway.serving.base import ForwardBatch, TokenRotary
    from headway.serving.flash import FlashAttentionBackend

    tokens, pages = batch_size * new_tokens, -(-max_seqlen_k // page_size)
    lengths, table = _int32(batch_size), _int32(batch_size, pages)
    batch = ForwardBatch(_int32(batch_size + 1), lengths, table, new_tokens, max_seqlen_k)
    angle = _meta(tokens, rotary_dim // 2, dtype=dtype)
    backend = FlashAttentionBackend("portable")
    backend.init_forward_metadata(batch)
    backend.forward(
        *_tokens(layer, tokens, dtype),
        _caches(layer, page_size, dtype),
        layer,
        TokenRotary(angle, angle) if rotary_dim else None,
    )


def writes(
    layer: AttentionLayer,
    *,
    page_size: int = 16,
    dtype: torch.dtype = _BF16,
    rotary_dim: int = 0,
) -> None:
    """The write of new tokens whose queries and keys have norms, in every style, for few and for many."""
    from headway.kernels.portable.store import store_tokens

    weight = _meta(layer.head_dim, dtype=dtype)
    for tokens, style in itertools.product((8, 4096), NormStyle):
        angle = _meta(tokens, rotary_dim // 2, dtype=dtype) if rotary_dim else None
        store_tokens(
            *_tokens(layer, tokens, dtype),
            *_caches(layer, page_size, dtype),
            _meta(tokens, dtype=torch.int64),
            cos=angle,
            sin=angle,
            q_weight=weight,
            k_weight=weight,
            eps=1e-6,
            style=style,
        )


def _tokens(
    layer: AttentionLayer, tokens: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of new tokens."""
    keys, values = layer.head_dim, layer.head_dim_v
    shapes = ((layer.num_q_heads, keys), (layer.num_kv_heads, keys), (layer.num_kv_heads, values))
    q, k, v = (_meta(tokens, *shape, dtype=dtype) for shape in shapes)
    return q, k, v


def _caches(layer: AttentionLayer, page_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shape = _PAGES, page_size, layer.num_kv_heads
    return _meta(*shape, layer.head_dim, dtype=dtype), _meta(*shape, layer.head_dim_v, dtype=dtype)


def norms(width: int, dtype: torch.dtype, styles: Iterable[NormStyle] = tuple(NormStyle)) -> None:
    """Norms of rows, for every number of them that a program may take."""
    from headway.kernels.portable.norm import rms_norm

    weight = _meta(width, dtype=dtype)
    for rows, style in itertools.product(NORM_ROWS, styles):
        rms_norm(_meta(1, rows, width, dtype=dtype), weight, 1e-6, style)


def head_norms(heads: int, width: int, row: int, dtype: torch.dtype, style: NormStyle) -> None:
    """Norms of heads that are parts of rows ``row`` wide, before and behind the exchange of heads and
    tokens."""
    from headway.kernels.portable.norm import rms_norm

    weight = _meta(width, dtype=dtype)
    aligned = {-(-rows // heads // 16) * 16 for rows in NORM_ROWS}
    for tokens in (1, *sorted({n + odd for n in aligned for odd in (0, 1)})):
        x = _meta(1, tokens, row, dtype=dtype)[..., : heads * width].unflatten(-1, (heads, width))
        rms_norm(x, weight, 1e-6, style)
        rms_norm(x.transpose(1, 2), weight, 1e-6, style)


def gates(inner: int, activation: Activation, dtype: torch.dtype) -> None:
    """The gated activation of a feed-forward block."""
    from headway.kernels.portable.gated import gated

    gated(_meta(1, 8, 2 * inner, dtype=dtype), activation)


def greedy(vocabulary: int, dtype: torch.dtype) -> None:
    """The choice of the next tokens from logits (sequences, vocabulary)."""
    from headway.kernels.portable.argmax import argmax

    argmax(_meta(8, vocabulary, dtype=dtype))


def _work(num_heads: int) -> DeviceWork:
    """A plan with parts to merge, which plans for many tiles have not."""
    return plan_on_device(
        [0, 1000, 3000],
        [0, 2000, 5000],
        [2000, 3000],
        torch.device("meta"),
        num_heads_k=num_heads,
        num_cu=132,
        granularity=TILE,
    )


def _alibi(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any, aux: Any) -> Any:
    return score + aux[0][h] * (kv_idx - q_idx)


def _same_document(b: Any, h: Any, q_idx: Any, kv_idx: Any, aux: Any) -> Any:
    return aux[1][b, q_idx] == aux[1][b, kv_idx]


def _mods() -> dict[str, Any]:
    """A score_mod and a mask_mod that look into tensors."""
    aux = (_meta(32, dtype=torch.float32), _int32(64, 8192))
    return {"score_mod": _alibi, "mask_mod": _same_document, "aux_tensors": aux}


def _layer(head_dim: int, window: int | None = None) -> AttentionLayer:
    mask = Mask(causal=True, window_left=window, window_right=0, attention_chunk=0)
    return AttentionLayer(0, 32, 8, head_dim, head_dim, head_dim**-0.5, mask)


def _case(label: str, function: Any, *args: Any, **kwargs: Any) -> Case:
    return Case(label, functools.partial(function, *args, **kwargs))


def _float8_on_hopper(label: str, *args: Any, **kwargs: Any) -> Case:
    """Decode from float8 caches where the table has rows of their own for them."""
    call = functools.partial(decode, *args, kv_dtype=_FLOAT8, **kwargs)
    return Case(f"{label} float8 tile", call, frozenset({"sm90"}))


def _sinks(heads: int) -> Tensor:
    return _meta(heads)


def _default() -> tuple[Case, ...]:
    """Every kernel, every tile of every target, and features beside tiles that leave them little room."""
    latent: dict[str, Any] = {"page_size": 64, "latent": True}
    return (
        _case("prefill 64 window sinks", prefill, 64, window_size=(127, 0), sinks=_sinks(8)),
        _case("prefill 96", prefill, 96),
        _case("prefill 128", prefill, 128),
        _case("prefill 128 float8", prefill, 128, dtype=_FLOAT8),
        _case("prefill 128 chunk softcap", prefill, 128, attention_chunk=1024, softcap=30.0),
        _case("prefill 128 mods", prefill, 128, **_mods()),
        _case("prefill 192/128", prefill, 192, 128),
        _case("prefill 256", prefill, 256),
        _case("decode 64", decode, 64),
        _case("decode 128 page 24 mods", decode, 128, page_size=24, **_mods()),
        _case("decode 128 short", decode, 128, batch_size=8, pages=256),
        _case("decode 128 8 queries", decode, 128, seqlen_q=8),
        _case("decode 128 16 queries", decode, 128, seqlen_q=16),
        _case("decode 256 softcap", decode, 256, softcap=50.0, window_size=(4095, 0)),
        _case("decode 256 8 queries", decode, 256, seqlen_q=8),
        _case("decode 256 16 queries", decode, 256, seqlen_q=16),
        _case("mla 16 heads", decode, 576, 512, heads=(16, 1), **latent),
        _case("mla 32 heads", decode, 576, 512, heads=(32, 1), **latent),
        _case("mla 128 heads", decode, 576, 512, heads=(128, 1), **latent),
        _float8_on_hopper("decode 64", 64),
        _float8_on_hopper("decode 128", 128),
        _float8_on_hopper("decode 128 short", 128, batch_size=2, pages=256),
        _float8_on_hopper("decode 128 medium", 128, batch_size=8, pages=256),
        _float8_on_hopper("decode 128 8 queries", 128, seqlen_q=8),
        _float8_on_hopper("decode 256", 256),
        _float8_on_hopper("mla 16 heads", 576, 512, heads=(16, 1), **latent),
        _float8_on_hopper("mla 128 heads", 576, 512, heads=(128, 1), **latent),
        _case("append", append, _BF16, _BF16, True),
        _case("append float8 cache", append, _BF16, _FLOAT8, False),
        _case("step 128", step, _layer(128), batch_size=32, new_tokens=1, rotary_dim=128),
        _case("writes 128", writes, _layer(128), rotary_dim=128),
        _case("norms", norms, 4096, _BF16),
        _case("gates", gates, 14336, "silu", _BF16),
        _case("greedy", greedy, 128256, _BF16),
        _case("merge 128", merged, 128, torch.float32),
        _case("work list", persistent_prefill, _BF16, False),
        _case("mla prefill float8", quantised_prefill),
    )


def _more() -> tuple[Case, ...]:
    """What the default leaves out: other widths, dtypes, page sizes and masks on the same tiles."""
    latent: dict[str, Any] = {"heads": (128, 1), "page_size": 64}
    rows = [_case(f"prefill {d}", prefill, d) for d in (32, 40, 64, 80, 112, 192)]
    rows += [_case(f"prefill {d} mods", prefill, d, **_mods()) for d in (64, 256)]
    rows += [
        _case("prefill 256 float8", prefill, 256, dtype=_FLOAT8),
        _case("prefill 128 float16", prefill, 128, dtype=torch.float16),
        _case("prefill 128 window", prefill, 128, window_size=(1023, 0)),
        _case("prefill 128 full", prefill, 128, causal=False),
        _case("prefill 128 sinks", prefill, 128, sinks=_sinks(8)),
        _case("prefill 128 softcap", prefill, 128, softcap=30.0),
        _case("prefill 256 softcap", prefill, 256, softcap=30.0),
    ]
    rows += [_case(f"decode {d}", decode, d) for d in (80, 96, 128, 192, 256)]
    rows += [_case(f"decode 128 page {n}", decode, 128, page_size=n) for n in (1, 24, 64, 128)]
    rows += [
        _case("decode 64 window sinks", decode, 64, window_size=(127, 0), sinks=_sinks(32)),
        _case("decode 128 float8 cache", decode, 128, kv_dtype=_FLOAT8),
        _case("decode 256 float8 cache", decode, 256, kv_dtype=_FLOAT8),
        _case("decode 128 float8", decode, 128, dtype=_FLOAT8),
        _case("decode 128 mods", decode, 128, **_mods()),
        _case("mla qv", decode, 64, 512, qv=_meta(64, 1, 128, 512), **latent),
        _case("mla float8 cache", decode, 576, 512, kv_dtype=_FLOAT8, **latent, latent=True),
        _case("work list float8", persistent_prefill, _FLOAT8, True),
        _case("merge 64", merged, 64, _BF16),
        _case("gates gelu", gates, 9216, "gelu_tanh", _BF16),
    ]
    return tuple(rows)


DEFAULT = _default()
EVERY = DEFAULT + _more()
