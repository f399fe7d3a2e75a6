"""Compiles the prefill kernel for Hopper and prints what its machine code is like, as JSON. Needs no GPU.
Arguments: names of cases; none: all.

A program of its own because the tests run Triton's interpreter, which a process chooses once.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

from triton.experimental.gluon._runtime import GluonASTSource

from headway.kernels._triton import gl
from headway.kernels.hopper.config import ForwardConfig
from headway.kernels.hopper.forward import forward_kernel
from headway.kernels.hopper.tiles import forward_tile
from tests.kernels.assembler import Assembled, compile_for_hopper

POINTERS = {
    "descales": "*fp32",
    "cu_seqlens_q": "*i32",
    "cu_seqlens_k": "*i32",
    "seqused_k": "*i32",
    "page_table": "*i32",
    "schedule": "*i32",
}
ABSENT = ("sinks", "seqused_q", "leftpad_k", "cache_batch_idx", "key_strides", "aux")
#: Keys that were float8, before ragged queries: a dense copy, with factors.
WIDENED = ("cu_seqlens_q", "seqused_k", "descales")
RAGGED = {"ragged_q": True, "exact_q": False, "exact_k": False, "work_list": True}
CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "d64 causal": (64, 64, {"has_right": True, "dynamic": True}),
    "d128 full": (128, 128, {}),
    "d128 causal": (128, 128, {"has_right": True, "dynamic": True}),
    "d128 ragged causal": (128, 128, {"has_right": True, "dynamic": True, **RAGGED}),
    "d128 paged causal": (
        128,
        128,
        {"has_right": True, "dynamic": True, "page_size": 64, **RAGGED},
    ),
    "d128 short causal": (128, 128, {"has_right": True, "dynamic": True, "max_seqlen_q": 1024}),
    "d128 page 16 causal": (
        128,
        128,
        {"has_right": True, "dynamic": True, "page_size": 16, **RAGGED},
    ),
    "d64 short causal": (64, 64, {"has_right": True, "dynamic": True, "max_seqlen_q": 1024}),
    "d192/128 causal": (192, 128, {"has_right": True, "dynamic": True}),
    "d256 full": (256, 256, {}),
    "d256 causal": (256, 256, {"has_right": True, "dynamic": True}),
    "d128 gathered causal": (
        128,
        128,
        {
            **RAGGED,
            "has_right": True,
            "dynamic": True,
            "page_size": 17,
            "gathered_dims": (128, 128),
            "exact_k": True,
        },
    ),
    "d64 widened causal": (
        64,
        64,
        {"has_right": True, "dynamic": True, **RAGGED, "used": WIDENED},
    ),
    "d128 widened causal": (
        128,
        128,
        {"has_right": True, "dynamic": True, **RAGGED, "used": WIDENED},
    ),
    "d128 split paged": (
        128,
        128,
        {"has_right": True, "dynamic": True, "page_size": 64, "exact_k": False, "split": True},
    ),
}


def compile_forward(head_dim: int, head_dim_v: int, features: dict[str, Any]) -> Assembled:
    features = dict(features)
    max_seqlen_q = features.pop("max_seqlen_q", 1 << 20)
    causal, paged = features.get("has_right", False), features.get("page_size", 0) > 0
    tile = forward_tile(head_dim, head_dim_v, causal, max_seqlen_q, paged)
    given = features.pop("used", None)
    cfg = ForwardConfig(gl.bfloat16, tile, head_dim, head_dim_v, **features)
    used = {"schedule"} if cfg.dynamic else set()
    used |= {"cu_seqlens_q", "cu_seqlens_k"} if cfg.ragged_q and given is None else set()
    used |= {"page_table", "seqused_k"} if cfg.page_size else set()
    used |= set(given or ())

    def kind(name: str) -> Any:
        if name in ("k", "v") and cfg.gathered:
            return "*bf16"
        if name.endswith("_desc") or name in ("k", "v"):
            box = cfg.q_box if name in ("q_desc", "out_desc") else cfg.k_box
            layout = gl.NVMMASharedLayout.get_default_for(box, cfg.dtype)
            return f"tensordesc<bf16{box},{layout!r}>"
        known = {"out": "*bf16", "lse": "*fp32", "softmax_scale": "fp32", "softcap": "fp32"}
        if name in known or name in used:
            return known.get(name) or POINTERS[name]
        if name == "key_strides" and cfg.gathered:
            return ("i32",) * 6
        optional = {*POINTERS, *ABSENT}
        return "constexpr" if name in {*optional, *constants} else "i32"

    constants = {"score_mod": None, "mask_mod": None, "cfg": cfg, "num_warps": 4}
    signature = {name: kind(name) for name in forward_kernel.arg_names}
    values = {name: constants.get(name) for name, k in signature.items() if k == "constexpr"}
    source = GluonASTSource(forward_kernel, signature, constexprs=values, attrs={})
    return compile_for_hopper(source, num_warps=4)


def inner_loops(sass: str, product: str = "HGMMA", least: int = 12) -> list[list[str]]:
    """Bodies of the innermost loops that multiply matrices twice: at least so many of an instruction."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,5})\*/\s+([^;]*);", sass, flags=re.M)
    place = {int(address, 16): i for i, (address, _) in enumerate(lines)}
    spans = []
    for i, (address, text) in enumerate(lines):
        branch = re.search(r"\bBRA\b.*0x([0-9a-f]+)", text)
        if branch and (start := int(branch[1], 16)) < int(address, 16) and start in place:
            body = [t for _, t in lines[place[start] : i + 1]]
            if sum(product in t for t in body) >= least:
                spans.append((place[start], i, body))
    return [
        body
        for first, last, body in spans
        if not any(first <= a and b <= last and (a, b) != (first, last) for a, b, _ in spans)
    ]


def measure(kernel: Assembled) -> dict[str, Any]:
    loops = []
    for body in inner_loops(kernel.sass()):
        waits = [i for i, t in enumerate(body) if "WARPGROUP.DEPBAR" in t]
        exponentials = [i for i, t in enumerate(body) if "MUFU.EX2" in t]
        loops.append(
            {
                "instructions": len(body),
                "local_memory": sum("LDL" in t or "STL" in t for t in body),
                "repacked": sum("PRMT" in t for t in body),
                "barriers": sum("BAR.SYNC" in t for t in body),
                "softmax_beside_pv": len(waits) > 1
                and sum(waits[-2] < i < waits[-1] for i in exponentials) > len(exponentials) // 2,
            }
        )
    return {
        "serialised": kernel.serialised,
        "shared_bytes": kernel.shared_bytes,
        "loops": sorted(loops, key=lambda loop: loop["instructions"]),
    }


if __name__ == "__main__":
    names = sys.argv[1:] or list(CASES)
    print(json.dumps({name: measure(compile_forward(*CASES[name])) for name in names}))
