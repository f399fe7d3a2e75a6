"""The cells of ``headway bench attention``: shapes as data, in suites.

``prefill`` and ``decode`` are what kernels are judged by: the shapes of models and servers, where the best
of several libraries is known. ``pages`` and ``decode-float8`` repeat decode cells with other pages and
narrower caches; ``prefill-float8`` has prompts and chunks of prompts in an engine's pages, bfloat16 beside
float8; ``portable`` holds the shapes by which the tiles of the portable kernels were chosen.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.float8_e4m3fn}

#: Seed of the lengths that are drawn.
_SEED = 1


@dataclass(frozen=True)
class Case:
    """One cell. ``decode`` is a step against caches; ``prefill`` with pages is a chunk behind cached keys.

    ``seqlens_k`` counts all keys of each sequence, its new tokens included.
    """

    name: str
    kind: Literal["prefill", "decode"]
    seqlens_q: tuple[int, ...]
    seqlens_k: tuple[int, ...]
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
    def batch_size(self) -> int:
        return len(self.seqlens_q)

    @property
    def is_uniform(self) -> bool:
        """Whether all sequences have the same lengths."""
        return len(set(self.seqlens_q)) == len(set(self.seqlens_k)) == 1

    def described(self) -> dict[str, Any]:
        """The case for a reading; equal lengths are said once."""
        made = asdict(self)
        if self.is_uniform:
            for key in ("seqlens_q", "seqlens_k"):
                made[key] = {"sequences": self.batch_size, "tokens": made[key][0]}
        return made

    @property
    def flops(self) -> float:
        """Multiply-adds count two; a causal square counts half, a window its band."""
        pairs = 0.0
        for sq, sk in zip(self.seqlens_q, self.seqlens_k, strict=True):
            seen = sq * sk - (sq * sq / 2 if self.causal and self.kind == "prefill" else 0)
            if self.window_left >= 0:
                seen = min(seen, float(sq * (self.window_left + 1)))
            pairs += seen
        return 2 * self.heads_q * pairs * (self.head_dim + self.head_dim_v)

    @property
    def kv_bytes(self) -> int:
        """What a step must read of keys and values."""
        rows = 0
        for sq, sk in zip(self.seqlens_q, self.seqlens_k, strict=True):
            rows += sk if self.window_left < 0 else min(sk, self.window_left + sq)
        width = self.head_dim if self.latent else self.head_dim + self.head_dim_v
        return rows * self.heads_kv * width * DTYPES[self.kv_dtype].itemsize


# --- prefill ------------------------------------------------------------------------------------------

#: Tokens of every dense cell of the prefill suite, and the width of the model.
_TOKENS, _WIDTH = 16384, 2048


def _dims(d: int, dv: int) -> str:
    return f"d{d}" if d == dv else f"d{d}/{dv}"


def _square(d: int, dv: int, seqlen: int, causal: bool) -> Case:
    heads = _WIDTH // dv
    lengths = (seqlen,) * (_TOKENS // seqlen)
    name = f"{_dims(d, dv)} {seqlen // 1024}k {'causal' if causal else 'full'}"
    return Case(name, "prefill", lengths, lengths, heads, heads, d, dv, causal=causal)


def _grouped(batch: int, seqlen: int, heads: tuple[int, int], d: int) -> Case:
    lengths = (seqlen,) * batch
    name = f"{_dims(d, d)} gqa {batch}x{seqlen} {heads[0]}/{heads[1]} causal"
    return Case(name, "prefill", lengths, lengths, *heads, d, d)


def long_tailed(total: int, longest: int, shortest: int = 16) -> tuple[int, ...]:
    """Lengths drawn from a Pareto distribution until they add up to ``total``; one is the ``longest``."""
    draw = random.Random(_SEED)
    lengths, left = [longest], total - longest
    while left > 0:
        length = min(int(shortest * draw.paretovariate(0.7)), longest, left)
        lengths.append(length)
        left -= length
    draw.shuffle(lengths)
    return tuple(lengths)


def _ragged() -> Case:
    lengths = long_tailed(2 * _TOKENS, _TOKENS)
    name = f"d128 ragged {len(lengths)} sequences, at most 16k, 32/8 causal"
    return Case(name, "prefill", lengths, lengths, 32, 8, 128, 128)


def _chunk(page_size: int) -> Case:
    name = f"d128 512 tokens over 32k cached, 32/8, pages of {page_size}"
    return Case(name, "prefill", (512,), (32768 + 512,), 32, 8, 128, 128, page_size=page_size)


def _windowed() -> Case:
    square = _square(128, 128, _TOKENS, True)
    return replace(square, name="d128 16k window 1024", window_left=1023)


PREFILL = (
    *(
        _square(d, dv, seqlen, causal)
        for d, dv in ((64, 64), (128, 128), (256, 256), (192, 128))
        for seqlen in (1024, 4096, 16384)
        for causal in (False, True)
    ),
    _grouped(1, 8192, (64, 8), 128),
    _grouped(1, 32768, (32, 8), 128),
    _grouped(8, 2048, (16, 8), 128),
    _grouped(1, 8192, (64, 8), 64),
    _ragged(),
    _windowed(),
    _chunk(16),
    _chunk(64),
)


def _behind(batch: int, new: int, cached: int, heads: tuple[int, int]) -> tuple[Case, Case]:
    """Prompts, or chunks of them behind what is cached, over bfloat16 and over float8 keys."""
    name = f"d128 {batch}x{new} behind {cached}, {heads[0]}/{heads[1]}, pages of 16"
    ends = (cached + new,) * batch
    case = Case(name, "prefill", (new,) * batch, ends, *heads, 128, 128, page_size=16)
    return case, replace(case, name=f"{name}, float8 keys", kv_dtype="fp8")


PREFILL_FLOAT8 = tuple(
    case
    for shape in (
        (2, 8000, 0, (16, 8)),
        (16, 1000, 0, (16, 8)),
        (1, 2048, 30000, (16, 8)),
        (8, 512, 8192, (16, 8)),
        (2, 8000, 0, (64, 8)),
        (1, 2048, 30000, (32, 8)),
    )
    for case in _behind(*shape)
)


# --- decode -------------------------------------------------------------------------------------------


def _decode(name: str, lengths: tuple[int, ...], heads: tuple[int, int], d: int = 128) -> Case:
    """One token per sequence against pages of 16."""
    ones = (1,) * len(lengths)
    return Case(name, "decode", ones, lengths, *heads, d, d, page_size=16)


def _steps(batch: int, context: int, heads: tuple[int, int], d: int = 128) -> Case:
    name = f"B{batch} {context // 1024}k {heads[0]}/{heads[1]} d{d}"
    return _decode(name, (context,) * batch, heads, d)


def _drawn(batch: int) -> Case:
    """Lengths of a server's requests: most short, one of 128k."""
    draw = random.Random(_SEED)
    longest = 131072
    drawn = (min(int(512 * draw.paretovariate(0.7)), longest) for _ in range(batch - 1))
    lengths = (longest, *drawn)
    return _decode(f"B{batch} long-tailed, at most 128k, 32/8 d128", lengths, (32, 8))


