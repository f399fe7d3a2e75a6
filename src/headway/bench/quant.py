"""``headway bench quant``: what float8 costs in accuracy, by scheme and by length of the context.

Decode attention is computed on a CPU as kernels compute it, tile by tile, with every rounding that float8
brings: of inputs under their scales, of the softmax's weights, and of tensor cores' sums. The roundings of
numbers are exact, torch's casts being those of the hardware. The sums are a model: Hopper's tensor cores
are reported to align the 32 products of a step to the largest and to keep about 14 bits of each
(DeepSeek-V3, arXiv:2412.19437, section 3.3.2).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from torch import Tensor

from headway import quant
from headway.bench import report
from headway.errors import InvalidInputError

#: Keys that a kernel takes at a time, and that a block of scales covers.
TILE = 128

#: Keys of one step of a tensor core, and the bits below the largest exponent that its sums keep.
STEP, SUM_BITS = 32, 13

#: Weights lie in 0..1; they are stored times this, so that small ones stay normal numbers.
WEIGHT_SCALE = 256.0

FLOAT8 = torch.float8_e4m3fn

Inputs = Literal["none", "kv", "all"]
Sums = Literal["float32", "tensor core", "two-level"]


@dataclass(frozen=True)
class Scheme:
    """What is float8, under which scales, and how weighted values are summed."""

    name: str
    float8: Inputs = "none"
    per: Literal["cast", "tensor", "head", "block"] = "tensor"
    sums: Sums = "float32"


SCHEMES = (
    Scheme("bfloat16"),
    Scheme("float8 cache, plain cast", "kv", "cast"),
    Scheme("float8 cache, a scale per tensor", "kv", "tensor"),
    Scheme("float8 cache, per head", "kv", "head"),
    Scheme("float8 cache, per 128 tokens of a head", "kv", "block"),
    Scheme("all float8, a scale per tensor", "all", "tensor"),
    Scheme("all float8, per head", "all", "head"),
    Scheme("all float8, per 128 tokens of a head", "all", "block"),
    Scheme("all float8, per head, tensor core's sums", "all", "head", "tensor core"),
    Scheme("all float8, per head, two-level sums", "all", "head", "two-level"),
)


@dataclass(frozen=True)
class Heads:
    """bfloat16 values, in float64: q (heads, queries, width), k and v (heads, keys, width)."""

    q: Tensor
    k: Tensor
    v: Tensor


def draw(keys: int, heads: int = 8, queries: int = 2, width: int = 128, seed: int = 0) -> Heads:
    """Normal values as float8 finds them in models: heads of unlike sizes, some channels ten times larger.

    Sizes of values span 1/256 to 32 over the heads and vary by a factor of about 2 from block to block of
    tokens; each channel of v has a mean of its own; scores have a standard deviation of about 2.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    size = torch.logspace(-8, 5, heads, base=2.0, dtype=torch.float64)[:, None, None]
    blocks = -(-keys // TILE)
    drift = torch.exp(0.7 * normal(heads, blocks, 1)).repeat_interleave(TILE, 1)[:, :keys]
    outliers = torch.ones(width, dtype=torch.float64)
    outliers[torch.randperm(width, generator=generator)[: width // 32]] = 10.0
    q = 2.0 * normal(heads, queries, width) / outliers
    k = normal(heads, keys, width) * outliers
    v = (normal(heads, keys, width) + 0.5 * normal(heads, 1, width)) * size * drift
    return Heads(*(x.bfloat16().double() for x in (q, k, v)))


def _rounded(x: Tensor, per: str) -> Tensor:
    """(heads, tokens, width) as float8 holds it under its scales, in float64."""
    if per == "cast":
        return x.to(FLOAT8).double()
    if per == "block":
        parts = [_rounded(part, "head") for part in x.split(TILE, 1)]
        return torch.cat(parts, 1)
    rows = x.transpose(0, 1).float()
    values, scale = quant.quantise(rows, FLOAT8, "head" if per == "head" else "tensor")
    return (values.double() * scale.double()[:, None]).transpose(0, 1)


def attend(data: Heads, scheme: Scheme) -> Tensor:
    """(heads, queries, width): attention with the scheme's roundings, online over tiles of keys."""
    q, k, v = data.q, data.k, data.v
    factor = torch.ones((), dtype=torch.float64)
    if scheme.float8 != "none":
        k, v = _rounded(k, scheme.per), _rounded(v, scheme.per)
    if scheme.float8 == "all":
        # Blocks are along the keys; queries of a decode step are few.
        q = _rounded(q, "head" if scheme.per == "block" else scheme.per)
    if scheme.sums != "float32":
        # Tensor cores sum what is stored; the scale comes after.
        factor = quant.amax_scale(data.v.transpose(0, 1).float(), FLOAT8, "head").double()[
            :, None, None
        ]
        v = (v / factor).float()
    rows = (*q.shape[:2], 1)
    largest = torch.full(rows, -torch.inf, dtype=torch.float64)
    total = torch.zeros(rows, dtype=torch.float64)
    out = torch.zeros(*q.shape[:2], v.shape[-1], dtype=torch.float32)
    for keys, values in zip(k.split(TILE, 1), v.split(TILE, 1), strict=True):
        scores = q @ keys.mT * q.shape[-1] ** -0.5
        new = torch.maximum(largest, scores.amax(-1, keepdim=True))
        weights, shrink = torch.exp(scores - new), torch.exp(largest - new)
        total = total * shrink + weights.sum(-1, keepdim=True)
        out = _add((out * shrink).float(), _weights(weights, scheme), values, scheme.sums)
        largest = new
    return out * factor / total


def _weights(weights: Tensor, scheme: Scheme) -> Tensor:
    """The softmax's numerators as the second product takes them."""
    if scheme.float8 == "all":
        return (weights * WEIGHT_SCALE).to(FLOAT8).double() / WEIGHT_SCALE
    return weights.bfloat16().double()


def _add(out: Tensor, weights: Tensor, values: Tensor, sums: Sums) -> Tensor:
    """``out + weights @ values`` of one tile, in float32."""
    if sums == "float32":
        return (out + weights @ values).float()
    weights = weights.float()
    part = out if sums == "tensor core" else torch.zeros_like(out)
    for w, v in zip(weights.split(STEP, -1), values.split(STEP, 1), strict=True):
        part = _step(part, w[..., None] * v[:, None])
    return part if sums == "tensor core" else out + part


def _step(part: Tensor, products: Tensor) -> Tensor:
    """One step of a tensor core: (.., width) plus products (.., keys, width), cut at a common bit."""
    largest = torch.maximum(products.abs().amax(-2), part.abs())
    _, exponent = torch.frexp(largest)
    unit = torch.ldexp(torch.ones_like(largest), exponent - 1 - SUM_BITS)
    # Powers of two divide exactly.
    cut = torch.trunc(products / unit[..., None, :]).sum(-2) + torch.trunc(part / unit)
    return cut * unit


def errors(out: Tensor, exact: Tensor) -> tuple[float, float]:
    """Relative errors (root mean square, by head): the mean of the heads and the worst of them."""
    each = (out - exact).norm(dim=(1, 2)) / exact.norm(dim=(1, 2))
    return each.mean().item(), each.max().item()


def measure(contexts: list[int], seeds: int) -> Iterator[dict[str, Any]]:
    """One row for each scheme and context, averaged over ``seeds`` draws."""
    for keys in contexts:
        found: dict[str, list[tuple[float, float]]] = {scheme.name: [] for scheme in SCHEMES}
        for seed in range(seeds):
            data = draw(keys, seed=seed)
            scores = data.q @ data.k.mT * data.q.shape[-1] ** -0.5
            exact = scores.softmax(-1) @ data.v
            for scheme in SCHEMES:
                found[scheme.name].append(errors(attend(data, scheme), exact))
        for scheme in SCHEMES:
            means, worsts = zip(*found[scheme.name], strict=True)
            yield asdict(scheme) | {
                "context": keys,
                "error": sum(means) / seeds,
                "worst_head_error": max(worsts),
            }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: schemes by contexts, the mean error of the heads and in brackets that of the worst."""
    contexts = sorted({row["context"] for row in rows})
    by_scheme: dict[str, dict[str, Any]] = {}
    for row in rows:
        line = by_scheme.setdefault(row["name"], {"name": row["name"]})
        line[str(row["context"])] = f"{row['error']:.2%} ({row['worst_head_error']:.2%})"
    columns = [report.Column("name", "")]
    columns += [report.Column(str(n), f"{n // 1024}k") for n in contexts]
    return report.markdown(by_scheme.values(), columns)


def command(
    contexts: Annotated[
        str, typer.Option(help="Lengths in tokens, with commas.")
    ] = "1024,4096,16384,65536,131072",
    seeds: Annotated[int, typer.Option(min=1, help="Draws to average over.")] = 3,
    output: Annotated[
        Path | None, typer.Option(help="Also write the reading to this file.")
    ] = None,
) -> None:
    """Measure what float8 costs in accuracy, on a CPU, by scheme and context."""
    words = contexts.split(",")
    if not all(word.strip().isdigit() and int(word) > 0 for word in words):
        raise InvalidInputError("contexts", repr(contexts), "lengths like 1024,4096")
    rows = list(measure([int(word) for word in words], seeds))
    print(table(rows))
    if output is not None:
        settings = {"contexts": contexts, "seeds": seeds, "heads": 8, "queries": 2, "width": 128}
        report.Reading("quant", settings, rows).save(output)
