"""Absorbed multi-head latent attention on Hopper: every query head against one latent cache, read once.

Scores are q_latent · latent + q_rope · rope, values are the latent itself: the decode kernel with its
values as keys too. Up to 16 packed rows, tokens times heads, are one consumer's; of more, 64 make a
tile of three warpgroups, and tiles beyond the first read the cache again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headway.errors import InvalidInputError
from headway.kernels.hopper.decode import decode, make_plan
from headway.kernels.hopper.decode_config import DecodeTile
from headway.kernels.hopper.decode_plan import DecodePlan

#: The widest rope and latent parts that fit a tile.
ROPE_DIM = 64
LATENT_DIM = 512


def make_mla_plan(
    *,
    batch_size: int,
    num_heads: int,
    max_seqlen_q: int,
    device: torch.device,
    page_size: int = 0,
    sm_margin: int = 0,
    tile: DecodeTile | None = None,
) -> DecodePlan:
    """Buffers for MLA decode steps of this geometry; :func:`plan_decode` fills them, once per step.

    Args:
        num_heads: query heads.
        page_size: rows of a page, 0 where the cache is not paged.
        sm_margin: multiprocessors to leave to others.
    """
    return make_plan(
        batch_size=batch_size,
        num_kv_heads=1,
        group=num_heads,
        max_seqlen_q=max_seqlen_q,
        head_dim=ROPE_DIM,
        head_dim_v=LATENT_DIM,
        device=device,
        page_size=page_size,
        sm_margin=sm_margin,
        tile=tile,
    )


def mla_decode(
    q_rope: Tensor,
    q_latent: Tensor,
    rope: Tensor,
    latent: Tensor,
    out: Tensor,
    plan: DecodePlan,
    *,
    softmax_scale: float,
    lse: Tensor | None = None,
    page_table: Tensor | None = None,
    max_seqlen_q: int = 1,
    leftpad: bool = False,
    window_left: int | None = None,
    window_right: int | None = None,
    chunk: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    score_mod: Any = None,
    mask_mod: Any = None,
    aux: Any = None,
) -> None:
    """Absorbed MLA of a planned step, written to ``out`` and ``lse``.

    A cache of whole rows is given as two views of it, ``latent = cache[..., :512]`` and
    ``rope = cache[..., 512:]``, and queries likewise.

    Args:
        q_rope: (B, Sq, H, up to 64), or (total_q, H, ..) where the plan was filled with ``cu_seqlens_q``.
        q_latent: as q_rope, 257 to 512 columns.
        rope, latent: (B, S, 1, ..), or (num_pages, page_size, 1, ..) with ``page_table`` (B, max_pages)
            int32; bfloat16 or float16, as the queries; last stride 1, others multiples of 16 bytes.
        out: as q_latent, any float dtype. Rows of no query stay as they are.
        lse: (B, H, Sq) or (H, total_q) float32, last stride 1, natural log; None: not wanted.
        sinks: (H,), any float dtype.
        score_mod, mask_mod, aux: as :func:`~.decode.decode` takes them.

    Raises:
        InvalidInputError: dims or dtypes are not as above, or rows do not start at multiples of 16 bytes.
    """
    if q_rope.shape[-1] > ROPE_DIM or not 256 < q_latent.shape[-1] <= LATENT_DIM:
        raise InvalidInputError(
            "q",
            f"rope dim {q_rope.shape[-1]} and latent dim {q_latent.shape[-1]}",
            f"up to {ROPE_DIM}, and 257 to {LATENT_DIM}",
        )
    if latent.dtype not in (torch.bfloat16, torch.float16):
        raise InvalidInputError("latent", latent.dtype, "bfloat16 or float16")
    decode(
        q_rope,
        rope,
        latent,
        out,
        plan,
        softmax_scale=softmax_scale,
        qv=q_latent,
        lse=lse,
        page_table=page_table,
        max_seqlen_q=max_seqlen_q,
        leftpad=leftpad,
        window_left=window_left,
        window_right=window_right,
        chunk=chunk,
        softcap=softcap,
        sinks=sinks,
        score_mod=score_mod,
        mask_mod=mask_mod,
        aux=aux,
    )
