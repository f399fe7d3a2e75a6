"""Compiles the decode kernels for Hopper and prints what ptxas says of them, as JSON. Needs no GPU.

A program of its own because the tests run Triton's interpreter, which a process chooses once.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from typing import Any

from triton.experimental.gluon._runtime import GluonASTSource

from headway.kernels._triton import gl
from headway.kernels.hopper.decode import MANY_PARTS, ROWS_OF_PARTS
from headway.kernels.hopper.decode_combine import CombineConfig, combine_kernel
from headway.kernels.hopper.decode_config import AppendForm, DecodeConfig, tile_for
from headway.kernels.hopper.decode_kernel import decode_kernel
from headway.kernels.hopper.decode_plan import PlanConfig, plan_kernel
from tests.kernels.assembler import Assembled, compile_for_hopper

NAMES = {gl.bfloat16: "bf16", gl.float16: "fp16", gl.float8e4nv: "fp8e4nv"}


def compiled(
    fn: Any, types: dict[str, Any], constants: dict[str, Any], **options: Any
) -> Assembled:
    signature = {name: types.get(name, "constexpr") for name in fn.arg_names}
    attrs = {
        (fn.arg_names.index(name),): [["tt.divisibility", 16]]
        for name, kind in types.items()
        if isinstance(kind, str) and kind.startswith("*")
    }
    constants = {name: None for name in fn.arg_names if name not in types} | constants
    source = GluonASTSource(fn, signature, constexprs=constants, attrs=attrs)
    return compile_for_hopper(source, **options)


def descriptor(cfg: DecodeConfig, width: int) -> str:
    box = [1, 1, cfg.box_rows, width]
    layout = gl.NVMMASharedLayout.get_default_for(box, cfg.kv_dtype)
    return f"tensordesc<{NAMES[cfg.kv_dtype]}{box},{layout!r}>"


def compile_decode(cfg: DecodeConfig, *, lse: bool = True, sinks: bool = False) -> Assembled:
    types: dict[str, Any] = {"q_ptr": f"*{NAMES[cfg.q_dtype]}", "out_ptr": "*bf16"}
    if cfg.latent:
        types["qv_ptr"] = types["q_ptr"]
    if cfg.by_pointer:
        types |= dict.fromkeys(["k_ptr", "v_ptr"], f"*{NAMES[cfg.kv_dtype]}")
    if not cfg.gathered:
        types |= {
            "k_desc": descriptor(cfg, cfg.k_width),
            "v_desc": descriptor(cfg, cfg.v_box_width),
        }
    if lse:
        types["lse_ptr"] = "*fp32"
    if cfg.kv_dtype == gl.float8e4nv:
        types |= dict.fromkeys(["k_descale", "v_descale"], "*fp32")
    if sinks:
        types["sinks"] = "*fp32"
    if cfg.page_size:
        types["page_table"] = "*i32"
    types |= dict.fromkeys(["spans", "works", "share_ptr", "arrivals"], "*i32")
    types |= dict.fromkeys(["parts", "part_sums"], "*fp32")
    types |= dict.fromkeys(["scale", "softcap"], "fp32")
    numbers = [n for n in decode_kernel.arg_names if n.startswith("stride_")]
    numbers += ["units", "num_rows", "num_pages", "window_left", "window_right", "chunk"]
    types |= dict.fromkeys(numbers, "i32")
    constants: dict[Any, Any] = {"cfg": cfg, "num_warps": 4}
    if cfg.append is not None:
        types["new"], absent = appended(cfg)
        at = decode_kernel.arg_names.index("new")
        constants |= {(at, *path): None for path in absent}
    return compiled(decode_kernel, types, constants, num_warps=4, maxnreg=cfg.maxnreg)


def appended(cfg: DecodeConfig) -> tuple[Any, list[tuple[int, int]]]:
    """Types of what is appended, in the kernel's order, and the places of what there is not."""
    assert cfg.append is not None
    rows, strides = f"*{NAMES[cfg.q_dtype]}", ("i32", "i32", "i32")
    cu, turns = cfg.append.given
    absent = [] if cu else [(0, 2)]
    angles: tuple[str, ...] = (rows, rows, "*i32" if turns else "constexpr", "i32", "i32")
    if not turns:
        absent.append((1, 2))
    if not cfg.rotates:
        angles = ("constexpr", "constexpr", "constexpr", "i32", "i32")
        absent = [*absent, (1, 0), (1, 1)]
    sources = (rows, rows, "*i32" if cu else "constexpr", "i32", strides, strides)
    return (sources, angles), absent