_STEPS = (
    _steps(1, 1024, (32, 8)),
    _steps(1, 8192, (32, 8)),
    _steps(1, 131072, (32, 8)),
    _steps(16, 4096, (32, 8)),
    _steps(64, 4096, (64, 8)),
    _steps(128, 2048, (16, 8)),
    _steps(256, 1024, (16, 8)),
    _steps(32, 8192, (64, 8), 64),
    _steps(128, 8192, (8, 1)),
    _drawn(8),
    _drawn(64),
)


def _verify() -> Case:
    """Speculative decoding: four tokens are checked at once."""
    four = replace(_steps(32, 4096, (32, 8)), seqlens_q=(4,) * 32)
    return replace(four, name="B32 4k 32/8 d128, 4 tokens")


def _latent(heads: int) -> Case:
    lengths = (4096,) * 128
    name = f"MLA B128 4k {heads} heads"
    ones = (1,) * 128
    return Case(name, "decode", ones, lengths, heads, 1, 576, 512, page_size=64, latent=True)


DECODE = (
    *_STEPS,
    _verify(),
    replace(_steps(16, 32768, (32, 8)), name="B16 32k 32/8 d128 window 1024", window_left=1023),
    _latent(16),
    _latent(128),
)

DECODE_FLOAT8 = tuple(
    replace(c, name=f"{c.name} float8", kv_dtype="fp8")
    for c in (*_STEPS, _latent(16), _latent(128))
)

