"""The calls that ahead-of-time compilation covers for Hopper: launches of its provider's own kernels."""

from __future__ import annotations

import functools
import inspect
from types import SimpleNamespace
from typing import Any

import torch

import headway
from headway import interface
from headway.kernels.compile import Case
from headway.kernels.portable import cases as portable

_SM90 = frozenset({"sm90"})
_FLOAT8 = torch.float8_e4m3fn


def run(function: str, arguments: dict[str, Any]) -> None:
    """One call of the interface on meta tensors, given to the Hopper provider."""
    from headway.providers.hopper import PROVIDER

    called = getattr(headway, function)
    bound = inspect.signature(called).bind(**arguments)
    bound.apply_defaults()
    PROVIDER.run(interface._BUILDERS[called](SimpleNamespace(**bound.arguments)))


def prefill(d: int, dv: int | None = None, **more: Any) -> None:
    """:func:`.portable.cases.prefill` by Hopper's kernels."""
    run("flash_attn_varlen_func", portable.prefill_arguments(d, dv, **more))


def decode(d: int, dv: int | None = None, **more: Any) -> None:
    """:func:`.portable.cases.decode` by Hopper's kernels."""
    run("flash_attn_with_kvcache", portable.decode_arguments(d, dv, **more))


def latent(heads: int, **more: Any) -> None:
    """A step of absorbed MLA over rows of a latent cache."""
    decode(576, 512, heads=(heads, 1), page_size=64, latent=True, **more)


def _cases() -> tuple[Case, ...]:
    def case(label: str, function: Any, *args: Any, **kwargs: Any) -> Case:
        return Case(f"hopper {label}", functools.partial(function, *args, **kwargs), _SM90)

    return (
        case("prefill 64", prefill, 64),
        case("prefill 128", prefill, 128),
        case("prefill 128 full", prefill, 128, causal=False),
        case("prefill 192/128", prefill, 192, 128),
        case("prefill 256", prefill, 256),
        case("mla prefill float8", portable.quantised_prefill, "hopper"),
        case("chunk 128 in pieces", decode, 128, page_size=64, seqlen_q=128, batch_size=1),
        case("chunk 128 page 17", decode, 128, page_size=17, seqlen_q=512, batch_size=1),
        case("chunk 128 float8 cache", decode, 128, seqlen_q=512, batch_size=4, kv_dtype=_FLOAT8),
        case("decode 64", decode, 64),
        case("decode 128", decode, 128),
        case("decode 128 page 1", decode, 128, page_size=1),
        case("decode 128 float8 cache", decode, 128, kv_dtype=_FLOAT8, batch_size=8),
        case("decode 128 float8 cache, many sequences", decode, 128, kv_dtype=_FLOAT8),
        case("decode 256", decode, 256),
        case("decode latent, 16 heads", latent, 16),
        case("decode latent, 128 heads", latent, 128),
        case("decode latent, 16 heads, float8 cache", latent, 16, kv_dtype=_FLOAT8),
        case("decode latent, 128 heads, float8 cache", latent, 128, kv_dtype=_FLOAT8),
    )


CASES = _cases()