def measure(kernel: Assembled, workers: int) -> dict[str, Any]:
    """What the assembler makes of a kernel, ``workers`` of which share a multiprocessor."""
    loop = innermost_matrix_loop(kernel.sass())
    return {
        "shared_bytes": kernel.shared_bytes,
        "spilled_bytes": kernel.spilled_bytes,
        "spills_per_block": sum(bool(re.search(r"\b(LDL|STL)\b", line)) for line in loop),
        "warnings": kernel.serialised,
        "workers": workers,
    }


def innermost_matrix_loop(sass: str) -> list[str]:
    """The instructions of the shortest loop that multiplies matrices; empty where nothing does. Loops go on
    under a condition: waits that are written behind the code return to it without one."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);", sass, re.MULTILINE)
    index = {int(address, 16): i for i, (address, _) in enumerate(lines)}
    loops = []
    for i, (address, text) in enumerate(lines):
        target = re.match(r"@\S+ BRA\S*\s.*0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < int(address, 16):
            body = [line for _, line in lines[index[int(target[1], 16)] : i + 1]]
            if any("GMMA" in line for line in body):
                loops.append(body)
    return min(loops, key=len, default=[])


def config(head_dim: int = 128, head_dim_v: int | None = None, **fields: Any) -> DecodeConfig:
    head_dim_v = head_dim_v or head_dim
    defaults: dict[str, Any] = {"q_dtype": gl.bfloat16, "group": 4, "rows": 4, "has_right": True}
    fields.setdefault("kv_dtype", fields.get("q_dtype", gl.bfloat16))
    return DecodeConfig(
        tile=tile_for(
            head_dim,
            head_dim_v,
            fields["kv_dtype"].primitive_bitwidth // 8,
            fields.get("rows", defaults["rows"]),
            fields.get("page_size", 0),
        ),
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        **(defaults | fields),
    )


def form(
    tokens: int = 4,
    half: int = 64,
    interleaved: bool = False,
    given: tuple[bool, bool] = (False, False),
) -> AppendForm:
    return AppendForm(tokens, half, interleaved, q_turns=True, given=given)


def latent(heads: int, **fields: Any) -> DecodeConfig:
    """Absorbed MLA over float8 latents."""
    fields.setdefault("page_size", 64)
    fields |= {"group": heads, "rows": heads, "latent": True, "kv_dtype": gl.float8e4nv}
    return config(64, 512, **fields)


def abreast(width: int = 128, **fields: Any) -> DecodeConfig:
    """Two KV heads of eight query heads each, and ``width`` columns together."""
    cfg = config(width, group=16, rows=16, kv_dtype=gl.float8e4nv, **fields)
    return dataclasses.replace(cfg, tile=dataclasses.replace(cfg.tile, abreast=2))


def paired(**fields: Any) -> DecodeConfig:
    """Absorbed MLA of 128 heads, as its tiles are paired."""
    tile = tile_for(64, 512, 2, rows=128, page_size=fields["page_size"])
    cfg = config(64, 512, group=128, rows=64, m_tiles=2, latent=True, **fields)
    return dataclasses.replace(cfg, tile=tile)


CONFIGS = {
    "dense, appends": config(append=form()),
    "page 16, appends": config(page_size=16, append=form(interleaved=True)),
    "page 1, gathered, appends": config(page_size=1, append=form(given=(True, True))),
    "page 64, four tokens, appends": config(rows=16, page_size=64, append=form(half=0)),
    "float8, page 16, appends": config(kv_dtype=gl.float8e4nv, page_size=16, append=form()),
    "float8, four tokens, appends": config(
        kv_dtype=gl.float8e4nv, rows=16, page_size=64, append=form()
    ),
    "16 new tokens": config(rows=16, page_size=64, append=form(tokens=16)),
    "float8, 16 new tokens": config(
        kv_dtype=gl.float8e4nv, rows=16, page_size=64, append=form(tokens=16)
    ),
    "64 rows, appends": config(group=64, rows=64, page_size=64, append=form()),
    "head_dim 256, appends": config(256, page_size=64, append=form()),
    "head_dim 64, appends": config(64, page_size=64, append=form(half=16)),
    "head_dim 192/128, appends": config(192, 128, page_size=64, append=form(half=16)),
    "dense": config(),
    "page 16": config(page_size=16),
    "page 1, gathered": config(page_size=1),
    "four tokens": config(rows=16, page_size=64),
    "float16, window, chunk, left padding, soft cap": config(
        q_dtype=gl.float16,
        page_size=64,
        has_left=True,
        has_chunk=True,
        has_pad=True,
        has_soft_cap=True,
    ),
    "head_dim 64, group 8, four tokens": config(64, group=8, rows=32, page_size=16),
    "head_dim 192/128": config(192, 128, group=1, rows=1),
    "float8, page 16": config(kv_dtype=gl.float8e4nv, page_size=16),
    "float8, page 1, gathered": config(kv_dtype=gl.float8e4nv, page_size=1),
    "float8, four tokens": config(kv_dtype=gl.float8e4nv, rows=16, page_size=16),
    "float8, head_dim 64": config(64, kv_dtype=gl.float8e4nv, page_size=64),
    "float8, two heads of 64 as one": abreast(page_size=16),
    "float8, two heads of 64 as one, page 64": abreast(page_size=64),
    "float8, two heads of 128 as one": abreast(256, page_size=16),
    "float8, head_dim 192/128": config(192, 128, kv_dtype=gl.float8e4nv),
    "float8, head_dim 256": config(256, kv_dtype=gl.float8e4nv),
    "64 rows": config(group=64, rows=64, page_size=64),
    "MLA, 16 heads": config(64, 512, group=16, rows=16, page_size=64, latent=True),
    "MLA, 64 heads": config(64, 512, group=64, rows=64, page_size=64, latent=True),
    "MLA, 128 heads": paired(page_size=64),
    "MLA, 128 heads, dense": paired(page_size=0),
    "MLA, 128 heads, float16, window, chunk, left padding, soft cap": paired(
        q_dtype=gl.float16,
        page_size=64,
        has_left=True,
        has_chunk=True,
        has_pad=True,
        has_soft_cap=True,
    ),
    "MLA, 64 heads, page 1, gathered": config(64, 512, group=64, rows=64, page_size=1, latent=True),
    "MLA float8, 16 heads": latent(16),
    "MLA float8, 16 heads, page 1, gathered": latent(16, page_size=1),
    "MLA float8, 16 heads, rope apart": latent(16, parted=True),
    "MLA float8, 64 heads": latent(64),
    "MLA float8, 64 heads, rope apart, page 1": latent(64, page_size=1, parted=True),
    "MLA float8, float16, window, chunk, left padding, soft cap": latent(
        32,
        q_dtype=gl.float16,
        has_left=True,
        has_chunk=True,
        has_pad=True,
        has_soft_cap=True,
    ),
    "head_dim 256": config(256),
    "head_dim 256, page 1, gathered": config(256, page_size=1),
}


def compile_plan(every_tensor: bool) -> Assembled:
    tensors = ["seqlens_k", "spans", "works", "share_ptr", "starts"]
    if every_tensor:
        tensors += ["leftpad_k", "cache_batch_idx", "cu_seqlens_q", "seqused_q", "cu_seqlens_new"]
    numbers = ["batch_size", "rows_q", "capacity", "units", "workers", "min_share"]
    numbers += ["new_tokens", "window_left", "window_right", "chunk"]
    types = dict.fromkeys(tensors, "*i32") | dict.fromkeys(numbers, "i32")
    masks = dict.fromkeys(["has_left", "has_right", "has_chunk"], every_tensor)
    cfg = PlanConfig(block_n=64, unit_cost=1, at_once=1024, workers=512, merge_parts=16, **masks)
    return compiled(plan_kernel, types, {"cfg": cfg, "num_warps": 8}, num_warps=8)


def compile_combine(head_dim_v: int, rows: int, merge_parts: int, merge_rows: int) -> Assembled:
    numbers = [n for n in combine_kernel.arg_names if n.startswith("stride_")]
    types = dict.fromkeys(["units", "num_rows", *numbers], "i32")
    types |= dict.fromkeys(["spans", "share_ptr", "starts"], "*i32") | {"out_ptr": "*bf16"}
    types |= dict.fromkeys(["lse_ptr", "sinks", "parts", "part_sums"], "*fp32")
    cfg = CombineConfig(
        head_dim_v, rows, 1, rows, unit_cost=1, merge_parts=merge_parts, merge_rows=merge_rows
    )
    return compiled(combine_kernel, types, {"cfg": cfg, "num_warps": 4}, num_warps=4)


#: Columns, rows, and parts and rows that a program reads at once.
COMBINED = {
    "combine": (128, 16, MANY_PARTS, 1),
    "combine, latent": (512, 16, MANY_PARTS, 1),
    "combine, two parts of 64 rows": (512, 64, 4, ROWS_OF_PARTS // 4),
}


def compile_named(name: str) -> dict[str, Any]:
    if name.startswith("combine"):
        return measure(compile_combine(*COMBINED[name]), 1)
    if name.startswith("plan"):
        return measure(compile_plan(name == "plan, every tensor"), 1)
    cfg = CONFIGS[name]
    return measure(compile_decode(cfg, sinks=cfg.has_soft_cap), cfg.tile.per_multiprocessor)


if __name__ == "__main__":
    print(json.dumps({name: compile_named(name) for name in sys.argv[1:]}))
