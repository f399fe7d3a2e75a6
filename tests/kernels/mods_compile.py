"""Compile mods inside a Triton kernel and a Gluon kernel, without a device. Run by test_mods.py."""

from __future__ import annotations

import sys
from typing import Any

import torch

from headway.kernels._triton import gl, gluon, jit, tl
from headway.kernels.compile import stand_in
from headway.kernels.mods import Language, trace_mods


@jit
def triton_kernel(out, aux, score_mod: tl.constexpr, mask_mod: tl.constexpr, PACK: tl.constexpr):
    m = tl.arange(0, 64)[:, None]
    n = tl.arange(0, 128)[None, :]
    h = tl.program_id(0)
    if PACK:
        h = h * 4 + m % 4
    score = tl.full([64, 128], 1.0, tl.float32)
    score = score_mod(score, tl.program_id(1), h, m, n, aux)
    visible = mask_mod(tl.program_id(1), h, m, n, aux)
    tl.store(out + m * 128 + n, tl.where(visible, score, float("-inf")))


@gluon.jit
def gluon_kernel(out, aux, score_mod: gl.constexpr, mask_mod: gl.constexpr, PACK: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    m = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))[:, None]
    n = gl.arange(0, 128, layout=gl.SliceLayout(0, layout))[None, :]
    h = gl.program_id(0)
    if PACK:
        h = h * 4 + m % 4
    score = gl.full([64, 128], 1.0, gl.float32, layout)
    score = score_mod(score, gl.program_id(1), h, m, n, aux)
    visible = mask_mod(gl.program_id(1), h, m, n, aux)
    gl.store(out + m * 128 + n, gl.where(visible, score, float("-inf")))


def every_operation(s: Any, b: Any, h: Any, q: Any, kv: Any, aux: Any) -> Any:
    """Each kind of node in the text of a kernel at least once."""
    x = torch.tanh(s / 30) * 30 + aux[0][h] * (kv - q).abs() + aux[2][b % 3]
    x = torch.where(q % 7 == 3, x.clamp(-5, 5), torch.sigmoid(x))
    x = x + torch.where(kv > q, 1.0, float("-inf")).clamp(min=-2.0) + 2.0**h + s**3 + b.sqrt()
    x = x.bfloat16() + torch.erf(x) + torch.floor(x) + (q // -3) + (kv << 2) + torch.minimum(x, s)
    return x + torch.sin(x) * torch.rsqrt(x) + torch.log2(torch.ones_like(s)) + aux[3] + (b > 1)


def bias_of_head(s: Any, b: Any, h: Any, q: Any, kv: Any, aux: Any) -> Any:
    return torch.exp2(-(h + 1) * 0.5) * 8


def every_condition(b: Any, h: Any, q: Any, kv: Any, aux: Any) -> Any:
    return (aux[1][q % 9, kv // 15 % 9] ^ ~(kv < 3)) & (aux[2][0] == 1) | (q - kv).bool()


def all_visible(b: Any, h: Any, q: Any, kv: Any, aux: Any) -> Any:
    return True


def compile_pair(
    language: Language, target: str, score_mod: Any, mask_mod: Any, pack: bool
) -> None:
    aux = (
        torch.empty(8, device="meta"),
        torch.empty(9, 9, dtype=torch.bool, device="meta"),
        torch.empty(3, dtype=torch.int64, device="meta"),
        torch.empty((), dtype=torch.bfloat16, device="meta"),
    )
    mods = trace_mods(score_mod, mask_mod, aux, torch.device("meta"), language)
    kernel = {"triton": triton_kernel, "gluon": gluon_kernel}[language]
    with stand_in(target) as launches:
        out = torch.empty(64, 128, device="meta")
        kernel[(8, 2)](out, mods.aux, mods.score_mod, mods.mask_mod, PACK=pack)
    for launch in launches:
        if launch.error is not None:
            raise launch.error


def main() -> None:
    for language, target in (("triton", "sm90"), ("gluon", "sm90"), ("triton", "gfx942")):
        for score_mod in (every_operation, bias_of_head):
            for mask_mod in (every_condition, all_visible):
                for pack in (False, True):
                    compile_pair(language, target, score_mod, mask_mod, pack)  # type: ignore[arg-type]
                    print("compiled", language, target, score_mod.__name__, mask_mod.__name__, pack)


if __name__ == "__main__":
    sys.exit(main())