PAGES = tuple(
    replace(case, name=f"{case.name} page {page_size}", page_size=page_size)
    for case in _STEPS[1:9]
    for page_size in (64, 1, 256)
)


# --- what the portable kernels were tuned on ------------------------------------------------------------


def _tuned(d: int, seqlen: int, batch: int, heads: tuple[int, int], **more: Any) -> Case:
    dv = more.pop("dv", d)
    dtype = more.get("dtype", "bf16")
    kind = "" if more.get("causal", True) else " full"
    kind += f" window {more['window_left'] + 1}" if "window_left" in more else ""
    name = f"{dtype} {_dims(d, dv)} b{batch} s{seqlen} {heads[0]}/{heads[1]}{kind}"
    lengths = (seqlen,) * batch
    return Case(name, "prefill", lengths, lengths, *heads, d, dv, kv_dtype=dtype, **more)


def _tuned_step(d: int, context: int, batch: int, heads: tuple[int, int], **more: Any) -> Case:
    case = replace(_steps(batch, context, heads, d), **more)
    name = f"{case.dtype}/{case.kv_dtype} {_dims(d, case.head_dim_v)} b{batch} ctx{context}"
    return replace(case, name=f"{name} {heads[0]}/{heads[1]} page {case.page_size}")


_LATENT = {"head_dim_v": 512, "page_size": 64, "latent": True}

PORTABLE = (
    _tuned(128, 2048, 8, (16, 16)),
    _tuned(128, 16384, 1, (16, 16)),
    _tuned(128, 16384, 1, (16, 16), causal=False),
    _tuned(128, 8192, 1, (64, 8)),
    _tuned(64, 16384, 1, (32, 32)),
    _tuned(256, 16384, 1, (8, 8)),
    _tuned(192, 8192, 1, (16, 16), dv=128),
    _tuned(128, 16384, 1, (16, 16), window_left=1023),
    _tuned(128, 16384, 1, (16, 16), dtype="fp8"),
    _tuned_step(128, 8192, 8, (64, 8)),
    _tuned_step(128, 8192, 16, (64, 8)),
    _tuned_step(128, 8192, 32, (64, 8)),
    _tuned_step(128, 4096, 64, (32, 8)),
    _tuned_step(128, 1024, 256, (16, 8)),
    _tuned_step(128, 131072, 1, (32, 8)),
    _tuned_step(128, 8192, 32, (64, 8), page_size=1),
    _tuned_step(128, 8192, 32, (64, 8), page_size=64),
    _tuned_step(64, 8192, 32, (64, 8)),
    _tuned_step(256, 8192, 16, (16, 4)),
    _tuned_step(128, 8192, 16, (64, 8), kv_dtype="fp8"),
    _tuned_step(128, 8192, 32, (64, 8), kv_dtype="fp8"),
    _tuned_step(128, 8192, 32, (64, 8), dtype="fp8", kv_dtype="fp8"),
    _tuned_step(128, 8192, 64, (64, 8), kv_dtype="fp8"),
    _tuned_step(576, 8192, 64, (16, 1), **_LATENT),
    _tuned_step(576, 4096, 64, (128, 1), **_LATENT),
)

SUITES: dict[str, tuple[Case, ...]] = {
    "prefill": PREFILL,
    "prefill-float8": PREFILL_FLOAT8,
    "decode": DECODE,
    "decode-float8": DECODE_FLOAT8,
    "pages": PAGES,
    "portable": PORTABLE,
}
