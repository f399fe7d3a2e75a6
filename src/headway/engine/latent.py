"""Multi-head latent attention (DeepSeek V2, V3, R1) in transformers' models, without touching their code.

Such a model compresses the keys and values of all heads of a token to one latent vector, and its attention
module expands it again before it calls the attention function. :func:`keep_latent` leaves that step out:
the attention function gets the latent vectors themselves, the rotary part of the keys behind each, and what
expands them lies ready on the module. The cache then holds a latent vector per token instead of the keys
and values of every head, and a decode step attends to it as it is
(:class:`headway.serving.mla.MLABackend`).
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn

from headway.engine import parallel
from headway.engine.expansion import EXPANSION, Expansion
from headway.engine.trial import TRIAL_ROWS, agree, random_like

#: The method of transformers' modules that expands latent vectors, and the linear layer it does so with.
EXPAND, PRODUCT = "expand_kv", "kv_b_proj"


@torch.inference_mode()
def keep_latent(model: nn.Module) -> int:
    """Let every latent attention module of a model hand over its latent vectors; returns how many do.

    A module does so if what its own method expands is what :class:`Expansion` does. It gives up the
    weight that is copied here. On the meta device, where nothing can be computed, names decide.
    """
    count = 0
    for module in list(model.modules()):
        expansion = _expansion_in(module)
        if expansion is None or not _is_what_it_does(module, expansion):
            continue
        setattr(module, EXPANSION, expansion)
        setattr(module, EXPAND, types.MethodType(_packed, module))
        delattr(module, PRODUCT)
        count += 1
    return count


def _packed(module: nn.Module, latent: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
    """In the place of a module's own: (1, 1, tokens, latent) and (1, 1, tokens, rope) as one vector each,
    and its latent part."""
    keys = torch.cat((latent, rope), dim=-1)
    return keys, keys[..., : latent.shape[-1]]


def _is_what_it_does(module: Any, expansion: Expansion) -> bool:
    like = expansion.w_uk
    if like.device.type == "meta":
        return True
    width = getattr(module, "qk_rope_head_dim", None)
    if not isinstance(width, int):
        return False
    latent = random_like(1, 1, TRIAL_ROWS, expansion.latent_dim, like=like)
    rope = random_like(1, 1, TRIAL_ROWS, width, like=like)
    try:
        keys, values = (t[0].transpose(0, 1) for t in getattr(module, EXPAND)(latent, rope))
    except (RuntimeError, ValueError, TypeError):
        return False
    k = torch.cat((latent, rope), dim=-1)[0].transpose(0, 1)
    mine = expansion.keys(k), expansion.values(k[..., : expansion.latent_dim])
    return agree(mine[0], keys) and agree(mine[1], values)


def _expansion_in(module: nn.Module) -> Expansion | None:
    """What an attention module expands latent vectors with, by its names; None where it has none."""
    product: Any = getattr(module, PRODUCT, None)
    widths = [getattr(module, name, None) for name in ("qk_nope_head_dim", "v_head_dim")]
    if type(product) is not nn.Linear or product.bias is not None:
        return None
    nope, value = widths
    if not isinstance(nope, int) or not isinstance(value, int) or not hasattr(module, EXPAND):
        return None
    weight = parallel.local(product.weight).detach()
    if weight.shape[0] % (nope + value):
        return None
    w_uk, w_uv = weight.unflatten(0, (-1, nope + value)).split((nope, value), dim=1)
    return Expansion(w_uk.contiguous(), w_uv.contiguous())
