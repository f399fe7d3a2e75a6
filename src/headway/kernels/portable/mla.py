"""Absorbed multi-head latent attention: all query heads against one latent cache, read once.

Scores are q_latent · latent + q_rope · rope, values are the latent itself (576 / 512 in DeepSeek). The
cache may come as rope and latent tensors (``qv``) or as one whose first columns are the values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from headway.kernels.portable.decode import choose_tile, decode
from headway.kernels.portable.operands import Segments, block_width
from headway.kernels.portable.tiles import Tile
from headway.plan import Schedule
from headway.problem import Problem

if TYPE_CHECKING:
    from headway.kernels.mods import ModArguments


def values_lead_keys(problem: Problem) -> bool:
    """Whether v is the first head_dim_v columns of k, in the same memory."""
    k, v = problem.k, problem.v
    return (
        k.data_ptr() == v.data_ptr()
        and _steps(k) == _steps(v)
        and problem.head_dim_v <= problem.head_dim
    )


def _steps(t: Tensor) -> list[int]:
    """Strides that count: views of one memory may differ in those of dimensions of one."""
    return [step for step, size in zip(t.stride(), t.shape, strict=True) if size > 1]


def is_latent(problem: Problem) -> bool:
    """Whether this is a call for this module: qv given, or values wider than other kernels take."""
    return problem.qv is not None or (problem.head_dim_v > 256 and values_lead_keys(problem))


def latent_segments(problem: Problem) -> Segments:
    """Both forms of the call as one latent product and one rope product."""
    p, dv = problem, problem.head_dim_v
    if p.qv is not None:
        scaled = any(t is not None for t in (p.descales.q, p.descales.k, p.descales.v))
        return Segments(p.qv, p.v, p.v, dv, p.q, p.k, p.head_dim, True, scaled)
    if p.head_dim == dv:
        return Segments(p.q, p.k, p.v, dv, v_is_k=True)
    rope = p.head_dim - dv
    return Segments(p.q, p.k, p.v, dv, p.q[..., dv:], p.k[..., dv:], rope, True)


def mla(
    problem: Problem,
    out: Tensor,
    lse: Tensor | None,
    plan: Schedule | None = None,
    tile: Tile | None = None,
    mods: ModArguments | None = None,
) -> None:
    """Fill ``out`` and ``lse`` of an absorbed MLA call; any number of query tokens and heads."""
    segments = latent_segments(problem)
    if tile is None:
        dim = block_width(segments.d1) + (block_width(segments.d2) if segments.d2 else 0)
        tile = choose_tile(problem, "mla", dim)
    decode(problem, out, lse, plan, segments, tile, mods)
