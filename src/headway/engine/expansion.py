"""What expands latent vectors to keys and values, and where a model's attention modules keep it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

#: Attribute of an attention module whose keys and values arrive as latent vectors: its :class:`Expansion`.
EXPANSION = "headway_expansion"


@dataclass(frozen=True)
class Expansion:
    """What latent vectors are expanded with: w_uk (H, nope, latent) to keys, w_uv (H, v, latent) to
    values."""

    w_uk: Tensor
    w_uv: Tensor

    @property
    def latent_dim(self) -> int:
        return self.w_uk.shape[2]

    def keys(self, k: Tensor) -> Tensor:
        """(tokens, 1, latent + rope) to (tokens, H, nope + rope)."""
        nope = torch.einsum("tl,hnl->thn", k[:, 0, : self.latent_dim], self.w_uk)
        rope = k[..., self.latent_dim :].expand(-1, nope.shape[1], -1)
        return torch.cat((nope, rope), dim=-1)

    def values(self, v: Tensor) -> Tensor:
        """(tokens, 1, latent) to (tokens, H, v)."""
        return torch.einsum("tl,hvl->thv", v[:, 0], self.w_uv)


def expansion_of(module: nn.Module) -> Expansion | None:
    """What a module's latent vectors are expanded with; None where it hands over keys and values."""
    return getattr(module, EXPANSION, None)


def attend_plainly(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float
) -> Tensor:
    """Causal attention within the tokens given, q (T, Hq, D), k (T, Hkv, D), v (T, Hkv, Dv), by torch."""
    expansion = expansion_of(module)
    if expansion is not None:
        k, v = expansion.keys(k), expansion.values(v)
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    out = functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=softmax_scale, enable_gqa=True
    )
    return out[0].transpose(0, 1)
